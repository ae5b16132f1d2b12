"""The run as a list: every step once, everything else where the recipe puts it, and the same list from any position on."""

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.cli import run
from megacpt.config.clock import Clock
from megacpt.config.recipe import Recipe
from megacpt.config.timeline import AT_START, AT_STEP, Event, Position, folded, last_step, timeline


def make(stages, every=5, checksum=7, validate=None, online=None, stop=None, gates=True) -> Recipe:
    names = ["g"] if gates else []
    return Recipe.model_validate(
        {
            "run": {"name": "t", "stop_at_step": stop},
            "model": {"config": "c", "tokenizer": "t"},
            "data": {name: {"paths": ["p"], "holdout_documents": 2} for name in "ab"},
            "checkpoint": {"every_steps": every},
            "health": {"checksum_every_steps": checksum},
            "gates": {"g": {"kind": "forgetting", "domains": ["a"]}} if gates else {},
            "validation": [{"domains": ["a"], "every_tokens": validate}] if validate else [],
            "mixture": {"groups": {"all": ["a", "b"]}, "online": online} if online else {},
            "stages": [
                {
                    "name": f"s{i}",
                    "tokens": steps * 10,
                    "seq_len": 10,
                    "batch_tokens": 10,
                    "mixture": {"a": 0.5, "b": 0.5},
                    "lr": {"shape": "constant", "peak": 1e-3},
                    "gates": names if asks else [],
                    "average": {"every_tokens": average} if average else None,
                }
                for i, (steps, asks, average) in enumerate(stages)
            ],
        }
    )


RECIPES = st.builds(
    make,
    st.lists(st.tuples(st.integers(1, 30), st.booleans(), st.sampled_from([None, 30, 70])), min_size=1, max_size=3),
    every=st.integers(1, 12),
    checksum=st.integers(1, 9),
    validate=st.sampled_from([None, 10, 40]),
    online=st.sampled_from([None, {"every_tokens": 50, "start_tokens": 30}]),
    stop=st.sampled_from([None, 0, 1, 7, 1000]),
)


@given(RECIPES)
def test_every_step_is_trained_once_and_in_order(recipe):
    clock = Clock(recipe)
    events = list(timeline(recipe, clock))
    trained = [event.step for event in events if event.kind == "train"]
    assert trained == list(range(1, last_step(recipe, clock) + 1))
    assert events[0] == Event("enter", 0, 0) and events[-1].kind == "finish"
    assert Counter(event.kind for event in events)["finish"] == 1
    entered = [event.stage for event in events if event.kind == "enter"]
    assert entered == list(range(len(entered)))
    for before, after in pairwise(events):  # the same stage, or the next one by its entry
        assert after.stage == before.stage or (after.kind == "enter" and after.stage == before.stage + 1)


@given(RECIPES)
def test_events_stand_where_the_recipe_puts_them(recipe):
    clock = Clock(recipe)
    events, last = list(timeline(recipe, clock)), last_step(recipe, clock)

    def at(kind):
        return [event.step for event in events if event.kind == kind]

    steps = range(1, last + 1)
    assert at("checksum") == [n for n in steps if n % recipe.health.checksum_every_steps == 0]
    for n in steps:
        step = clock.step(n)
        inside = step.tokens_after - clock.stage_first_token[step.stage]
        stage, ends = recipe.stages[step.stage], inside == clock.stage_tokens(step.stage)
        asks = ends and (stage.gates or stage.average)
        assert (n in at("save")) == (n % recipe.checkpoint.every_steps == 0 or (n == last and not asks))
        assert (n in at("gates")) == bool(ends and stage.gates)
        assert (n in at("average")) == bool(ends and stage.average)
        assert (n in at("snapshot")) == bool(stage.average and (ends or inside % stage.average.every_tokens == 0))
        online = recipe.mixture.online
        due = online and not ends and inside >= 30 and (inside == 30 or inside % 50 == 0)
        assert (n in at("reweight")) == bool(due)
        if recipe.validation:
            every = recipe.validation[0].every_tokens
            assert (n in at("validate")) == (step.tokens_after % every == 0 or n == clock.num_steps)


@given(RECIPES, st.data())
def test_a_resume_at_any_position_goes_on_with_the_same_list(recipe, data):
    clock = Clock(recipe)
    events = list(timeline(recipe, clock))
    done = data.draw(st.integers(0, len(events) - 1))
    after = Position(events[done].step, events[done].kind)
    assert list(timeline(recipe, clock, after)) == events[done + 1 :]


@given(RECIPES)
def test_a_kind_stands_once_at_a_step(recipe):
    """So that a position names one place. The order is that of the tables."""
    places = Counter((event.step, event.kind) for event in timeline(recipe, Clock(recipe)))
    assert set(places.values()) == {1}
    by_step: dict[int, list[str]] = {}
    for event in timeline(recipe, Clock(recipe)):
        by_step.setdefault(event.step, []).append(event.kind)
    for step, kinds in by_step.items():
        order = AT_STEP if step else AT_START
        assert kinds == sorted(kinds, key=order.index)


@given(RECIPES, st.integers(1, 5))
def test_an_extension_changes_only_what_follows(recipe, more):
    """A gate that is not passed makes its stage longer: the list up to the gate stays, and the stage goes on without another entry."""
    clock, longer = Clock(recipe), Clock(recipe, {"s0": 10 * more})
    events = list(timeline(recipe, clock))
    gates = next((i for i, event in enumerate(events) if event.kind == "gates" and event.stage == 0), None)
    if gates is None or recipe.run.stop_at_step is not None:
        return
    rest = list(timeline(recipe, longer, Position(events[gates].step, "gates")))
    assert rest[0] == Event("train", 0, events[gates].step + 1)
    before = [e for e in timeline(recipe, longer) if e.step < events[gates].step]
    assert before == [e for e in events if e.step < events[gates].step]
    trained = [e.step for e in [*events[: gates + 1], *rest] if e.kind == "train"]
    assert trained == list(range(1, longer.num_steps + 1))


def test_a_resume_where_the_recipe_has_other_intervals():
    """The position may name a kind that is not due any more: what came before it in the order is done all the same."""
    before, now = make([(20, True, None)], every=5), make([(20, True, None)], every=7)
    assert Event("save", 0, 10) in timeline(before, Clock(before))
    rest = list(timeline(now, Clock(now), Position(10, "save")))
    assert rest[0] == Event("train", 0, 11)


def test_the_comparison_sees_a_lost_event():
    """The twin: a position one event further is another list."""
    recipe = make([(6, True, None), (4, False, None)], validate=20)
    events = list(timeline(recipe, Clock(recipe)))
    assert list(timeline(recipe, Clock(recipe), Position(events[3].step, events[3].kind))) != events[5:]


@pytest.mark.parametrize("stop, expected", [(None, 100), (0, 0), (30, 30)])
def test_the_folded_list(stop, expected):
    recipe = make([(100, True, None)], validate=400, stop=stop)
    lines = folded(timeline(recipe, Clock(recipe)), recipe)
    if expected:
        assert f"s0: train steps 1 to {expected}" in lines
    assert lines[-1].startswith("s0: finish after step ")
    if stop is None:
        assert "s0: save 20 times, after step 5, 10, 15, … 100" in lines
        assert "s0: validate after step 0, 40, 80, 100" in lines and "s0: gates after step 100" in lines


def test_check_prints_the_list(recipe_file, capsys):
    path = recipe_file()
    assert run(["check", path, "--timeline"]) == 0
    out = capsys.readouterr().out
    assert "s: train steps 1 to" in out and "s: finish after step" in out
