"""Stages that freeze parameters, thaw them and freeze them again: updates are torch.optim.AdamW's, on every layout, over every resume."""

import json
from pathlib import Path

import pytest
import torch
from layout_runs import flags_of, world_size
from ranks import on_ranks
from tolerances import ADAMW, LAYOUT, difference

from megacpt.checkpoint import manifest
from megacpt.checkpoint.load import StoredModel
from megacpt.config.load import load_recipe
from megacpt.optim.adamw import AdamW
from megacpt.train import loop

FREEZE = {
    "cold": ["model.layers.0.*", "*.o_proj.weight"],
    "warm": [],
    "again": ["model.layers.0.*", "model.norm.weight"],
}
COMMON = ["--validation=[]", "--log.tensorboard=false", "--precision.compute=float64"]
SETTINGS = {"betas": [0.8, 0.9], "weight_decay": 0.2, "eps": 1e-7}
STEPS = 9


@pytest.fixture
def path(recipe_file):
    stages = [
        {
            "name": name,
            "tokens": 768,
            "seq_len": 64,
            "batch_tokens": 256,
            "mixture": {"a": 1.0},
            "lr": {"shape": "constant", "peak": 1e-3},
            "freeze": patterns,
        }
        for name, patterns in FREEZE.items()
    ]
    return recipe_file(stages=stages, optimizer=SETTINGS)


def trained(path: str, flags: list[str], record: bool = False) -> list[dict[str, torch.Tensor]]:
    """Trains; returns the weights before each update, and the clipped gradients."""
    found, step = [], AdamW.step

    def recorded(self, lr, betas, eps, decay, scale, frozen) -> None:
        weights = {name: p._local_tensor.detach().clone() for name, p in self.parameters.items()}
        grads = {n: p.grad._local_tensor / scale for n, p in self.parameters.items() if p.grad is not None}
        found.append({"weights": weights, "grads": grads})
        step(self, lr, betas, eps, decay, scale, frozen)

    if record:
        AdamW.step = recorded
    loop.train(load_recipe(path, [*COMMON, *flags]))
    return found


def stored(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    model = StoredModel(run / f"checkpoints/step-{step:08d}")
    return {name: model.tensor(name) for name in model.metadata}


def state(run: Path, step: int = STEPS) -> dict:
    return json.loads((run / f"checkpoints/step-{step:08d}/manifest.json").read_text())["state"]


def replayed(found: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """What torch.optim.AdamW makes of the first weights and the gradients of each step."""
    parameters = {name: torch.nn.Parameter(w.clone()) for name, w in found[0]["weights"].items()}
    split = [{"params": [p for p in parameters.values() if (p.ndim > 1) == decayed]} for decayed in (True, False)]
    groups = [split[0] | {"weight_decay": 0.2}, split[1] | {"weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=1e-3, betas=(0.8, 0.9), eps=1e-7)
    for step in found:
        for name, parameter in parameters.items():
            parameter.grad = step["grads"].get(name)
        reference.step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


@pytest.fixture
def one(path, tmp_path_factory):
    """(run directory, what was recorded) of one process. Made once."""
    if not _one:
        directory = tmp_path_factory.mktemp("frozen") / "one"
        _one.append((directory, on_ranks(1, trained, path, [f"--run.directory={directory}"], True)[0]))
    return _one[0]


_one: list[tuple[Path, list]] = []


def test_a_run_with_frozen_stages_is_torchs_adamw(one):
    run, found = one
    ours = stored(run)
    for name, weight in replayed(found).items():
        assert difference(ours[f"model.{name}"], weight) < ADAMW[torch.float64], name
    saved = state(run)
    missed = saved["missed"]
    assert saved["num_updates"] == STEPS
    assert missed["model.layers.0.mlp.up_proj.weight"] == 6 and missed["model.layers.1.self_attn.o_proj.weight"] == 3
    assert missed["model.norm.weight"] == 3 and "model.layers.1.mlp.up_proj.weight" not in missed


def one_count(path: str, flags: list[str]) -> list[dict[str, torch.Tensor]]:
    AdamW.count_of = lambda self, name: self.num_updates
    return trained(path, flags, True)


def test_the_twin_with_one_count_differs(path, tmp_path):
    (found,) = on_ranks(1, one_count, path, [f"--run.directory={tmp_path}/one"])
    ours, theirs = stored(tmp_path / "one"), replayed(found)
    assert (
        difference(ours["model.model.layers.0.mlp.up_proj.weight"], theirs["model.layers.0.mlp.up_proj.weight"]) > 1e-6
    )


@pytest.mark.parametrize("layout", ["dp2", "tp2 pp2"])
def test_counts_follow_the_weights_to_any_layout(path, tmp_path, one, layout):
    """Stopped in the second stage on one layout, resumed on another, and back: the same end as in one go."""
    run = tmp_path / "run"
    on_ranks(world_size(layout), trained, path, [f"--run.directory={run}", "--run.stop_at_step=5", *flags_of(layout)])
    assert state(run, 5)["missed"]["model.layers.0.mlp.up_proj.weight"] == 3
    on_ranks(1, trained, path, [f"--run.directory={run}", "--run.stop_at_step=7"])
    on_ranks(world_size(layout), trained, path, [f"--run.directory={run}", *flags_of(layout)])
    whole, other = stored(one[0]), stored(run)
    assert whole.keys() == other.keys() and state(run)["missed"] == state(one[0])["missed"]
    assert all(difference(other[name], whole[name]) < LAYOUT for name in whole)


def test_counts_survive_a_layout_of_a_stages_own(path, tmp_path, one):
    flags = [
        "--stages.warm.parallel.pipeline=2",
        "--stages.again.parallel.tensor=2",
        "--parallel.micro_batch_tokens=64",
    ]
    on_ranks(2, trained, path, [f"--run.directory={tmp_path}/two", *flags])
    whole, other = stored(one[0]), stored(tmp_path / "two")
    assert all(difference(other[name], whole[name]) < LAYOUT for name in whole)


def test_a_checkpoint_with_one_count_gives_it_to_all(path, tmp_path):
    """As runs before wrote it."""
    run = tmp_path / "run"
    on_ranks(1, trained, path, [f"--run.directory={run}", "--run.stop_at_step=4"])
    directory = run / "checkpoints/step-00000004"
    content = json.loads((directory / "manifest.json").read_text())
    del content["state"]["missed"], content["crc32"]
    (directory / "manifest.json").write_text(json.dumps({"crc32": manifest._crc(content), **content}))
    assert manifest.read_manifest(directory).state.missed == {}
    on_ranks(1, trained, path, [f"--run.directory={run}"])
    assert state(run)["num_updates"] == STEPS and state(run)["missed"]["model.layers.0.mlp.up_proj.weight"] == 3
