"""The annealing assessment: what it runs, and the table it prints."""

import json

import pytest

from megacpt.cli import run
from megacpt.config.load import load_recipe
from megacpt.errors import ConfigError
from megacpt.plan.assess import Trial, table, trials_of


@pytest.fixture
def recipe(recipe_file, tmp_path, prepared, tokenizer_dir):
    """Starts from an export; a is the default mix, b the candidate."""
    from megacpt.checkpoint.export import export
    from megacpt.train import loop

    lr = {"shape": "constant", "peak": 1e-2}
    stage = {"name": "s", "tokens": 1024, "seq_len": 64, "batch_tokens": 256, "mixture": {"a": 2.0}, "lr": lr}
    loop.train(load_recipe(recipe_file(stages=[stage]), ["--log.tensorboard=false", "--validation=[]"]))
    export(tmp_path / "run", tmp_path / "base")
    return recipe_file(
        stages=[stage], model={"pretrained": str(tmp_path / "base")}, log={"tensorboard": False, "peak_tflops": 1.0}
    )


def test_a_candidate_is_annealed_beside_the_default_mix(recipe, tmp_path, capsys):
    command = ["assess", recipe, "--candidates", "b", "--tokens", "1024", "--directory", str(tmp_path / "trials")]
    run(command)
    out = capsys.readouterr().out
    assert "| domain | before | after default | after b | b - default |" in out and "b: better in" in out
    for name, mixture in (("default", {"a": 1.0}), ("b", {"a": 0.7, "b": 0.3})):
        trial = load_recipe(str(tmp_path / "trials" / f"{name}.toml"))
        assert trial.stages[0].mixture == pytest.approx(mixture)
        rows = [json.loads(line) for line in (tmp_path / "trials" / name / "metrics.jsonl").read_text().splitlines()]
        assert [row["lr"] for row in rows] == pytest.approx([7.5e-3, 5e-3, 2.5e-3, 0.0])
        assert rows[-1]["domain_tokens"]["b"] == (320 if name == "b" else 0)

    def attempts():
        return json.loads((tmp_path / "trials/b/run.json").read_text())["attempt"]

    before = attempts()
    run(command)
    assert attempts() == before and capsys.readouterr().out == out


def test_candidates_that_cannot_be_are_named(recipe, tmp_path):
    loaded = load_recipe(recipe)
    with pytest.raises(ConfigError, match="c: no such domain[\\s\\S]*a: is in the mixture of stage s already"):
        trials_of(loaded, ["c", "a"], 0.3, 1024, tmp_path)
    with pytest.raises(ConfigError, match=r"has no \[\[validation\]\]"):
        trials_of(load_recipe(recipe, ["--validation=[]"]), ["b"], 0.3, 1024, tmp_path)


def test_the_verdict_follows_the_numbers():
    before = {"x": 3.0, "y": 2.0}
    trials = [
        Trial("default", before, {"x": 2.5, "y": 1.9}),
        Trial("new", before, {"x": 2.4, "y": 1.95}),
        Trial("bad", before, {"x": 2.6, "y": 2.0}),
    ]
    lines = table(trials)
    assert lines[2] == "| x | 3.0000 | 2.5000 | 2.4000 | 2.6000 | -0.1000 | +0.1000 |"
    assert lines[-2] == "new: better in 1 of 2 domains, mean difference -0.0250: helps on these losses"
    assert lines[-1].startswith("bad: better in 0 of 2 domains") and "does not help" in lines[-1]
