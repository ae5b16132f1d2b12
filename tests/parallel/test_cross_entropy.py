"""Head and loss over ranks that share vocabulary and tokens: weighted losses and log-probabilities of one process, in float64."""

from types import SimpleNamespace

import pytest
import torch
from ranks import on_ranks
from tolerances import difference

T, H, VOCAB, PADDED = 72, 8, 13, 18
"""Three ranks hold 6 rows each, the last one a single real row."""


def inputs() -> tuple[torch.Tensor, ...]:
    """x [T, H], head [VOCAB, H], target and weights [T]: both signs and zeros, NaN where no label is; targets on the borders of parts."""
    generator = torch.Generator().manual_seed(0)
    x, head = (torch.randn(n, H, generator=generator, dtype=torch.float64) for n in (T, PADDED))
    head[VOCAB:] = 0
    target = torch.randint(0, VOCAB, (T,), generator=generator)
    target[:7] = torch.tensor([0, 5, 6, 8, 9, 11, 12])
    target[30:41] = -100
    weights = torch.randn(T, generator=generator)
    weights[::4] = 0
    weights[target == -100] = float("nan")
    return x, head, target, weights


def head_and_loss(chunk: int, breakage: str) -> dict[str, torch.Tensor]:
    """On a rank: loss and log-probabilities, this rank's gradients, gathered."""
    import sys

    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    from megacpt.parallel.collectives import gather_tokens
    from megacpt.parallel.cross_entropy import linear_cross_entropy, log_probs
    from megacpt.parallel.tensor import TensorAxis

    module = sys.modules["megacpt_kernels.linear_cross_entropy"]
    module._chunk = lambda weight, chunk_logits: chunk
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    group, rank = mesh.get_group(), dist.get_rank()
    x, head, target, weights = inputs()
    mine = lambda whole: whole.chunk(group.size())[rank].clone()
    own = mine(x).requires_grad_()
    part = torch.nn.Parameter(DTensor.from_local(mine(head), mesh, [Shard(0)], run_check=False))
    if breakage == "moved":  # each token has the weight of the one before
        weights = weights.nan_to_num(0.0).roll(1)
    if breakage == "differ":
        weights = weights * (1 + 1e-3 * rank)
    axis, place = TensorAxis(group), SimpleNamespace(name="head", weight=part)
    log_p = log_probs(own, place, target, VOCAB, axis)
    loss = linear_cross_entropy(own, place, target, VOCAB, axis, weights, 0.25)
    loss.backward()
    gather = lambda local: gather_tokens(local.contiguous(), group)
    return {
        "loss": loss.detach(),
        "log_p": log_p,
        "x": gather(own.grad),
        "head": gather(part.grad._local_tensor)[:VOCAB],
    }


@pytest.fixture(scope="module")
def expected():
    x, head, target, weights = inputs()
    x, head = x.requires_grad_(), head[:VOCAB].requires_grad_()
    labelled = target >= 0
    log_p = (x @ head.t()).log_softmax(-1).gather(1, target.clamp(min=0)[:, None]).squeeze(1)
    loss = -0.25 * (weights[labelled].double() * log_p[labelled]).sum()
    loss.backward()
    return {"loss": loss, "log_p": torch.where(labelled, log_p, 0.0), "x": x.grad, "head": head.grad}


@pytest.mark.parametrize("chunk", [1000, 20], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_weighted_loss_and_log_probabilities_equal_one_process(expected, ranks, chunk):
    for found in on_ranks(ranks, head_and_loss, chunk, ""):
        assert all(difference(found[name], expected[name]) < 1e-13 for name in expected)
        assert not found["log_p"][30:41].any() and not found["x"][30:41].any() and not found["x"][::4].any()


@pytest.mark.parametrize("breakage", ["moved", "differ"])
def test_the_comparison_sees_wrong_weights(expected, breakage):
    found, *_ = on_ranks(2, head_and_loss, 20, breakage)
    assert max(difference(found[name], expected[name]) for name in ("x", "head")) > 1e-5
