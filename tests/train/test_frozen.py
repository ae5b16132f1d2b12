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


NEVER = {
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.self_attn.o_proj.weight",
    "model.layers.0.input_layernorm.weight",
}
"""Some of what the first stage freezes."""


def moments(tensors: dict[str, torch.Tensor]) -> set[str]:
    return {name.removeprefix("optim.exp_avg.") for name in tensors if name.startswith("optim.exp_avg.")}


def test_a_checkpoint_holds_moments_of_what_was_trained(path, tmp_path, one):
    """Those of frozen parameters are not there, from the stage that trains them on they stay; what is stored resumes under any layout, also
    from the very end of the stage that has none."""
    run = tmp_path / "run"
    on_ranks(2, trained, path, [f"--run.directory={run}", "--run.stop_at_step=3", *flags_of("dp2")])
    early, whole = stored(run, 3), stored(one[0])
    names = {name.removeprefix("model.") for name in whole if name.startswith("model.")}
    assert (
        moments(early) == names - {n for n in names if ".layers.0." in n or "o_proj" in n}
        and not moments(early) & NEVER
    )
    assert moments(whole) == names
    on_ranks(4, trained, path, [f"--run.directory={run}", "--run.stop_at_step=6", *flags_of("tp2 pp2")])
    on_ranks(1, trained, path, [f"--run.directory={run}"])
    other = stored(run)
    assert all(difference(other[name], whole[name]) < LAYOUT for name in whole)


def moments_of_everything(path: str, flags: list[str]) -> None:
    """As runs before kept them, and masters of everything."""
    from megacpt.config import resolve
    from megacpt.config.trainable import Trainable
    from megacpt.train import start

    original = resolve.trainable_in

    def everything(config, frozen, index):
        return Trainable(original(config, frozen, index).names, frozenset(config.shapes()))

    resolve.trainable_in, start.held_exactly = everything, lambda *_: frozenset()
    trained(path, flags)


def test_a_checkpoint_with_all_moments_resumes(path, tmp_path, one):
    run = tmp_path / "run"
    on_ranks(1, moments_of_everything, path, [f"--run.directory={run}", "--run.stop_at_step=2"])
    assert moments(stored(run, 2)) > NEVER
    on_ranks(1, trained, path, [f"--run.directory={run}", "--run.stop_at_step=3"])
    assert not moments(stored(run, 3)) & NEVER
    on_ranks(1, trained, path, [f"--run.directory={run}"])
    other = stored(run)
    assert all(torch.equal(other[name], tensor) for name, tensor in stored(one[0]).items())


def test_moments_that_were_updated_may_not_be_missing(path, tmp_path, capfd):
    run = tmp_path / "run"
    on_ranks(1, trained, path, [f"--run.directory={run}", "--run.stop_at_step=3"])
    directory = run / "checkpoints/step-00000003"
    content = json.loads((directory / "manifest.json").read_text())
    content["state"]["missed"], content["crc32"] = {}, None  # all were updated three times
    del content["crc32"]
    (directory / "manifest.json").write_text(json.dumps({"crc32": manifest._crc(content), **content}))
    with pytest.raises(AssertionError, match="was damaged when it was read"):
        on_ranks(1, trained, path, [f"--run.directory={run}", "--run.start=resume"])
    assert "holds no tensor optim.exp_avg.model.layers.0" in capfd.readouterr().err


@pytest.fixture
def half(path, tmp_path, tokenizer_dir):
    """Flags of runs that compute in bfloat16 from a base whose files hold that type, and the base."""
    import transformers
    from samples import tiny_config, without_names

    torch.manual_seed(1)
    config = transformers.LlamaConfig(**without_names(tiny_config()))
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "hf")
    transformers.AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(tmp_path / "hf")
    text = Path(path).read_text().replace("[model]\nconfig = ", f'[model]\npretrained = "{tmp_path}/hf"\n# ')
    Path(path).write_text("\n".join(line for line in text.splitlines() if not line.startswith("tokenizer = ")))
    return ["--precision.compute=bfloat16"], tmp_path / "hf"


def test_without_masters_every_resume_gives_the_same_bits(path, tmp_path, half):
    """Never-trained weights are stored as their files have them; whatever was trained has its master, stopped in any stage, at any border,
    under another layout, and from a checkpoint that holds masters of everything."""
    flags, base = half

    def at(name, *more):
        return [f"--run.directory={tmp_path}/{name}", *flags, *more]

    on_ranks(1, trained, path, at("one"))
    whole = stored(tmp_path / "one")
    for step, kind in ((2, trained), (3, trained), (5, trained), (6, trained), (2, moments_of_everything)):
        run = f"{kind.__name__}{step}"
        on_ranks(1, kind, path, at(run, f"--run.stop_at_step={step}"))
        early = stored(tmp_path / run, step)
        light = step <= 3 and kind is trained
        assert all(early[f"model.{n}"].dtype == (torch.bfloat16 if light else torch.float32) for n in NEVER), run
        assert early["model.lm_head.weight"].dtype == torch.float32
        on_ranks(1, trained, path, at(run))
        other = stored(tmp_path / run)
        assert other.keys() == whole.keys()
        assert all(torch.equal(other[name], tensor) for name, tensor in whole.items()), run
    from safetensors.torch import load_file

    early, source = stored(tmp_path / "trained3", 3), load_file(base / "model.safetensors")
    assert all(torch.equal(early[f"model.{name}"], source[name]) for name in NEVER)


def test_what_its_file_holds_in_another_type_keeps_a_master(path, tmp_path, half):
    from safetensors.torch import load_file, save_file

    flags, base = half
    weights = load_file(base / "model.safetensors")
    other = "model.layers.0.mlp.up_proj.weight"
    weights[other] = weights[other].float() * 1.001  # bfloat16 would lose it
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    on_ranks(1, trained, path, [f"--run.directory={tmp_path}/run", "--run.stop_at_step=3", *flags])
    early = stored(tmp_path / "run", 3)
    assert torch.equal(early[f"model.{other}"], weights[other])
    assert early["model.model.layers.0.mlp.down_proj.weight"].dtype == torch.bfloat16


def test_a_model_from_scratch_has_masters(path, tmp_path, half):
    """Its first values were rounded to no file's type, also where a pretrained model lies beside."""
    on_ranks(
        1, trained, path, [f"--run.directory={tmp_path}/run", "--run.stop_at_step=1", "--run.start=scratch", *half[0]]
    )
    assert {stored(tmp_path / "run", 1)[f"model.{name}"].dtype for name in NEVER} == {torch.float32}
