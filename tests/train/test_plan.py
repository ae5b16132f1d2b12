"""A run is resolved once: what it was resolved to stands in its directory before the first step, and nothing else is read afterwards."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from ranks import on_ranks

from megacpt import cli
from megacpt.checkpoint.export import export
from megacpt.checkpoint.manifest import read_manifest
from megacpt.config.load import load_recipe
from megacpt.config.plan_file import load_plan, read_plan
from megacpt.errors import CheckpointError, ConfigError
from megacpt.files import sealed, unsealed
from megacpt.train import loop
from megacpt.train.handlers import steps

QUICK = ["--validation=[]", "--log.tensorboard=false", "--checkpoint.every_steps=2"]
LR = {"shape": "constant", "peak": 1e-3}


def trained(path: str, flags: list[str]) -> str:
    """What the run says of its configuration, on this rank."""
    try:
        loop.train(load_recipe(path, [*QUICK, *flags]))
    except (ConfigError, CheckpointError) as error:
        return str(error)
    return ""


def rows(run: Path) -> list[tuple]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["stage"], row["loss"], row["grad_norm"], row["lr"]) for row in found]


def shards(run: Path, step: int) -> bytes:
    return b"".join(path.read_bytes() for path in sorted((run / f"checkpoints/step-{step:08d}").glob("*.distcp")))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def exported(tmp_path_factory, prepared, tokenizer_dir) -> Path:
    """A small model as a Hugging Face directory."""
    from samples import write_recipe

    folder = tmp_path_factory.mktemp("exported")
    path = write_recipe(folder, prepared, tokenizer_dir)
    assert on_ranks(1, trained, path, ["--run.stop_at_step=0"]) == [""]
    export(folder / "run", folder / "model")
    return folder / "model"


@pytest.fixture
def base(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "base"))


@pytest.fixture
def pretrained(recipe_file, base) -> str:
    """A recipe of two stages that continues from `base`; the second begins at step 4 and asks for its tokenizer."""
    stage = {"tokens": 1024, "seq_len": 64, "batch_tokens": 256, "mixture": {"a": 1.0}, "lr": LR}
    gate = {"kind": "needle", "haystack": "a", "lengths": [64], "depths": 2, "inserted": 1, "asked": 1, "minimum": 0.0}
    stages = [stage | {"name": "one"}, stage | {"name": "two", "gates": ["needle"]}]
    return recipe_file(stages=stages, gates={"needle": gate}, model={"pretrained": str(base)})


class Stopped(Exception):
    pass


def before_the_first_step(path: str, run: str) -> list[str]:
    """Files of the run directory when the first step begins."""

    def stop(*_):
        raise Stopped

    steps.train_step = stop
    with pytest.raises(Stopped):
        loop.train(load_recipe(path, QUICK))
    return sorted(str(file.relative_to(run)) for file in Path(run).rglob("*") if file.is_file())


def test_the_plan_and_the_base_are_there_before_the_first_step(pretrained, base, tmp_path):
    (files,) = on_ranks(1, before_the_first_step, pretrained, str(tmp_path / "run"))
    wanted = ["config.json", "dtypes.json", "tokenizer.json", "tokenizer_config.json"]
    assert {"plan.json", "recipe.toml", "run.json", *(f"huggingface/{name}" for name in wanted)} <= set(files)
    assert not any("checkpoints" in name for name in files)
    content = read_plan(tmp_path / "run")
    assert content["weights"] == {"model.safetensors": sha256(base / "model.safetensors")}
    assert content["files"]["tokenizer.json"] == sha256(base / "tokenizer.json")
    assert content["config"] == json.loads((base / "config.json").read_text())
    assert [stage["name"] for stage in content["stages"]] == ["one", "two"]
    plan = load_plan(tmp_path / "run")
    assert plan.digest == content["digest"] and plan.recipe == load_recipe(pretrained, QUICK)


def vanished(path: str, base: str) -> str:
    """The base directory is gone from step 2 on."""
    step, calls = steps.train_step, []

    def removing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            shutil.rmtree(base)
        return step(*args, **kwargs)

    steps.train_step = removing
    return trained(path, ["--run.stop_at_step=6"])


def test_the_base_may_vanish_after_the_start(pretrained, base, tmp_path):
    """Stages, gates, a resume, checks and exports go by what the run has kept."""
    assert on_ranks(1, trained, pretrained, [f"--run.directory={tmp_path}/whole"]) == [""]
    assert on_ranks(1, vanished, pretrained, str(base)) == [""] and not base.exists()
    assert on_ranks(1, trained, pretrained, []) == [""]
    assert rows(tmp_path / "run") == rows(tmp_path / "whole") and len(rows(tmp_path / "run")) == 8
    assert shards(tmp_path / "run", 8) == shards(tmp_path / "whole", 8)
    export(tmp_path / "run", tmp_path / "out")
    export(tmp_path / "whole", tmp_path / "other")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def by_command(words: list[str]) -> int:
    try:
        return cli.run(words)
    except SystemExit as error:
        return int(error.code or 0)


def test_verbs_go_by_what_the_run_has_kept(pretrained, base, begun, tmp_path):
    """The command line too, which checks the recipe first."""
    shutil.rmtree(base)
    for words in (["check", pretrained], ["inspect", pretrained, "--step", "5"], ["train", pretrained, *QUICK]):
        assert on_ranks(1, by_command, words) == [0], words
    assert [row[0] for row in rows(begun)] == list(range(1, 9))
    assert on_ranks(1, by_command, ["evaluate", str(begun), pretrained, "--dtype", "float32"]) == [0]


def test_a_new_run_without_its_base_is_a_problem(pretrained, base, capfd):
    """The twin: nothing has been kept of it."""
    shutil.rmtree(base)
    with pytest.raises(AssertionError, match="no such file"):
        on_ranks(1, by_command, ["train", pretrained, *QUICK])


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.fixture
def begun(pretrained, tmp_path) -> Path:
    """The run directory of `pretrained` at step 4 of 8."""
    assert on_ranks(1, trained, pretrained, ["--run.stop_at_step=4"]) == [""]
    return tmp_path / "run"


def test_another_tokenizer_is_refused_on_a_resume(pretrained, base, begun):
    config = base / "tokenizer_config.json"
    was, own = sha256(config), config.read_text()
    config.write_text(json.dumps(json.loads(own) | {"eos_token": "</s>"}))
    now = sha256(config)
    (told,) = on_ranks(1, trained, pretrained, [])
    assert f"tokenizer_config.json of the tokenizer: its SHA-256 is {now[:12]}, the run began with {was[:12]}." in told
    config.unlink()
    (told,) = on_ranks(1, trained, pretrained, [])
    assert f"its SHA-256 is nothing, the run began with {was[:12]}." in told
    config.write_text(own)
    (base / "chat_template.jinja").write_text("{{ messages }}")
    assert on_ranks(1, trained, pretrained, []) == [""], "a template of conversations changes nothing that is trained"


def test_other_weights_are_refused_where_they_are_needed_again(pretrained, base, begun, tmp_path):
    was = sha256(base / "model.safetensors")
    damage(base / "model.safetensors")
    assert on_ranks(1, trained, pretrained, ["--run.stop_at_step=6"]) == [""], "a checkpoint holds them"
    shutil.rmtree(begun / "checkpoints")
    (told,) = on_ranks(1, trained, pretrained, [])
    now = sha256(base / "model.safetensors")
    assert f"model.safetensors of the weights: its SHA-256 is {now[:12]}, the run began with {was[:12]}." in told
    damage(base / "model.safetensors")
    assert on_ranks(1, trained, pretrained, []) == [""]


def test_a_run_that_trained_nothing_may_begin_with_another_base(pretrained, base, tmp_path):
    on_ranks(1, before_the_first_step, pretrained, str(tmp_path / "run"))
    damage(base / "model.safetensors")
    assert on_ranks(1, trained, pretrained, []) == [""]
    assert read_plan(tmp_path / "run")["weights"]["model.safetensors"] == sha256(base / "model.safetensors")


def on_a_node_of_its_own(path: str, nodes: str, flags: list[str]) -> str:
    os.chdir(f"{nodes}/{os.environ['RANK']}")
    os.environ["LOCAL_RANK"] = "0"
    return trained(path, flags)


@pytest.mark.parametrize(
    "name, told",
    [
        ("tokenizer.json", "tokenizer.json: rank 1 has"),
        ("model.safetensors", "weights of the base model: rank 1 has"),
    ],
)
def test_a_rank_with_another_file_is_named_before_the_first_step(recipe_file, base, tmp_path, name, told):
    """Rank 1 of three reads another node's disk; each is the first rank of its node."""
    path = recipe_file(model={"pretrained": "base"})
    for rank in range(3):
        shutil.copytree(base, tmp_path / str(rank) / "base")
    file = tmp_path / "1/base" / name
    if name == "tokenizer.json":
        file.write_text(file.read_text() + "\n")
    else:
        damage(file)
    answers = on_ranks(3, on_a_node_of_its_own, path, str(tmp_path), [])
    assert len(set(answers)) == 1 and told in answers[0], answers
    assert not (tmp_path / "run/metrics.jsonl").exists()
    shutil.copy(base / name, file)
    assert on_ranks(3, on_a_node_of_its_own, path, str(tmp_path), ["--run.stop_at_step=2"]) == [""] * 3


def test_what_is_written_says_the_layout_that_is_in_force(recipe_file, tmp_path):
    stage = {"tokens": 512, "seq_len": 64, "batch_tokens": 256, "mixture": {"a": 1.0}, "lr": LR}
    path = recipe_file(
        stages=[stage | {"name": "x", "parallel": {"tensor": 2}}, stage | {"name": "y", "parallel": {"pipeline": 2}}]
    )
    assert on_ranks(2, trained, path, ["--parallel.micro_batch_tokens=64"]) == ["", ""]
    run = tmp_path / "run"
    first, last = (read_manifest(run / f"checkpoints/step-0000000{step}").facts["layout"] for step in (2, 4))
    assert json.loads((run / "run.json").read_text())["layout"] == last
    assert "tensor 2" in first and "pipeline 2" in last and "tensor 1" in last


def as_of_an_early_version(run: Path) -> None:
    """Without the plan, and checkpoints that do not say which event is done."""
    (run / "plan.json").unlink()
    for path in run.glob("checkpoints/*/manifest.json"):
        content = unsealed(json.loads(path.read_text()))
        del content["state"]["done"]
        path.write_text(sealed(content))


@pytest.mark.parametrize("stop", [0, 2, 4, 8])
def test_a_run_of_an_early_version_goes_on_to_the_bit(pretrained, tmp_path, stop):
    """At its start, inside a stage, between two stages, and at its end with a gate."""
    assert on_ranks(1, trained, pretrained, [f"--run.directory={tmp_path}/whole"]) == [""]
    assert on_ranks(1, trained, pretrained, [f"--run.stop_at_step={stop}"]) == [""]
    run = tmp_path / "run"
    as_of_an_early_version(run)
    assert load_plan(run).stage("two").seq_len == 64
    assert on_ranks(1, trained, pretrained, []) == [""]
    assert rows(run) == rows(tmp_path / "whole") and shards(run, 8) == shards(tmp_path / "whole", 8)
    assert read_plan(run)["digest"]
    kinds = [json.loads(line)["kind"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert kinds.count("gates") == 1 and kinds.count("baseline") == 0


def test_a_damaged_plan_is_named(pretrained, begun):
    (begun / "plan.json").write_text('{"format": 1}')
    (told,) = on_ranks(1, trained, pretrained, [])
    assert "plan.json: is damaged" in told and "Remove it" in told
    (begun / "plan.json").unlink()
    assert on_ranks(1, trained, pretrained, []) == [""]
