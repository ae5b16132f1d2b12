"""A run is a list of events: stopped at any of them and started again, it does each once, with the same numbers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from ranks import on_ranks

from megacpt.checkpoint.manifest import latest_intact_checkpoint
from megacpt.config.clock import Clock
from megacpt.config.load import load_recipe
from megacpt.config.timeline import timeline
from megacpt.train import drive, loop
from megacpt.train.handlers import gates

LR = {"shape": "constant", "peak": 1e-3}
MEASURED = ("validation", "mixture", "gates", "average", "baseline", "extend", "stage")


@pytest.fixture
def path(recipe_file) -> str:
    """Two stages with everything that a run can do between its steps; the first is extended once."""
    common = {"seq_len": 64, "batch_tokens": 256, "lr": LR, "average": {"last": 2, "every_tokens": 512}}
    asked = {
        "kept": {"kind": "forgetting", "domains": ["b"], "max_rise": 9.0},
        "hopeless": {
            "kind": "needle",
            "haystack": "a",
            "lengths": [64],
            "depths": 2,
            "inserted": 1,
            "asked": 1,
            "minimum": 1.0,
        },
    }
    extend = {"action": "extend", "tokens": 256, "limit": 256}
    first = {"name": "x", "tokens": 1024, "mixture": {"a": 0.5, "b": 0.5}, "gates": list(asked), "on_fail": extend}
    last = {"name": "y", "tokens": 512, "mixture": {"a": 0.5, "b": 0.5}, "gates": list(asked)}
    return recipe_file(
        stages=[common | first, common | last],
        gates=asked,
        mixture={"groups": {"all": ["a", "b"]}, "online": {"every_tokens": 512}},
        validation=[{"domains": ["a", "b"], "every_tokens": 512}],
        checkpoint={"every_steps": 3},
        health={"watchdog": False, "checksum_every_steps": 2},
    )


def handled(path: str, flags: list[str], stop: str) -> list[tuple[str, int]]:
    """Trains, and asks to stop in the step that `stop` names. What was handled, in order."""
    done, handlers = [], dict(drive.HANDLERS)
    kind, _, step = stop.partition(":")

    def noting(name: str):
        def handle(session, event):
            if (event.kind, event.step) == (kind, int(step or -1)):
                session.stop.ask("the test")
            handlers[name](session, event)
            done.append((event.kind, event.step))

        return handle

    def once_longer(stage, extended, failed):
        return "extend" if stage.name == "x" and not extended else "warn"

    gates.action_after = once_longer
    for name in handlers:
        drive.HANDLERS[name] = noting(name)
    loop.train(load_recipe(path, ["--log.tensorboard=false", *flags]))
    return done


def rows(run: Path) -> list[dict]:
    exact = ("step", "tokens", "stage", "loss", "grad_norm", "lr", "domain_tokens", "skipped")
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in exact} for row in found]


def measured(run: Path) -> list[dict]:
    found = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "time"} for row in found if row["kind"] in MEASURED]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(what was handled, rows, measurements) of the run that nothing stopped; made once."""
    return {}


def whole_run(whole: dict, path: str, tmp_path: Path) -> dict:
    if not whole:
        run = tmp_path / "whole"
        (done,) = on_ranks(1, handled, path, [f"--run.directory={run}"], "")
        whole |= {"done": done, "rows": rows(run), "measured": measured(run)}
    return whole


def test_the_driver_does_what_the_timeline_says(path, whole, tmp_path):
    """Also after a gate that made its stage longer: what follows is the list of the longer stage."""
    found = whole_run(whole, path, tmp_path)
    recipe = load_recipe(path, ["--log.tensorboard=false"])
    planned = [(event.kind, event.step) for event in timeline(recipe, Clock(recipe, {"x": 256}))]
    ended = [("average", 4), ("gates", 4)]  # the stage ended there, before it was made longer
    assert [event for event in found["done"] if event not in ended] == [e for e in planned if e != ("reweight", 4)]
    assert [event for event in found["done"] if event in ended] == ended
    assert {kind for kind, _ in found["done"]} == set(drive.HANDLERS)
    assert [row["step"] for row in found["rows"]] == list(range(1, 8))


@pytest.mark.parametrize("stop", ["train:1", "train:2", "train:4", "train:5", "train:7"])
def test_a_run_that_was_stopped_does_each_event_once(path, whole, tmp_path, stop):
    """A stop saves at once, before what is still due after the step: the next start does it."""
    found, run = whole_run(whole, path, tmp_path), tmp_path / "run"
    (before,) = on_ranks(1, handled, path, [], stop)
    state = latest_intact_checkpoint(run / "checkpoints").state
    assert (state.done, state.step) == before[-1] == ("train", int(stop[-1]))
    (after,) = on_ranks(1, handled, path, [], "")
    assert before + after == found["done"]
    assert rows(run) == found["rows"] and measured(run) == found["measured"]


def test_the_comparison_sees_an_event_that_is_done_twice(path, whole, tmp_path):
    """The twin: a position that forgets what was done after the step measures again."""
    found, run = whole_run(whole, path, tmp_path), tmp_path / "run"
    on_ranks(1, handled, path, ["--run.stop_at_step=2"], "")
    on_ranks(1, forgetful, path)
    assert measured(run) != found["measured"][: len(measured(run))]


def forgetful(path: str) -> list[tuple[str, int]]:
    from megacpt.train import start

    found = start.latest_intact_checkpoint

    def without_position(*arguments):
        checkpoint = found(*arguments)
        return replace(checkpoint, state=replace(checkpoint.state, done="train"))

    start.latest_intact_checkpoint = without_position
    return handled(path, ["--run.stop_at_step=3"], "")
