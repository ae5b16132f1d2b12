"""A stage of the plan says what is in force in it: its own value, else the section's, else the checkpoint's."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import tiny_config

from megacpt.config.decisions import (
    AverageDecision,
    Baseline,
    Decisions,
    Extension,
    GateDecision,
    MixtureChange,
    Skip,
    plain_decision,
)
from megacpt.config.load import plain, recipe_from
from megacpt.config.recipe import Recipe
from megacpt.config.resolve import RunPlan, resolve
from megacpt.errors import ConfigError
from megacpt.family.read import parse_config

CONFIG = parse_config(tiny_config(max_position_embeddings=64), "test")
LR = {"shape": "constant", "peak": 1e-3}


def make(stages: list[dict], lr: dict | None = None, **sections) -> Recipe:
    common = {"tokens": 1280, "seq_len": 64, "batch_tokens": 256, "mixture": {"a": 1.0}}
    own = {} if lr else {"lr": LR}
    optimizer = sections.pop("optimizer", {}) | ({"lr": lr} if lr else {})
    return Recipe.model_validate(
        {
            "run": {"name": "t"},
            "model": {"config": "c", "tokenizer": "t"},
            "data": {"a": {"paths": ["p"]}},
            "optimizer": optimizer,
            "stages": [common | own | {"name": f"s{i}"} | stage for i, stage in enumerate(stages)],
        }
        | sections
    )


OWN = st.fixed_dictionaries(
    {},
    optional={
        "betas": st.sampled_from([[0.8, 0.9], [0.9, 0.99]]),
        "weight_decay": st.sampled_from([0.0, 0.3]),
        "clip_norm": st.sampled_from([0.5, 2.0]),
        "freeze": st.sampled_from([["model.norm.weight"], ["model.layers.*"]]),
        "seq_len": st.sampled_from([32, 128]),
        "parallel": st.fixed_dictionaries(
            {}, optional={"tensor": st.sampled_from([1, 2]), "activation_checkpointing": st.just("full")}
        ),
    },
)


@given(st.lists(OWN, min_size=1, max_size=3), st.booleans())
def test_a_value_of_a_stage_stands_over_that_of_its_section(stages, over_run):
    optimizer, parallel = {"betas": [0.7, 0.8], "weight_decay": 0.2, "clip_norm": 3.0}, {"context": 2}
    recipe = make(stages, LR if over_run else None, optimizer=optimizer, parallel=parallel)
    plan = resolve(recipe, CONFIG, 8)
    for own, stage in zip(stages, plan.stages, strict=True):
        assert stage.betas == tuple(own.get("betas", optimizer["betas"]))
        assert stage.weight_decay == own.get("weight_decay", 0.2) and stage.clip_norm == own.get("clip_norm", 3.0)
        assert stage.parallel.tensor == own.get("parallel", {}).get("tensor", 1) and stage.parallel.context == 2
        assert stage.micro_batch_tokens == stage.seq_len and stage.schedule.over_run == over_run
        names = [name for name in CONFIG.shapes() if name not in stage.frozen]
        assert stage.trainable.names == set(names) and (len(stage.frozen) > 0) == bool(own.get("freeze"))
        assert stage.longest == max(each.seq_len for each in plan.stages[: stage.index + 1])
        assert stage.layout(8).data_shard == 4 // stage.parallel.tensor


def test_a_change_of_the_rotary_embedding_holds_on_and_a_rule_starts_from_the_checkpoint():
    rule = {"rule": "ntk"}
    stages = [{}, {"rope": {"theta": 5e4}}, {}, {"seq_len": 128, "batch_tokens": 256, "rope": rule}]
    plan = resolve(make(stages, model={"config": "c", "tokenizer": "t", "rope": {"theta": 2e4}}), CONFIG, 1)
    thetas = [stage.model.rope.theta for stage in plan.stages]
    assert thetas[:3] == [2e4, 5e4, 5e4] and thetas[3] == pytest.approx(2e4 * 2 ** (8 / 6))
    assert plan.base.rope.theta == 1e4 and plan.model.rope.theta == 2e4


def test_all_problems_of_all_stages_come_at_once():
    recipe = make([{"freeze": ["nothing"]}, {"freeze": ["model.*", "lm_head.weight"]}, {"rope": {"type": "yarn"}}])
    with pytest.raises(ConfigError) as error:
        resolve(recipe, CONFIG, 1)
    told = str(error.value)
    assert "no parameter fits 'nothing'" in told and "nothing would be trained" in told and "factor" in told


@given(st.lists(OWN, min_size=1, max_size=3))
def test_the_digest_is_that_of_what_is_written(stages):
    """A plan that is read again is the same one; anything that differs is another."""
    recipe = make(stages)
    plan = resolve(recipe, CONFIG, 4, {"tokenizer.json": "a" * 64}, {"model.safetensors": "b" * 64})
    stored = json.loads(json.dumps(plan.plain))
    again = resolve(
        recipe_from(stored["recipe"], "t"), parse_config(stored["config"], "t"), 4, stored["files"], stored["weights"]
    )
    assert again.digest == plan.digest and again.stages == plan.stages
    others: list[RunPlan] = [
        resolve(recipe, CONFIG, 8, plan.files, plan.weights),
        resolve(recipe, CONFIG, 4, {"tokenizer.json": "c" * 64}, plan.weights),
        resolve(recipe, CONFIG, 4, plan.files, {}),
        resolve(make([*stages, {}]), CONFIG, 4, plan.files, plan.weights),
        resolve(recipe, replace(CONFIG, raw=CONFIG.raw | {"rms_norm_eps": 1e-4}), 4, plan.files, plan.weights),
    ]
    assert len({plan.digest, *(other.digest for other in others)}) == 6


@given(st.lists(OWN, min_size=1, max_size=2))
def test_a_recipe_that_is_written_and_read_is_the_same_text(stages):
    """Also of defaults: 1800 for a number of seconds is 1800.0 when it is read."""
    content = plain(make(stages))
    assert json.dumps(plain(recipe_from(content, "t"))) == json.dumps(content)


NUMBERS = st.none() | st.floats(-10, 10)
ENTRIES = st.one_of(
    st.builds(Baseline, losses=st.dictionaries(st.text(max_size=3), NUMBERS, max_size=2), accuracies=st.just({})),
    st.builds(
        MixtureChange,
        stage=st.sampled_from("xy"),
        sequence=st.integers(0, 99),
        losses=st.just({"a": (1.5, 0.25)}),
        weights=st.sampled_from([{}, {"a": 0.25, "b": 0.75}]),
    ),
    st.builds(Extension, stage=st.sampled_from("xy"), step=st.integers(0, 9), by_tokens=st.integers(1, 999)),
    st.builds(
        GateDecision,
        stage=st.sampled_from("xy"),
        step=st.integers(0, 9),
        passed=st.booleans(),
        action=st.sampled_from(["pass", "warn", "extend", "stop"]),
        results=st.just([{"gate": "g", "numbers": {"recall": 0.5}}]),
    ),
    st.builds(
        AverageDecision,
        stage=st.sampled_from("xy"),
        step=st.integers(0, 9),
        steps=st.just([1, 2]),
        losses=st.just({"last": {"a": 1.0}, "average": {"a": None}}),
        better=st.just("last"),
    ),
    st.builds(
        Skip,
        stage=st.sampled_from("xy"),
        step=st.integers(0, 9),
        to_step=st.integers(0, 9),
        sequence=st.integers(0, 99),
        count=st.integers(1, 9),
        why=st.just("spike"),
    ),
)


@given(st.lists(ENTRIES, max_size=8))
def test_decisions_are_what_a_checkpoint_holds_of_them(entries):
    decisions = Decisions(tuple(entries))
    assert Decisions.parse(json.loads(json.dumps(decisions.plain()))) == decisions
    for name in "xy":
        assert decisions.extension(name) == sum(
            e.by_tokens for e in entries if isinstance(e, Extension) and e.stage == name
        )
        skips = [(e.sequence, e.count) for e in entries if isinstance(e, Skip) and e.stage == name]
        assert decisions.skips(name) == skips
        for step in range(10):
            asked = [e for e in entries if isinstance(e, GateDecision) and (e.stage, e.step) == (name, step)]
            assert decisions.settled(name, step) == any(e.action != "stop" for e in asked)


def test_decisions_of_early_versions_are_read_as_they_stand():
    """An early skip does not say from where to where the run went; what is written back does not say it either."""
    raw = [
        {"kind": "skip", "stage": "s", "sequence": 4, "count": 8, "why": "spike"},
        {"kind": "mixture", "stage": "s", "sequence": 8, "losses": {"a": [2.5, 0.125]}, "weights": {}},
    ]
    assert Decisions.parse(raw).plain() == raw
    assert plain_decision(Extension(stage="s", step=1, by_tokens=2))["kind"] == "extend"


@pytest.mark.parametrize(
    "raw",
    [
        [{"kind": "dance"}],
        [{"stage": "s"}],
        [{"kind": "extend", "stage": "s", "step": 1}],
        [{"kind": "extend", "stage": "s", "step": 1, "by_tokens": "many"}],
        [{"kind": "extend", "stage": "s", "step": 1, "by_tokens": 2, "why": "x"}],
        {"kind": "extend"},
    ],
)
def test_what_is_no_decision_is_refused(raw):
    with pytest.raises(ValueError):
        Decisions.parse(raw)
