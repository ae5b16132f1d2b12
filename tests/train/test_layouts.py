"""Tensor, context, pipeline and data parallelism in any combination against one process, float64: losses, norms, every
gradient and every weight of 8 AdamW steps; checkpoints from any of these layouts into any other."""

import itertools
import json
import math
import time
from pathlib import Path

import pytest
import torch
import transformers
from layout_runs import flags_of, train, world_size, worst
from ranks import on_ranks
from samples import tiny_config, without_names
from tolerances import LAYOUT

from megacpt.checkpoint.load import StoredModel
from megacpt.config.load import load_recipe

CHOSEN = {
    "untied": [
        "tp2",
        "cp4",
        "dp3",
        "hsdp2 dp2 reshard_after_forward=false",
        "pp2",
        "pp4",
        "pp3 zb-h1",
        "tp2 cp2 overlap=chunked",
        "tp4 overlap=chunked",
        "cp2 dp2",
        "tp2 pp2 activation_checkpointing=full",
        "cp2 pp2 v2 activation_checkpointing=selective",
        "pp2 dp2 reshard_after_forward=true prefetch=2",
        "pp2 v2 zb-v dp2 reshard_after_forward=true",
        "pp2 dp2 zb-h1 precision.reduce=micro_batch",
        "pp2 hsdp2 precision.reduce=micro_batch",
        "tp2 activation_checkpointing=selective kernels.compile=true",
        "tp2 cp2 hsdp2",
        "tp2 cp2 pp2",
        "tp2 pp2 hsdp2 v2 zb-v activation_checkpointing=full overlap=chunked",
    ],
    "tied": ["v2", "tp2", "cp2 dp2", "pp2", "pp2 v2 zb-v", "tp2 pp2 dp2 v2", "cp2 pp2 zb-h1"],
    "untied qwen2": ["tp4 activation_checkpointing=full", "cp2 pp2 zb-h1"],
    "tied qwen3": ["tp4", "tp2 cp2 activation_checkpointing=selective", "pp2 dp2 v2 zb-v"],
}
SIXTEEN = [
    ("untied", "tp2 cp2 pp2 dp2"),
    ("tied", "tp2 cp2 pp2 dp2 v2"),
    ("untied", "tp2 cp2 pp2 dp2 zb-h1 activation_checkpointing=full"),
    ("tied", "tp2 cp2 pp2 dp2 v2 zb-v"),
    ("untied", "tp2 cp2 pp2 hsdp2 v2 overlap=chunked activation_checkpointing=selective"),
    ("tied", "tp2 cp2 pp2 dp2 gpipe reshard_after_forward=true"),
    ("untied", "tp2 cp2 pp2 dp2 v3 contiguous_micro_batches=3"),
]


def matrix() -> list[tuple[str, str]]:
    """All layouts of up to 8 ranks over degrees of 1, 2 and 4, with the options taken by turns."""
    found = []
    turns = {
        "tie": itertools.cycle(["untied", "tied"]),
        "one": itertools.cycle(["1f1b", "zb-h1", "gpipe"]),
        "two": itertools.cycle(["v2", "v2 zb-v"]),
        "keep": itertools.cycle(["", " activation_checkpointing=full", " activation_checkpointing=selective"]),
        "overlap": itertools.cycle(["", " overlap=chunked"]),
    }
    for tp, cp, pp, dp in itertools.product((1, 2, 4), repeat=4):
        if not 1 < tp * cp * pp * dp <= 8:
            continue
        for data in [f"dp{dp}", *(["hsdp2 dp2"] if dp == 4 else [])]:
            for schedule in ["v1"] if pp == 1 else [next(turns["one"]), next(turns["two"])]:
                words = f"tp{tp} cp{cp} pp{pp} {data} {schedule}"
                extra = next(turns["keep"]) + (next(turns["overlap"]) if tp > 1 else "")
                found.append((next(turns["tie"]), words + extra))
    return found


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


CASES = [(kind, layout) for kind, layouts in CHOSEN.items() for layout in layouts]
COMPILED = "tp2 cp2 activation_checkpointing=selective kernels.compile=true"
"""What is compiled of a block lies between collectives and is alike on all axes; each rank takes ten seconds to compile it."""


@pytest.mark.parametrize(
    "kind, layout",
    [
        *(pytest.param(*case, id=" ".join(case)) for case in CASES),
        pytest.param("untied", COMPILED, marks=pytest.mark.full),
    ],
)
def test_every_layout_gives_the_numbers_of_one_process(trained, kind, layout):
    found = worst(trained(kind, layout), trained.one(kind))
    assert all(value < LAYOUT for value in found.values()), found


@pytest.mark.full
def test_all_layouts_of_eight_ranks_and_seven_of_sixteen(trained):
    """Writes the table of docs/numerics.md."""
    lines, bad = [], []
    for kind, layout in [*matrix(), *SIXTEEN]:
        reference, begin = trained.one(f"{kind} six"), time.monotonic()
        found = worst(trained(f"{kind} six", layout), reference)
        row = f"| {layout} | {kind} | {world_size(layout)} | " + " | ".join(f"{value:.1e}" for value in found.values())
        lines.append(f"{row} |")
        print(lines[-1], f"{time.monotonic() - begin:.0f} s", flush=True)
        bad += [lines[-1]] if max(found.values()) >= LAYOUT else []
    document = Path(__file__).parents[2] / "docs/numerics.md"
    text = document.read_text()
    before, after = text.split("<!-- layouts -->")[0], text.split("<!-- end of layouts -->")[1]
    head = (
        f"<!-- layouts -->\nWritten by `bash tests/run.sh --full` with torch {torch.__version__}: {len(lines)} layouts.\n\n"
        "| layout | embeddings | ranks | loss and norm | gradients | weights |\n|---|---|---|---|---|---|\n"
    )
    document.write_text(before + head + "\n".join(lines) + "\n<!-- end of layouts -->" + after)
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    "breakage, kind, layout",
    [
        ("replicated", "untied", "tp2"),
        ("keys", "untied", "cp2"),
        ("local_count", "untied", "dp3"),
        ("tied", "tied", "pp2"),
        ("other_micro_batch", "untied", "pp2"),
        ("doubled_weights", "untied", "pp2 zb-h1"),
    ],
)
def test_the_comparison_sees_a_broken_axis(trained, breakage, kind, layout):
    found = worst(trained(kind, layout, breakage), trained.one(kind))
    assert found["gradients"] > 1e-6 and found["weights"] > 1e-6, found


class TestMegatronIssue7452:
    """Silent errors of composition that Megatron-LM's users found (its issues 7452, 5916, 1764): each must not be here, and
    the comparison must see it when it is put in."""

    @pytest.mark.parametrize("layout", ["cp4", "dp3"])
    def test_the_loss_is_normalised_by_the_global_count_of_labels(self, trained, layout):
        reference = trained.one("untied")
        assert worst(trained("untied", layout), reference)["loss and norm"] < LAYOUT
        if layout == "dp3":  # context ranks hold the same rows, so their own count is the same here
            assert worst(trained("untied", layout, "local_count"), reference)["loss and norm"] > 1e-3

    @pytest.mark.parametrize(
        "breakage, kind, layout",
        [
            ("norm_counts_replicas", "untied", "tp2"),
            ("norm_of_the_stage", "untied", "pp2"),
            ("counted_twice", "tied", "pp2"),
        ],
    )
    def test_the_gradient_norm_counts_each_parameter_once(self, trained, breakage, kind, layout):
        reference = trained.one(kind)
        assert worst(trained(kind, layout), reference)["loss and norm"] < LAYOUT
        found = worst(trained(kind, layout, breakage), reference)
        assert found["loss and norm"] > 1e-4, found

    @pytest.mark.parametrize(
        "breakage, layout",
        [("mean_of_means", "dp3"), ("averaged_gradients", "dp3"), ("own_keys_only", "cp4"), ("replicated", "tp2")],
    )
    def test_gradients_are_sums_over_all_who_had_a_part(self, trained, breakage, layout):
        reference = trained.one("untied")
        assert worst(trained("untied", layout), reference)["gradients"] < LAYOUT
        found = worst(trained("untied", layout, breakage), reference)
        assert found["gradients"] > 1e-4, found

    def test_a_context_rank_without_labels_gives_no_nan(self):
        """One document of 12 tokens in a row of 64: of four context ranks, some hold only filling."""
        from megacpt.parallel.context import make_plan

        held = [(make_plan([0, 12], 64, 4, rank).tokens < 11).sum() for rank in range(4)]
        assert 0 in held and sum(held) == 11
        found = on_ranks(4, filled_row)
        for labels, loss, norm in found:
            assert labels in held and math.isfinite(loss) and math.isfinite(norm) and norm > 0
        _, loss, norm = found[0]
        (_, one, one_norm), *_ = on_ranks(1, filled_row)
        assert abs(loss - one) < LAYOUT * one and abs(norm - one_norm) < LAYOUT * one_norm


def filled_row() -> tuple[int, float, float]:
    """On a rank: labels it holds, loss and norm of a row that is mostly filling, shared by all ranks."""
    import numpy as np
    import torch.distributed as dist

    from megacpt.config.layout import Layout
    from megacpt.data.loader import Batch, StepCounts
    from megacpt.family.read import parse_config
    from megacpt.model.build import build_model
    from megacpt.model.decoder import ModelOptions
    from megacpt.model.hf import initialize
    from megacpt.model.inputs import to_inputs
    from megacpt.model.run import forward_backward
    from megacpt.optim.clip import grad_norm
    from megacpt.parallel.mesh import build_mesh

    mesh = build_mesh(Layout(context=dist.get_world_size()), torch.device("cpu"))
    config = parse_config(tiny_config(), "test")
    model = build_model(config, mesh, torch.float64, ModelOptions())
    initialize(model, config, 1)
    tokens = np.arange(64)[None] % 12 + 1
    labels = np.full((1, 64), -100)
    labels[0, :11] = tokens[0, 1:12]
    positions = np.concatenate([np.arange(12), np.arange(52)])[None]
    batch = Batch(tokens, labels, positions, np.array([0, 12]), np.array([0, 2]), [""])
    mine = int((to_inputs(batch, mesh).labels >= 0).sum())
    loss = forward_backward(model, [batch], StepCounts(11, 11, 1), "step")
    return mine, loss.item(), grad_norm(model.counted_parameters(), mesh).item()


def test_seven_data_ranks_train_like_eight(trained, tmp_path):
    path, flags = trained.path, [*trained.flags("untied"), "--stages.s.batch_tokens=512", "--stages.s.tokens=4096"]
    eight, seven = (train(path, flags, f"dp{n}", tmp_path / str(n)) for n in (8, 7))
    for ours, theirs in zip(seven[0]["numbers"], eight[0]["numbers"], strict=True):
        assert all(abs(a - b) <= LAYOUT * b for a, b in zip(ours, theirs, strict=True))


def test_a_split_backward_in_bfloat16_accumulates_like_a_whole_one(trained, tmp_path):
    """fp32 accumulation of bfloat16 weight gradients that came outside autograd: the same bits."""
    path, flags = trained.path, [*trained.flags("untied"), "--precision.compute=bfloat16"]
    whole, split = (train(path, flags, f"pp2 dp2 {name}", tmp_path / name) for name in ("1f1b", "zb-h1"))
    for a, b in zip(whole, split, strict=True):
        assert a["numbers"] == b["numbers"]
        assert all(torch.equal(a["last"][name][1], b["last"][name][1]) for name in a["last"])


def common(directory: Path, layout: str) -> list[str]:
    return ["--validation=[]", "--precision.compute=float64", f"--run.directory={directory}", *flags_of(layout)]


def only_train(path: str, flags: list[str]) -> None:
    from megacpt.train import loop

    loop.train(load_recipe(path, flags))


@pytest.mark.parametrize("kind", ["untied", "tied", "untied qwen2"])
def test_a_checkpoint_goes_on_under_any_other_layout(trained, tmp_path, kind):
    """Four steps on one layout, four on the next; the first load is bit-identical, the end equals one process."""
    path, flags = trained.path, trained.flags(kind)
    trained.one(kind)
    reference = weights(trained.directory(kind))
    pairs = {
        "untied": [("tp2 cp2", "pp2 v2 dp3"), ("pp3", "tp2 hsdp2")],
        "tied": [("dp3", "pp2 tp2"), ("pp2 v2 zb-v", "tp2")],
        "untied qwen2": [("tp4", "pp2 dp2")],  # biases held whole, then sharded
    }
    for first, second in pairs[kind]:
        directory = tmp_path / f"{first}-{second}".replace(" ", "_")

        def run(layout, *more, d=directory):
            return on_ranks(
                world_size(layout), only_train, path, [*common(d, layout), *flags, "--checkpoint.keep_last=9", *more]
            )

        run(first, "--run.stop_at_step=4")
        before = weights(directory, 4)
        moments = StoredModel(directory / "checkpoints/step-00000004")
        stored = {n: moments.tensor(n) for n in moments.metadata}
        run(second, "--run.stop_at_step=4")
        after = weights(directory, 4)
        again = StoredModel(directory / "checkpoints/step-00000004")
        assert before.keys() == reference.keys() and all(torch.equal(before[name], after[name]) for name in before)
        assert all(torch.equal(stored[name], again.tensor(name)) for name in stored)
        run(second)
        ours = weights(directory)
        assert all((ours[n] - reference[n]).norm() <= LAYOUT * reference[n].norm() for n in reference), (first, second)


STAGED = [
    ("8", {"tensor": 2, "data_shard": 2}, 64),
    ("16", {"pipeline": 2, "virtual_stages": 2, "schedule": "zb-v"}, 64),
    ("32", {"context": 4}, 128),
]


def staged(recipe_file) -> str:
    """Three stages that grow in length, each with a layout of its own for four ranks."""
    lr = {"shape": "constant", "peak": 1e-3}
    stages = [
        {
            "name": name, "tokens": 768, "seq_len": seq_len, "batch_tokens": 256, "mixture": {"a": 0.7, "b": 0.3}, "lr": lr,
            "parallel": {"micro_batch_tokens": seq_len, **parallel},
        }
        for name, parallel, seq_len in STAGED
    ]  # fmt: skip
    return recipe_file(stages=stages, parallel={})


def test_stages_with_layouts_of_their_own_are_one_run(recipe_file, tmp_path):
    """One command through three layouts, beside one process; and stopped within each stage and resumed: the same bits."""
    path = staged(recipe_file)
    flags = ["--validation=[]", "--precision.compute=float64", "--checkpoint.keep_last=20"]
    on_ranks(4, only_train, path, [*flags, f"--run.directory={tmp_path}/four"])
    plain = [f"--stages.{name}.parallel={{micro_batch_tokens={length}}}" for name, _, length in STAGED]
    on_ranks(1, only_train, path, [*flags, *plain, f"--run.directory={tmp_path}/one"])
    four, one = losses(tmp_path / "four"), losses(tmp_path / "one")
    assert len(one) == 9 and all(
        abs(a - b) <= LAYOUT * b for p, q in zip(four, one, strict=True) for a, b in zip(p, q, strict=True)
    )
    events = [json.loads(line) for line in (tmp_path / "four/events.jsonl").read_text().splitlines()]
    changes = [event["after"] for event in events if event["kind"] == "layout"]
    assert changes == ["data 1 x 2, pipeline 2, context 1, tensor 1", "data 1 x 1, pipeline 1, context 4, tensor 1"]
    for stop in (3, 5, 8, 9):  # at a boundary, within, within, the end
        on_ranks(4, only_train, path, [*flags, f"--run.directory={tmp_path}/again", f"--run.stop_at_step={stop}"])
    assert losses(tmp_path / "again") == four
    ours, theirs = weights(tmp_path / "again", 9), weights(tmp_path / "four", 9)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_import_reads_straight_into_shards(recipe_file, tmp_path, tokenizer_dir):
    raw = without_names(tiny_config())
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**raw)).save_pretrained(tmp_path / "hf")
    transformers.AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(tmp_path / "hf")
    path = recipe_file(model={"pretrained": str(tmp_path / "hf")})
    found = []
    for i, layout in enumerate(["tp2", "dp3", "hsdp2 dp2", "tp2 cp2 dp2", "pp2 v2", "tp2 pp2"]):
        flags = [*common(tmp_path / str(i), layout)[:1], *common(tmp_path / str(i), layout)[2:], "--run.stop_at_step=0"]
        on_ranks(world_size(layout), only_train, path, [*flags, "--parallel.micro_batch_tokens=64"])
        found.append(weights(tmp_path / str(i), 0))
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    for name, tensor in theirs.items():
        assert all(torch.equal(f[name][: len(tensor)], tensor) and not f[name][len(tensor) :].any() for f in found), (
            name
        )


def test_validation_is_the_same_on_every_layout(recipe_file, tmp_path):
    found = []
    for i, layout in enumerate(["dp1", "tp2 cp2", "dp3", "pp2 v2 dp2", "tp2 cp2 pp2 v2 zb-v"]):
        flags = [*common(tmp_path / str(i), layout)[1:], "--run.stop_at_step=0"]
        on_ranks(world_size(layout), only_train, recipe_file(), flags)
        events = map(json.loads, (tmp_path / str(i) / "events.jsonl").read_text().splitlines())
        found.append(next(event["losses"] for event in events if event["kind"] == "validation"))
    assert all(losses == pytest.approx(found[0], rel=1e-12) for losses in found[1:])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.gpu
def test_the_same_on_nccl(trained, tmp_path):
    """The same body under torchrun in float64: as many ranks as GPUs, each axis that fits."""
    import subprocess
    import sys

    path, flags = trained.path, trained.flags("untied")
    trained.one("untied")
    for layout in [
        name
        for name in ("tp2", "cp2", "pp2", "dp2", "tp2 pp2", "tp2 cp2 pp2")
        if world_size(name) <= torch.cuda.device_count()
    ]:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc-per-node={world_size(layout)}",
            "--standalone",
        ]
        more = [
            "--validation=[]",
            "--precision.compute=float64",
            f"--run.directory={tmp_path}/{layout.replace(' ', '')}",
        ]
        subprocess.run([*command, "-m", "megacpt", "train", path, *flags, *flags_of(layout), *more], check=True)
        ours, theirs = losses(tmp_path / layout.replace(" ", "")), losses(trained.directory("untied"))
        assert all(
            abs(a - b) <= LAYOUT * b for p, q in zip(ours, theirs, strict=True) for a, b in zip(p, q, strict=True)
        )
