"""The order in which a recipe's keys are written has no effect on the rows; a run of a version in which it had keeps its rows."""

import json
import tomllib

import numpy as np
import pytest
from layout_runs import flags_of

from megacpt.cli import run
from megacpt.config import load
from megacpt.config.load import load_recipe
from megacpt.train import loop

FLAGS = ["--log.tensorboard=false", "--validation=[]"]
NAMES = ("c", "a", "b")
WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}


@pytest.fixture
def recipe_with(recipe_file, prepared):
    """A recipe with the domains of [data] and of the mixture in some order."""

    def make(data, mixture) -> str:
        paths = {"a": "a", "b": "b", "c": "b"}
        lr = {"shape": "constant", "peak": 1e-3}
        stage = {"name": "s", "tokens": 2048, "seq_len": 64, "batch_tokens": 256, "lr": lr}
        return recipe_file(
            data={name: {"paths": [str(prepared / paths[name])]} for name in data},
            stages=[stage | {"mixture": {name: WEIGHTS[name] for name in mixture}}],
        )

    return make


def inspected(path: str, output, step: int = 4, flags=()) -> np.ndarray:
    run(["inspect", path, "--step", str(step), "--output", str(output), *FLAGS, *flags])
    return np.load(output)["tokens"]


def losses(directory) -> list[float]:
    return [json.loads(line)["loss"] for line in (directory / "metrics.jsonl").read_text().splitlines()]


def as_written(monkeypatch) -> None:
    """As versions did that took the order of the recipe."""
    monkeypatch.setattr(load, "_with_order_of_run", lambda recipe, path: recipe)


def test_rows_do_not_depend_on_the_order_of_keys(recipe_with, tmp_path):
    rows = [
        inspected(recipe_with(data, mixture), tmp_path / "x.npz")
        for data, mixture in (("abc", "abc"), ("cba", "abc"), ("abc", "bca"), (NAMES, NAMES))
    ]
    assert all(np.array_equal(rows[0], other) for other in rows[1:])


def test_the_comparison_sees_an_order_that_counts(recipe_with, tmp_path, monkeypatch):
    """The twin: with the keys as they are written, the rows are others."""
    as_written(monkeypatch)
    one, other = (inspected(recipe_with("abc", mixture), tmp_path / "x.npz") for mixture in ("abc", "bca"))
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("resumed_with", ["abc", "cab", "bca"])
def test_a_run_goes_on_with_the_rows_it_began_with(recipe_with, tmp_path, resumed_with):
    """Stopped, and resumed and inspected with the keys in another order."""
    whole = [*FLAGS, f"--run.directory={tmp_path / 'whole'}", *flags_of("dp1")]
    loop.train(load_recipe(recipe_with("abc", "abc"), whole))
    parts = [*FLAGS, f"--run.directory={tmp_path / 'parts'}", *flags_of("dp1")]
    loop.train(load_recipe(recipe_with("cba", "cba"), [*parts, "--run.stop_at_step=4"]))
    path = recipe_with(resumed_with, resumed_with)
    seen = inspected(path, tmp_path / "x.npz", 6, [f"--run.directory={tmp_path / 'parts'}"])
    assert np.array_equal(seen, inspected(path, tmp_path / "x.npz", 6, [f"--run.directory={tmp_path / 'whole'}"]))
    loop.train(load_recipe(path, parts))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


@pytest.mark.parametrize("resumed_with", ["abc", "cab"])
def test_a_run_of_a_version_in_which_the_order_counted_keeps_its_rows(recipe_with, tmp_path, monkeypatch, resumed_with):
    written = recipe_with("cab", "cab")
    with monkeypatch.context() as old:
        as_written(old)
        flags = [*FLAGS, *flags_of("dp1")]
        loop.train(load_recipe(written, [*flags, f"--run.directory={tmp_path / 'whole'}"]))
        rows = inspected(written, tmp_path / "x.npz", 6, [f"--run.directory={tmp_path / 'whole'}"])
        parts = [*flags, f"--run.directory={tmp_path / 'parts'}"]
        loop.train(load_recipe(written, [*parts, "--run.stop_at_step=4"]))
    assert list(tomllib.loads((tmp_path / "parts/recipe.toml").read_text())["stages"][0]["mixture"]) == ["c", "a", "b"]
    path = recipe_with(resumed_with, resumed_with)
    seen = inspected(path, tmp_path / "x.npz", 6, [f"--run.directory={tmp_path / 'parts'}"])
    assert np.array_equal(seen, rows)
    assert not np.array_equal(seen, inspected(path, tmp_path / "x.npz", 6, [f"--run.directory={tmp_path / 'new'}"]))
    loop.train(load_recipe(path, parts))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    (tmp_path / "parts").rename(tmp_path / "moved")
    assert np.array_equal(inspected(str(tmp_path / "moved/recipe.toml"), tmp_path / "x.npz", 6), rows)
