"""Tensor and data parallelism against one process, float64: losses, norms and weights of 8 AdamW steps; checkpoints from
any of these layouts into any other."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from ranks import on_ranks
from samples import tiny_config
from tolerances import LAYOUT, difference

from megacpt.checkpoint.load import StoredModel
from megacpt.config.load import load_recipe

LAYOUTS = {  # (tensor, data_replicate, data_shard)
    "tp2": (2, 1, 1),
    "dp2": (1, 1, 2),
    "dp3": (1, 1, 3),
    "hsdp2x2": (1, 2, 2),
    "tp2 dp2": (2, 1, 2),
    "tp2 hsdp2x2": (2, 2, 2),
}


def flags_of(layout) -> list[str]:
    return [
        f"--parallel.tensor={layout[0]}",
        f"--parallel.data_replicate={layout[1]}",
        f"--parallel.data_shard={layout[2]}",
    ]


def world_size(layout) -> int:
    return layout[0] * layout[1] * layout[2]


def train_here(path: str, flags: list[str], breakage: str = "") -> None:
    """Body of every rank."""
    from megacpt.train import loop

    if breakage == "replicated":
        import megacpt.train.step as step

        step.sum_replicated_gradients = lambda parameters, group: None
    if breakage == "scale":
        import megacpt.train.step as step

        original = step.forward_backward
        step.forward_backward = lambda m, b, n, r: original(m, b, sum(int((x.labels >= 0).sum()) for x in b), r)
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


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def one(request, recipe_file, tmp_path):
    """A float64 run on one process; returns (recipe path, its directory, flags)."""
    config = tmp_path / "config.json"
    path = recipe_file()
    config.write_text(json.dumps(tiny_config(tie_word_embeddings=request.param)))
    flags = ["--precision.compute=float64", "--parallel.micro_batch_tokens=64"]
    on_ranks(1, train_here, path, [*flags, f"--run.directory={tmp_path}/one"])
    return path, tmp_path / "one", flags


def test_every_layout_gives_the_numbers_of_one_process(one, tmp_path):
    path, reference, flags = one
    found = {}
    for name, layout in LAYOUTS.items():
        directory = tmp_path / name.replace(" ", "-")
        on_ranks(world_size(layout), train_here, path, [*flags, *flags_of(layout), f"--run.directory={directory}"])
        found[name] = worst(directory, reference)
    assert max(found.values()) < LAYOUT, found


@pytest.mark.parametrize("breakage, layout", [("replicated", "tp2"), ("scale", "dp2")])
def test_the_comparison_sees_a_broken_axis(one, tmp_path, breakage, layout):
    path, reference, flags = one
    on_ranks(2, train_here, path, [*flags, *flags_of(LAYOUTS[layout]), f"--run.directory={tmp_path}/broken"], breakage)
    assert worst(tmp_path / "broken", reference) > 1e-6


def test_a_checkpoint_goes_on_under_any_other_layout(one, tmp_path):
    """Four steps on one layout, four on the next; the first load is bit-identical, the end equals one process."""
    path, reference, flags = one
    for first, second in (("tp2 dp2", "dp3"), ("hsdp2x2", "tp2"), ("dp3", "tp2 hsdp2x2")):
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
    raw = {k: v for k, v in tiny_config().items() if k not in ("architectures", "model_type", "torch_dtype")}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**raw)).save_pretrained(tmp_path / "hf")
    transformers.AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(tmp_path / "hf")
    path = recipe_file(model={"pretrained": str(tmp_path / "hf")})
    found = []
    for i, layout in enumerate([(1, 1, 1), *LAYOUTS.values()]):
        flags = [
            *flags_of(layout),
            f"--run.directory={tmp_path}/{i}",
            "--run.stop_at_step=0",
            "--parallel.micro_batch_tokens=64",
        ]
        on_ranks(world_size(layout), train_here, path, flags)
        found.append(weights(tmp_path / str(i), 0))
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    for name, tensor in theirs.items():
        assert all(torch.equal(f[name][: len(tensor)], tensor) and not f[name][len(tensor) :].any() for f in found), (
            name
        )
