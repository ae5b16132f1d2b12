"""Runs of a tiny recipe under any layout, and how far one lies from another."""

import json
from pathlib import Path
from typing import Any

import torch
from ranks import on_ranks
from samples import family_config
from shared import made_once
from tolerances import difference

from megacpt.config.load import load_recipe
from megacpt.family.families import FAMILIES

AXES = {
    "tp": "tensor",
    "cp": "context",
    "pp": "pipeline",
    "v": "virtual_stages",
    "dp": "data_shard",
    "hsdp": "data_replicate",
}
STEPS = 8
ROWS = ["--parallel.micro_batch_tokens=64", "--stages.s.batch_tokens=320", "--stages.s.tokens=2560"]
"""5 micro-batches a step on one data rank, 3 on two, 2 on four: more, as many and fewer than stages."""


def flags_of(layout: str) -> list[str]:
    """ "tp2 pp2 v2 hsdp2 dp2 zb-v" as flags. What is no axis and no number is a schedule or a flag of [parallel]."""
    flags = []
    for word in layout.split():
        axis = word.rstrip("0123456789")
        if "." in word:
            flags.append(f"--{word}")
        elif "=" in word:
            flags.append(f"--parallel.{word}")
        elif axis in AXES:
            flags.append(f"--parallel.{AXES[axis]}={word[len(axis) :]}")
        else:
            flags.append(f"--parallel.schedule={word}")
    return flags


def world_size(layout: str) -> int:
    size = 1
    for word in layout.split():
        axis = word.rstrip("0123456789")
        if axis in AXES and axis != "v":
            size *= int(word[len(axis) :])
    return size


def body(path: str, flags: list[str], breakage: str = "") -> dict[str, Any]:
    """On every rank: trains, and returns its shards of the first and last gradients and of the last weights."""
    import breakages
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    from megacpt.optim.adamw import AdamW
    from megacpt.train import loop, saving

    if breakage:
        getattr(breakages, breakage)()
        saving.check_replicas = lambda *_: None  # it would see some of them itself, and end the run
    found: dict[str, Any] = {"first": {}, "last": {}, "weights": {}}
    step = AdamW.step

    def shards(tensors) -> dict[str, tuple]:
        out = {}
        for name, tensor in tensors.items():
            _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
            out[name] = offset, tensor._local_tensor.detach().clone()
        return out

    def recorded(self, *args, **kwargs) -> None:
        if self.num_updates in (0, STEPS - 1):
            grads = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
            found["last" if self.num_updates else "first"] = shards(grads)
        step(self, *args, **kwargs)
        if self.num_updates == STEPS:
            found["weights"] = shards(self.parameters)

    AdamW.step = recorded
    recipe = load_recipe(path, flags)
    loop.train(recipe)
    lines = (Path(recipe.directory) / "metrics.jsonl").read_text().splitlines()
    found["numbers"] = [(row["loss"], row["grad_norm"]) for row in map(json.loads, lines)]
    return found


def train(path: str, flags: list[str], layout: str, directory: Path, breakage: str = "") -> list[dict[str, Any]]:
    axes = {word.rstrip("0123456789") for word in layout.split()}
    two_rows = axes & {"tp", "cp"} and not axes & {
        "pp",
        "v",
    }  # its cost is its collectives; 3 micro-batches, the last half filled
    common = [
        "--validation=[]",
        "--log.tensorboard=false",
        "--precision.compute=float64",
        f"--run.directory={directory}",
    ]
    flags = [*flags, "--parallel.micro_batch_tokens=128"] if two_rows else flags
    return on_ranks(world_size(layout), body, path, [*common, *flags, *flags_of(layout)], breakage)


class Trained:
    """What runs of a model under a layout found, each trained once a session, in whichever process needs it first.

    Args:
        folder: for their directories, the same for all processes. path: of the recipe.
    """

    def __init__(self, folder: Path, path: str):
        self.folder, self.path = folder, path
        self._found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}

    def __call__(self, kind: str, layout: str, breakage: str = "") -> list[dict[str, Any]]:
        """By rank. `kind` is tied or untied, of two layers or with "six", of a family or Llama."""
        key = kind, layout, breakage
        if key not in self._found:
            directory = self.directory(*key)
            self._found[key] = made_once(
                directory.name, lambda: train(self.path, self.flags(kind), layout, directory, breakage)
            )
        return self._found[key]

    def one(self, kind: str) -> dict[str, Any]:
        """What one process found."""
        return self(kind, "dp1")[0]

    def directory(self, kind: str, layout: str = "dp1", breakage: str = "") -> Path:
        return self.folder / "-".join(filter(None, (kind, layout, breakage))).replace(" ", "_")

    def flags(self, kind: str) -> list[str]:
        config = self.folder / f"{kind}.json"
        layers, family = 6 if "six" in kind else 2, next((name for name in FAMILIES if name in kind), "llama")
        raw = family_config(family, num_hidden_layers=layers, tie_word_embeddings="untied" not in kind)
        made_once(config.name, lambda: config.write_text(json.dumps(raw)))
        return [*ROWS, f"--model.config={config}"]


def worst(ranks: list[dict[str, Any]], one: dict[str, Any]) -> dict[str, float]:
    """The largest relative difference from one process of losses and norms, of gradients and of weights."""
    numbers = ranks[0]["numbers"]
    assert len(numbers) == len(one["numbers"]) == STEPS
    pairs = [(x, y) for a, b in zip(numbers, one["numbers"], strict=True) for x, y in zip(a, b, strict=True)]
    found = {"loss and norm": max(abs(x - y) / abs(y) for x, y in pairs), "gradients": 0.0, "weights": 0.0}
    for kind, row in (("first", "gradients"), ("last", "gradients"), ("weights", "weights")):
        assert {name for rank in ranks for name in rank[kind]} == one[kind].keys(), "not all tensors are there"
        for name, (_, whole) in one[kind].items():
            covered = torch.zeros(whole.shape, dtype=torch.bool)
            for rank in ranks:
                if name in rank[kind] and rank[kind][name][1].numel():
                    offset, part = rank[kind][name]
                    box = tuple(slice(at, at + size) for at, size in zip(offset, part.shape, strict=True))
                    covered[box] = True
                    # the part's error on the scale of the whole tensor
                    error = difference(part, whole[box]) * (whole[box].norm() / whole.norm()).item()
                    found[row] = max(found[row], error)
            assert covered.all(), f"{name}: no rank holds some of it"
    return found
