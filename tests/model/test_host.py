"""A step never waits for the device, and no mask of tokens by tokens exists: every operation of a step is looked at."""

import numpy as np
import pytest
import torch
from ranks import on_ranks
from samples import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

TOKENS = 64
SYNCS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "is_nonzero", "item")


class Watch(TorchDispatchMode):
    """Raises on an operation whose result the host must know; remembers the largest result."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[-1].split(".")[0]
        if name in SYNCS:
            raise AssertionError(f"{function.name()} waits for the device")
        out = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


def step_under_watch(operations: str, broken: bool, **degrees) -> bool:
    """One whole step: forward, backward, norm, clip, update."""
    from megacpt.config.layout import Layout
    from megacpt.config.sections.parallel import Parallel
    from megacpt.data.loader import Batch, StepCounts, StepData
    from megacpt.family.read import parse_config
    from megacpt.model.build import build_model, sharding_of
    from megacpt.model.decoder import ModelOptions
    from megacpt.model.hf import initialize
    from megacpt.model.split import plan_pipeline
    from megacpt.optim import clip
    from megacpt.optim.adamw import AdamW
    from megacpt.parallel.mesh import build_mesh
    from megacpt.train.step import Update, train_step

    random, parallel = np.random.default_rng(0), Parallel(**degrees)
    config = parse_config(tiny_config(num_hidden_layers=2), "test")
    mesh, plan = build_mesh(Layout(**degrees), torch.device("cpu")), plan_pipeline(2, parallel)
    options = ModelOptions(operations=operations, attention_backend="triton" if operations == "triton" else "auto")
    model = build_model(config, mesh, torch.float32, options, plan, sharding_of(parallel))
    initialize(model, config, 1)
    optimizer = AdamW(dict(model.named_parameters()), operations)
    tokens, starts = random.integers(0, 400, (1, TOKENS)), np.array([0, 5, 40])
    positions = np.concatenate([np.arange(5), np.arange(35), np.arange(24)])[None]
    batch = Batch(tokens, np.roll(tokens, -1, 1), positions, starts, np.array([0, 3]), [""])
    if broken:
        original = clip.inverse_clip
        import megacpt.train.step as step

        step.inverse_clip = lambda norm, bound, skip: original(norm, bound, skip) if norm.item() > bound else None
    with Watch():
        loss, *_ = train_step(
            model,
            optimizer,
            StepData([batch, batch], StepCounts(2 * TOKENS, 2 * TOKENS, 6), 0),
            "step",
            Update(1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0),
        )
    return bool(torch.isfinite(loss))


@pytest.mark.parametrize("operations", ["triton", "torch"])
def test_a_step_never_waits_for_the_device(operations):
    if operations == "triton":
        pytest.importorskip("triton", reason="needs Triton (Linux)")
    assert on_ranks(1, step_under_watch, operations, False) == [True]


@pytest.mark.parametrize("degrees", [dict(tensor=2, context=2), dict(pipeline=2, data_shard=2)], ids=str)
def test_nor_does_it_on_any_axis(degrees):
    from functools import partial

    assert all(on_ranks(4, partial(step_under_watch, "torch", False, **degrees)))


def test_the_watch_sees_an_item():
    with pytest.raises(AssertionError, match="_local_scalar_dense waits for the device"):
        on_ranks(1, step_under_watch, "torch", True)


def test_there_is_no_mask_of_tokens_by_tokens():
    """1,024 queries and keys; the twin is SDPA where keys reach back before the queries, which takes a mask."""
    pytest.importorskip("triton", reason="needs Triton (Linux)")
    from megacpt_kernels import Documents, attention
    from megacpt_kernels.attention_backends import BACKENDS

    q, k, v = (torch.randn(1024, 1, 8, requires_grad=True) for _ in range(3))
    with Watch() as watch:
        attention(q, k, v, Documents.of([0, 700], 1024), backend="triton").sum().backward()
    assert watch.largest == 1024 * 8
    reach_back = Documents((0, 512), (0, 1024), torch.tensor([0, 512]), torch.tensor([0, 1024]))
    with Watch() as watch:  # behind the operation that the trainer sees
        BACKENDS["sdpa"].forward(
            q[:512].detach(), k.detach(), v.detach(), [reach_back.edges], reach_back.longest, False
        )
    assert watch.largest >= 512 * 1024
