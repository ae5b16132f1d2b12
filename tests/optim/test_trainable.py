"""Stages that train a part of the parameters, thaw others and freeze again: the run that computes all gradients and drops those of frozen
parameters, on every layout and schedule, in fewer products, bytes and messages."""

import fnmatch
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from layout_runs import AXES, world_size
from ranks import on_ranks
from samples import tiny_config
from shared import made_once
from tolerances import LAYOUT

TOKENS, ROWS = 64, 4
STEPS = {"from below": 2}
"""Of each stage of a plan; one of the others'."""
PLANS = {
    "a layer and products": [["model.layers.0.*", "*.o_proj.weight"], [], ["model.layers.0.*", "model.norm.weight"]],
    "from below": [
        ["model.embed_tokens.weight", "model.layers.[0-3].*"],
        ["model.embed_tokens.weight"],
        [],
        ["model.embed_tokens.weight", "model.layers.[0-4].*"],
    ],
    "one part alone": [
        ["model.layers.*", "model.embed_tokens.weight", "lm_head.weight"],  # the last norm
        ["model.layers.*", "model.norm.weight", "lm_head.weight"],  # the embedding
        ["model.[en]*", "model.layers.[0145].*", "lm_head.weight", "*.[qkv]_proj.weight"],
    ],
}
"""By stage, what it freezes."""
LAYOUTS = [
    "dp1",
    "tp2",
    "tp2 overlap=chunked",
    "cp2",
    "dp2",
    "dp2 micro_batch",
    "hsdp2",
    "pp2 gpipe",
    "pp2 1f1b",
    "pp2 v2 interleaved",
    "pp2 v2 interleaved selective",
    "pp2 zb-h1",
    "pp2 v2 zb-v",
    "dp1 full",
    "dp1 selective",
]


def frozen_in(patterns: list[str], names: list[str]) -> set[str]:
    return {name for pattern in patterns for name in fnmatch.filter(names, pattern)}


def made_batches(count: int):
    from megacpt.data.loader import Batch

    made = []
    for number in range(count):
        tokens = np.random.default_rng(number).integers(0, 401, (1, TOKENS))
        positions = np.concatenate([np.arange(40), np.arange(24)])[None]
        labels = np.roll(tokens, -1, 1)
        labels[0, [39, 63]] = -100
        made.append(Batch(tokens, labels, positions, np.array([0, 40]), np.array([0, 2]), [""]))
    return made


def model_on(layout: str, config, compute: torch.dtype, without_master=()):
    from megacpt.config.layout import Layout
    from megacpt.config.sections.parallel import Parallel
    from megacpt.model.build import build_model, sharding_of
    from megacpt.model.decoder import ModelOptions
    from megacpt.model.hf import initialize
    from megacpt.model.split import plan_pipeline
    from megacpt.parallel.mesh import build_mesh

    words, degrees, schedule, more = layout.split(), {}, "1f1b", {}
    for word in words:
        axis = word.rstrip("0123456789")
        if axis in AXES and axis != word:
            degrees[AXES[axis]] = int(word[len(axis) :])
        elif "=" in word:
            more |= dict([word.split("=")])
        elif word not in ("selective", "full", "micro_batch"):
            schedule = word
    parallel = Parallel(**degrees, **more, schedule=schedule)
    sizes = {axis: size for axis, size in degrees.items() if axis != "virtual_stages"}
    mesh = build_mesh(Layout(**sizes), torch.device("cpu"))
    plan = plan_pipeline(config.num_hidden_layers, parallel)
    options = ModelOptions(overlap=parallel.overlap)
    model = build_model(config, mesh, compute, options, plan, sharding_of(parallel), without_master)
    initialize(model, config, 1)
    model.set_activation_checkpointing(next((word for word in words if word in ("selective", "full")), "none"))
    return model


def trained(
    layout: str, config, plan: list[list[str]], version: str, compute=torch.float64, exact=False, num_steps=2
) -> dict[str, Any]:
    """This rank's numbers, weights and moments at the end.

    Args:
        version: "" freezes; "dropped" computes all and drops; others are broken.
        num_steps: of each stage.
        exact: whether what is not trained yet is held in the type of the computation.
    """
    from megacpt.config.trainable import Trainable, trainable_in
    from megacpt.data.loader import StepCounts
    from megacpt.model.run import forward_backward
    from megacpt.optim.adamw import AdamW
    from megacpt.optim.clip import grad_norm, inverse_clip
    from megacpt.optim.trainable import set_trainable
    from megacpt.parallel.sharded import local_part

    every = frozenset(config.shapes())
    stages = [frozen_in(patterns, list(every)) for patterns in plan]
    light = every - trainable_in(config, stages, 0).held if exact else ()
    model = model_on(layout, config, compute, light)
    optimizer = AdamW(
        dict(model.named_parameters()),
        "torch",
        held=every if version == "dropped" else trainable_in(config, stages, 0).held,
    )
    batches = made_batches(ROWS)
    mine = batches[model.mesh.data_rank :: model.mesh.layout.data]
    counts = StepCounts(62 * ROWS, 62 * ROWS, 2 * ROWS)
    reduce = "micro_batch" if "micro_batch" in layout else "step"
    found: dict[str, Any] = {"numbers": [], "held": [], "grads": [], "dtypes": []}
    start = {name: local_part(p).detach().clone() for name, p in optimizer.parameters.items()}
    for index, frozen in enumerate(stages):
        trainable = trainable_in(config, stages, index)
        if version == "dropped":
            trainable = Trainable(every, every)
        if version == "moments are dropped":
            optimizer.exp_avg, optimizer.exp_avg_sq = {}, {}
        set_trainable(model, optimizer, trainable)
        if version == "a stage too high":
            model.first_trained += 1
        found["dtypes"].append({name: p.dtype for name, p in optimizer.parameters.items()})
        before = {name: local_part(p).detach().clone() for name, p in optimizer.parameters.items()}
        for _ in range(num_steps):
            loss = forward_backward(model, mine, counts, reduce)[0]
            if version == "dropped":
                for name in frozen & optimizer.parameters.keys():
                    optimizer.parameters[name].grad = None
            found["grads"].append({name for name, p in optimizer.parameters.items() if p.grad is not None})
            norm = grad_norm(model.counted_parameters(), model.mesh)
            optimizer.step(1e-3, (0.8, 0.9), 1e-7, 0.2, inverse_clip(norm, 0.5), frozen)
            optimizer.zero_grad()
            found["numbers"].append((loss.item(), norm.item()))
        for name in frozen & before.keys():
            assert torch.equal(local_part(optimizer.parameters[name]), before[name]), name
        found["held"].append(set(optimizer.exp_avg))
    found["moved"] = {name for name, p in optimizer.parameters.items() if not torch.equal(local_part(p), start[name])}
    found["weights"] = {name: local_part(p).detach().clone() for name, p in optimizer.parameters.items()}
    found["boxes"] = {name: box_of(p) for name, p in optimizer.parameters.items()}
    found["moments"] = {name: local_part(t).clone() for name, t in (*optimizer.exp_avg.items(), *prefixed(optimizer))}
    found["missed"] = dict(optimizer.missed)
    return found


def box_of(tensor) -> tuple[slice, ...]:
    """Which part of the whole this rank holds."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(at, at + size) for at, size in zip(offset, shape, strict=True))


def prefixed(optimizer) -> list[tuple[str, Any]]:
    return [(f"square {name}", tensor) for name, tensor in optimizer.exp_avg_sq.items()]


def plan_of(name: str, tied: bool):
    """(the model's config, what each stage freezes)."""
    from megacpt.family.read import parse_config

    config = parse_config(tiny_config(num_hidden_layers=6, tie_word_embeddings=tied), "test")
    plan = [[pattern for pattern in patterns if not (tied and pattern == "lm_head.weight")] for patterns in PLANS[name]]
    return config, [
        patterns for patterns in plan if len(frozen_in(patterns, list(config.shapes()))) < len(config.shapes())
    ]


def dropping(name: str, tied: bool) -> dict[str, Any]:
    """Of one process, once a session: what a plan comes to when all gradients are computed and those of frozen parameters dropped."""
    make = lambda: on_ranks(1, _drop, name, tied)[0]
    return made_once(f"dropping {name} {tied}", make)


def _drop(name: str, tied: bool) -> dict[str, Any]:
    return trained("dp1", *plan_of(name, tied), "dropped", num_steps=STEPS.get(name, 1))


def compared(layout: str, tied: bool, name: str, theirs: dict[str, Any], version: str = "") -> dict[str, float]:
    """On a rank: the largest differences of its part of a run from the one process that drops gradients."""
    config, plan = plan_of(name, tied)
    num_steps = STEPS.get(name, 1)
    ours = trained(layout, config, plan, version, num_steps=num_steps)
    pairs = [(a, b) for x, y in zip(ours["numbers"], theirs["numbers"], strict=True) for a, b in zip(x, y, strict=True)]
    if not version:
        mine, held = set(ours["weights"]), set()
        missed = lambda found: {name: count for name, count in found["missed"].items() if name in mine}
        assert missed(ours) == missed(theirs)
        for i, frozen in enumerate(frozen_in(patterns, list(config.shapes())) for patterns in plan):
            held |= mine - frozen
            assert ours["held"][i] == held, "moments of what is or was trained, and of nothing else"
            assert all(grads == mine - frozen for grads in ours["grads"][i * num_steps : (i + 1) * num_steps])
        assert ours["moved"] == {name for name in held if ours["weights"][name].numel()}

    def part(kind: str, name: str) -> torch.Tensor:
        return theirs[kind][name][ours["boxes"][name.removeprefix("square ")]]

    moments = {name for name, tensor in theirs["moments"].items() if tensor.any()}
    moments = {name for name in moments if name.removeprefix("square ") in ours["weights"]}
    assert version or moments <= ours["moments"].keys()
    difference_of = lambda kind, name: error_on(ours[kind][name], part(kind, name), theirs[kind][name])
    return {
        "numbers": max(abs(a - b) / abs(b) for a, b in pairs),
        "weights": max(difference_of("weights", name) for name in ours["weights"]),
        "moments": max([difference_of("moments", name) for name in moments & ours["moments"].keys()], default=0.0),
    }


def error_on(part: torch.Tensor, of_theirs: torch.Tensor, whole: torch.Tensor) -> float:
    """Of a rank's part, on the scale of the whole tensor."""
    return ((part - of_theirs).norm() / whole.norm()).item() if part.numel() else 0.0


def all_compared(layout: str, tied: bool, theirs: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """By plan, on a rank."""
    return {name: compared(layout, tied, name, theirs[name]) for name in PLANS}


CASES = [(layout, False) for layout in LAYOUTS]
CASES += [(layout, True) for layout in ("dp1", "tp2", "dp2", "pp2 1f1b", "pp2 v2 zb-v")]


@pytest.mark.parametrize("layout, tied", CASES)
def test_it_is_the_run_that_drops_gradients(layout, tied):
    theirs = {name: dropping(name, tied) for name in PLANS}
    for ranks in on_ranks(world_size(layout), all_compared, layout, tied, theirs):
        for plan, found in ranks.items():
            assert max(found.values()) < LAYOUT, (plan, found)


@pytest.mark.parametrize("version", ["a stage too high", "moments are dropped"])
def test_the_comparison_sees(version):
    ranks = on_ranks(2, compared, "pp2 1f1b", False, "from below", dropping("from below", False), version)
    assert max(found["weights"] for found in ranks) > 1e-6


def products_made(layout: str, frozen: list[list[str]]) -> list[Counter]:
    """On a rank: how often each product is made in a step of four micro-batches, for each of some lists of patterns."""
    from megacpt.data.loader import StepCounts
    from megacpt.family.read import parse_config
    from megacpt.model.build import set_trainable
    from megacpt.model.run import forward_backward
    from megacpt.parallel.gemm import PlainGemm

    config = parse_config(tiny_config(num_hidden_layers=6), "test")
    model, made, names = model_on(layout, config, torch.float32), Counter(), set(config.shapes())

    def count(name: str, original) -> None:
        def counted(self, *args, **more):
            made[name] += 1
            return original(self, *args, **more)

        setattr(PlainGemm, name, counted)

    for name in PRODUCTS:
        count(name, getattr(PlainGemm, name))
    found = []
    for patterns in frozen:
        set_trainable(model, names - frozen_in(patterns, list(names)))
        made.clear()
        forward_backward(model, made_batches(ROWS), StepCounts(1, 1, 1), "step")
        model.zero_grad()
        found.append(Counter(made))
    return found


PRODUCTS = ("forward", "input_gradient", "weight_gradient")


def products_needed(trained: set[str], layers: int) -> dict[str, int]:
    """A linear multiplies for its weight if that is trained, and for its input if anything before it is."""
    flows, needed = "model.embed_tokens.weight" in trained, Counter()
    for layer in range(layers):
        parts = [["input_layernorm"], ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
                 ["post_attention_layernorm"], ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]  # fmt: skip
        for some in parts:
            own = sum(f"model.layers.{layer}.{name}.weight" in trained for name in some)
            if "norm" not in some[0]:
                needed["forward"] += len(some)
                needed["input_gradient"] += len(some) * flows
                needed["weight_gradient"] += own
            flows = flows or own > 0
    flows = flows or "model.norm.weight" in trained
    needed += Counter(forward=1, input_gradient=int(flows), weight_gradient=int("lm_head.weight" in trained))
    return {name: ROWS * needed[name] for name in PRODUCTS}


FROZEN_PARTS = [
    PLANS["from below"][3],
    PLANS["one part alone"][0],
    PLANS["one part alone"][1],
    PLANS["one part alone"][2],
    PLANS["a layer and products"][0],
]


@pytest.mark.parametrize("layout", ["dp1", "pp2 zb-h1"])
def test_only_products_that_are_needed_are_made(layout):
    names = list(tiny_names())
    ranks = on_ranks(world_size(layout), products_made, layout, [[], *FROZEN_PARTS])
    for patterns, *found in zip([[], *FROZEN_PARTS], *ranks, strict=True):
        expected = products_needed(set(names) - frozen_in(patterns, names), 6)
        assert {name: sum(rank[name] for rank in found) for name in PRODUCTS} == expected, patterns
    whole, part = (sum(rank[i]["weight_gradient"] for rank in ranks) for i in (0, 1))
    assert whole > 2 * part


def tiny_names() -> dict[str, tuple[int, ...]]:
    from megacpt.family.read import parse_config

    return parse_config(tiny_config(num_hidden_layers=6), "test").shapes()


def reduced_bytes(frozen: list[list[str]]) -> list[tuple[int, int]]:
    """On a rank of two, for each of some lists of patterns: bytes that FSDP gives to its sums in a step, and those of the trained
    parameters, padded to both ranks."""
    import torch.distributed as dist

    from megacpt.data.loader import StepCounts
    from megacpt.family.read import parse_config
    from megacpt.model.build import set_trainable
    from megacpt.model.run import forward_backward

    config = parse_config(tiny_config(num_hidden_layers=6), "test")
    model, names, sent = model_on("dp2", config, torch.float32), set(config.shapes()), []

    def count(name: str, original) -> None:
        def counted(*args, **more):
            sent.append((more["input"] if "input" in more else args[1]).nbytes)
            return original(*args, **more)

        setattr(dist, name, counted)

    name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    count(name, getattr(dist, name))
    size = lambda p: -(-p.shape[0] // 2) * 2 * (p.shape[1] if p.ndim > 1 else 1)
    found = []
    for patterns in frozen:
        trained = names - frozen_in(patterns, list(names))
        set_trainable(model, trained)
        sent.clear()
        forward_backward(model, made_batches(2)[model.mesh.data_rank :][:1], StepCounts(1, 1, 1), "step")
        model.zero_grad()
        found.append((sum(sent), sum(4 * size(p) for name, p in model.named_parameters() if name in trained)))
    return found


def test_only_what_is_trained_is_reduced():
    for rank in on_ranks(2, reduced_bytes, [[], *FROZEN_PARTS]):
        assert all(sent == expected > 0 for sent, expected in rank), rank
        assert len({sent for sent, _ in rank}) == len(rank)


def in_half_precision(
    layout: str, plan: list[list[str]], broken: bool
) -> tuple[bool, list[set[torch.dtype]], int, int]:
    """On a rank, computing in bfloat16 from values that it holds exactly: whether numbers, weights and moments have the bits of the run
    with masters of everything, which types parameters have in each stage, and the bytes of weights there and here in the first."""
    from megacpt.family.read import parse_config
    from megacpt.model import hf
    from megacpt.parallel import fsdp

    config = parse_config(tiny_config(num_hidden_layers=6), "test")
    initial = hf._initial
    hf._initial = lambda *args: initial(*args).bfloat16().float()
    whole = trained(layout, config, plan, "dropped", torch.bfloat16, num_steps=1)
    if broken:  # a master goes when its parameter is frozen
        set_trainable = fsdp.set_trainable

        def forgetful(root, blocks, names, master):
            for name, parameter in root.named_parameters():
                if name not in names:
                    parameter.data._local_tensor.copy_(parameter.data._local_tensor.bfloat16())
            set_trainable(root, blocks, names, master)

        fsdp.set_trainable = forgetful
    ours = trained(layout, config, plan, "", torch.bfloat16, exact=True, num_steps=1)
    same = ours["numbers"] == whole["numbers"]
    same = same and all(torch.equal(ours["weights"][name].float(), w) for name, w in whole["weights"].items())
    same = same and all(torch.equal(tensor, whole["moments"][name]) for name, tensor in ours["moments"].items())
    size = lambda dtypes: sum(ours["weights"][name].numel() * dtype.itemsize for name, dtype in dtypes.items())
    return same, [set(dtypes.values()) for dtypes in ours["dtypes"]], size(whole["dtypes"][0]), size(ours["dtypes"][0])


HALF = [["model.layers.[0-3].*", "model.embed_tokens.weight"], [], ["model.layers.*"], []]
"""Frozen, thawed, frozen, thawed."""


@pytest.mark.parametrize("layout", ["dp1", "dp2", "tp2", "hsdp2", "tp2 dp2", "pp2 zb-h1"])
def test_no_bit_is_lost_without_masters(layout):
    both = {torch.bfloat16, torch.float32}
    for same, dtypes, whole, light in on_ranks(world_size(layout), in_half_precision, layout, HALF, False):
        assert same
        assert dtypes[0] in (both, {torch.bfloat16}) and dtypes[1:] == [{torch.float32}] * 3
        assert light < 0.75 * whole or layout.startswith("pp2")


def test_the_comparison_sees_a_master_that_is_forgotten():
    ((same, *_),) = on_ranks(1, in_half_precision, "dp1", HALF, True)
    assert not same
