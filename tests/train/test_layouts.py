"""Tensor, context and data parallelism against one process, float64: losses, norms and weights of 8 AdamW steps; checkpoints from
any of these layouts into any other."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from ranks import on_ranks
from samples import tiny_config, without_names
from tolerances import LAYOUT, difference

from megacpt.checkpoint.load import StoredModel
from megacpt.config.load import load_recipe

LAYOUTS = {  # (tensor, context, data_replicate, data_shard)
    "tp2": (2, 1, 1, 1),
    "cp2": (1, 2, 1, 1),
    "dp3": (1, 1, 1, 3),
    "cp4": (1, 4, 1, 1),
    "hsdp2x2": (1, 1, 2, 2),
    "tp2 cp2": (2, 2, 1, 1),
    "cp2 dp2": (1, 2, 1, 2),
    "tp2 cp2 hsdp2x1": (2, 2, 2, 1),
    "tp2 cp2 dp2": (2, 2, 1, 2),
    "tp4, two key heads": (4, 1, 1, 1),
}
TIED = ("tp2", "cp2 dp2")
AXES = ("tensor", "context", "data_replicate", "data_shard")


def flags_of(layout) -> list[str]:
    return [f"--parallel.{axis}={degree}" for axis, degree in zip(AXES, layout, strict=True)]


def world_size(layout) -> int:
    return math.prod(layout)


def train_here(path: str, flags: list[str], breakage: str = "") -> None:
    """Body of every rank."""
    from megacpt.train import loop

    if breakage == "replicated":
        import megacpt.model.run as run

        run.sum_replicated_gradients = lambda parameters, group: None
    if breakage == "scale":
        import megacpt.train.step as step

        original = step.accumulate
        step.accumulate = lambda m, b, n, r: original(m, b, sum(int((x.labels >= 0).sum()) for x in b), r)
    if breakage == "keys":
        import megacpt.parallel.context as context

        take = context.Gather.take
        context.Gather.take = lambda self, k, v: tuple(x.roll(1, 0) for x in take(self, k, v))
    loop.train(load_recipe(path, flags))


def losses(directory: Path) -> list[tuple[float, float]]:
    return [
        (r["loss"], r["grad_norm"]) for r in map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    ]


def weights(directory: Path, step: int = 8) -> dict[str, torch.Tensor]:
    stored = StoredModel(directory / f"checkpoints/step-{step:08d}")
    return {
        name.removeprefix("model."): stored.read(name.removeprefix("model."))
        for name in stored.metadata
        if name.startswith("model.")
    }


def worst(a: Path, b: Path) -> float:
    """The largest relative difference over losses, norms and weights."""
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys() and len(losses(a)) == len(losses(b)) == 8
    numbers = max(
        abs(x - y) / abs(y) for p, q in zip(losses(a), losses(b), strict=True) for x, y in zip(p, q, strict=True)
    )
    return max(numbers, *(difference(ours[name], theirs[name]) for name in ours))


def run_one(recipe_file, tmp_path, tied: bool):
    """A float64 run on one process; returns (recipe path, its directory, flags)."""
    path = recipe_file()
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(tie_word_embeddings=tied)))
    flags = ["--precision.compute=float64", "--parallel.micro_batch_tokens=64", "--validation=[]"]
    on_ranks(1, train_here, path, [*flags, f"--run.directory={tmp_path}/one"])
    return path, tmp_path / "one", flags


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def one(request, recipe_file, tmp_path):
    return run_one(recipe_file, tmp_path, request.param)


@pytest.fixture
def untied(recipe_file, tmp_path):
    return run_one(recipe_file, tmp_path, False)


def test_every_layout_gives_the_numbers_of_one_process(one, tmp_path):
    path, reference, flags = one
    found = {}
    tied = json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]
    for name, layout in LAYOUTS.items():
        if tied and name not in TIED:
            continue
        directory = tmp_path / name.replace(" ", "-").replace(",", "")
        on_ranks(world_size(layout), train_here, path, [*flags, *flags_of(layout), f"--run.directory={directory}"])
        found[name] = worst(directory, reference)
    assert max(found.values()) < LAYOUT, found


@pytest.mark.parametrize("breakage, layout", [("replicated", "tp2"), ("scale", "dp3"), ("keys", "cp2")])
def test_the_comparison_sees_a_broken_axis(untied, tmp_path, breakage, layout):
    path, reference, flags = untied
    layout = LAYOUTS[layout]
    on_ranks(
        world_size(layout),
        train_here,
        path,
        [*flags, *flags_of(layout), f"--run.directory={tmp_path}/broken"],
        breakage,
    )
    assert worst(tmp_path / "broken", reference) > 1e-6


def test_a_checkpoint_goes_on_under_any_other_layout(untied, tmp_path):
    """Four steps on one layout, four on the next; the first load is bit-identical, the end equals one process."""
    path, reference, flags = untied
    for first, second in (("tp2 cp2", "dp3"), ("hsdp2x2", "tp2"), ("dp3", "tp2 cp2 dp2")):
        directory = tmp_path / f"{first}-{second}".replace(" ", "_")
        common = [*flags, f"--run.directory={directory}", "--checkpoint.keep_last=9"]
        on_ranks(
            world_size(LAYOUTS[first]), train_here, path, [*common, *flags_of(LAYOUTS[first]), "--run.stop_at_step=4"]
        )
        before = weights(directory, 4)
        on_ranks(
            world_size(LAYOUTS[second]), train_here, path, [*common, *flags_of(LAYOUTS[second]), "--run.stop_at_step=4"]
        )
        after = weights(directory, 4)
        assert all(torch.equal(before[name], after[name]) for name in before)
        on_ranks(world_size(LAYOUTS[second]), train_here, path, [*common, *flags_of(LAYOUTS[second])])
        assert worst(directory, reference) < LAYOUT, (first, second)


def test_import_reads_straight_into_shards(recipe_file, tmp_path, tokenizer_dir):
    raw = without_names(tiny_config())
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**raw)).save_pretrained(tmp_path / "hf")
    transformers.AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(tmp_path / "hf")
    path = recipe_file(model={"pretrained": str(tmp_path / "hf")})
    found = []
    for i, name in enumerate(["tp2", "dp3", "hsdp2x2", "tp2 cp2 dp2"]):
        layout = LAYOUTS[name]
        flags = [
            *flags_of(layout),
            f"--run.directory={tmp_path}/{i}",
            "--run.stop_at_step=0",
            "--parallel.micro_batch_tokens=64",
            "--validation=[]",
        ]
        on_ranks(world_size(layout), train_here, path, flags)
        found.append(weights(tmp_path / str(i), 0))
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    for name, tensor in theirs.items():
        assert all(torch.equal(f[name][: len(tensor)], tensor) and not f[name][len(tensor) :].any() for f in found), (
            name
        )


def test_validation_is_the_same_on_every_layout(recipe_file, tmp_path):
    found = []
    for i, layout in enumerate([(1, 1, 1, 1), LAYOUTS["tp2 cp2"], LAYOUTS["dp3"]]):
        flags = [
            *flags_of(layout),
            f"--run.directory={tmp_path}/{i}",
            "--run.stop_at_step=0",
            "--precision.compute=float64",
        ]
        on_ranks(world_size(layout), train_here, recipe_file(), flags)
        events = map(json.loads, (tmp_path / str(i) / "events.jsonl").read_text().splitlines())
        found.append(next(event["losses"] for event in events if event["kind"] == "validation"))
    assert found[1] == pytest.approx(found[0], rel=1e-12) and found[2] == pytest.approx(found[0], rel=1e-12)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_activation_checkpointing_under_context_parallelism(untied, tmp_path, mode):
    path, reference, flags = untied
    more = [
        *flags_of(LAYOUTS["tp2 cp2"]),
        f"--parallel.activation_checkpointing={mode}",
        f"--run.directory={tmp_path}/{mode}",
    ]
    on_ranks(4, train_here, path, [*flags, *more])
    assert worst(tmp_path / mode, reference) < LAYOUT
