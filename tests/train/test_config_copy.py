"""A run keeps the config.json that it began with: another one is refused on a resume, and named where one rank has it."""

import json
import os
from pathlib import Path

import pytest
from ranks import on_ranks
from samples import ROPE_LLAMA3, tiny_config

from megacpt.checkpoint.export import export
from megacpt.config.load import load_recipe
from megacpt.errors import ConfigError
from megacpt.train import loop
from megacpt.train.handlers import steps

QUICK = ["--validation=[]", "--log.tensorboard=false", "--checkpoint.every_steps=2"]


def trained(path: str, flags: list[str]) -> str:
    """What the run says of its configuration, on this rank."""
    try:
        loop.train(load_recipe(path, [*QUICK, *flags]))
    except ConfigError as error:
        return str(error)
    return ""


def rows(run: Path) -> list[tuple]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in found]


@pytest.fixture
def begun(recipe_file, tmp_path):
    """(recipe, run directory, config.json) of a run that stands at step 4 of 8."""
    path, run = recipe_file(), tmp_path / "run"
    assert on_ranks(1, trained, path, ["--run.stop_at_step=4"]) == [""]
    return path, run, tmp_path / "config.json"


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"rope_theta": 500000.0}, "rope_theta = 500000.0: the run began with 10000.0."),
        ({"rms_norm_eps": 1e-2}, "rms_norm_eps = 0.01: the run began with 1e-05."),
        ({"max_position_embeddings": 128}, "max_position_embeddings = 128: the run began with 64."),
        ({"num_key_value_heads": 4}, "num_key_value_heads = 4: the run began with 2."),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True: the run began with False."),
        ({"rope_scaling": ROPE_LLAMA3}, "rope_type = llama3: the run began with default."),
        ({"eos_token_id": 3}, "eos_token_id = 3: the run began with 0."),
    ],
)
def test_another_config_is_refused_on_a_resume(begun, changes, told):
    path, run, config = begun
    config.write_text(json.dumps(tiny_config(**changes)))
    answers = on_ranks(1, trained, path, [])
    assert all(
        told in text and "Put back the config.json" in text and "another run.name" in text for text in answers
    ), answers
    assert [step for step, *_ in rows(run)] == [1, 2, 3, 4]
    config.write_text(json.dumps(tiny_config()))
    assert on_ranks(1, trained, path, []) == [""]


def test_all_differences_come_at_once_on_all_ranks(begun):
    path, _, config = begun
    config.write_text(json.dumps(tiny_config(rope_theta=777.0, rms_norm_eps=0.1)))
    first, second = on_ranks(2, trained, path, [])
    assert first == second and "rope_theta = 777.0" in first and "rms_norm_eps = 0.1" in first


@pytest.mark.parametrize(
    "changes",
    [{"initializer_range": 0.5, "torch_dtype": "bfloat16", "note": 1}, {"rope_parameters": {"rope_theta": 10000.0}}],
)
def test_what_changes_nothing_is_let_pass(begun, changes):
    """Fields that no computation reads, and the other spelling of the same embedding."""
    path, run, config = begun
    config.write_text(json.dumps(tiny_config(**changes)))
    assert on_ranks(1, trained, path, []) == [""]
    assert json.loads((run / "huggingface/config.json").read_text()) == tiny_config(), "the copy stays"


def test_a_run_without_a_copy_gets_one(begun):
    path, run, config = begun
    (run / "huggingface/config.json").unlink()
    assert on_ranks(1, trained, path, ["--run.stop_at_step=6"]) == [""]
    assert json.loads((run / "huggingface/config.json").read_text()) == tiny_config()
    config.write_text(json.dumps(tiny_config(rope_theta=5.0)))
    assert "rope_theta = 5.0" in on_ranks(1, trained, path, [])[0]


def test_a_damaged_copy_is_named(begun):
    path, run, _ = begun
    (run / "huggingface/config.json").write_text('{"vocab')
    assert "huggingface/config.json: cannot be read: it is" in on_ranks(1, trained, path, [])[0]


def test_an_export_is_of_the_config_that_was_trained(begun, tmp_path):
    _, run, config = begun
    config.write_text(json.dumps(tiny_config(rope_theta=5.0)))
    export(run, tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["rope_theta"] == 10000.0


def changed_under_it(path: str, config: str) -> str:
    """Another config.json from step 2 on; the second stage begins at step 4."""
    step, calls = steps.train_step, []

    def changing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            Path(config).write_text(json.dumps(tiny_config(rope_theta=5.0)))
        return step(*args, **kwargs)

    steps.train_step = changing
    return trained(path, [])


def test_a_config_that_changes_under_a_run_changes_nothing(recipe_file, tmp_path):
    stage = {"tokens": 1024, "seq_len": 64, "batch_tokens": 256, "mixture": {"a": 1.0}}
    lr = {"shape": "constant", "peak": 1e-3}
    path = recipe_file(stages=[stage | {"name": name, "lr": lr} for name in ("one", "two")])
    assert on_ranks(1, trained, path, [f"--run.directory={tmp_path}/whole"]) == [""]
    assert on_ranks(1, changed_under_it, path, str(tmp_path / "config.json")) == [""]
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


def on_a_node_of_its_own(path: str, nodes: str, flags: list[str]) -> str:
    os.chdir(f"{nodes}/{os.environ['RANK']}")
    return trained(path, flags)


@pytest.mark.parametrize("resume", [False, True])
def test_a_rank_with_another_config_is_named(recipe_file, tmp_path, tokenizer_dir, resume):
    """Rank 2 of three reads another node's disk; before the first step, and on a resume too."""
    path = recipe_file(model={"config": "config.json", "tokenizer": str(tokenizer_dir)})
    for rank in range(3):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "config.json").write_text(json.dumps(tiny_config()))
    if resume:
        assert on_ranks(3, on_a_node_of_its_own, path, str(tmp_path), ["--run.stop_at_step=2"]) == [""] * 3
    (tmp_path / "2/config.json").write_text(json.dumps(tiny_config(rope_theta=777.0, rms_norm_eps=0.1)))
    told = on_ranks(3, on_a_node_of_its_own, path, str(tmp_path), [])
    assert len(set(told)) == 1 and "rope_theta of config.json: rank 2 has" in told[0] and "2 problems" in told[0]
    assert not (tmp_path / "run/metrics.jsonl").exists() or len(rows(tmp_path / "run")) == 2
    (tmp_path / "2/config.json").write_text(json.dumps(tiny_config()))
    assert on_ranks(3, on_a_node_of_its_own, path, str(tmp_path), []) == [""] * 3
