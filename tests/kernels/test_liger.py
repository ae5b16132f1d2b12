"""Our Triton kernels beside Liger's (BSD-2), both in the interpreter, float32: two implementations that share no line."""

import sys

import pytest
import torch
from tolerances import KERNEL, difference

pytest.importorskip("triton", reason="needs Triton (Linux)")
pytest.importorskip("liger_kernel", reason="needs liger-kernel (the dev extra)")
import triton
import triton.language as tl
from megacpt_kernels import add_rms_norm, cross_entropy_, label_weights, linear_cross_entropy, rms_norm, rope_qk, swiglu
from megacpt_kernels.backend import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 before the first import")
BOUND = 2 * KERNEL[torch.float32]


def random(*shape, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).requires_grad_()


@triton.jit
def inverse_root(x):
    return 1.0 / tl.sqrt(x)


def agree(ours, theirs, inputs) -> None:
    results = []
    for function in (ours, theirs):
        given = [x.detach().clone().requires_grad_() for x in inputs]
        outputs = function(*given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        cotangents = [random(*y.shape, seed=4).detach() for y in outputs]
        kept = [y.detach().clone() for y in outputs]  # Liger's backward writes over what it saved
        results.append([*kept, *torch.autograd.grad(outputs, given, cotangents)])
    for a, b in zip(*results, strict=True):
        assert difference(a, b) <= BOUND


def test_norms(monkeypatch):
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    for name in ("rms_norm", "fused_add_rms_norm"):  # the interpreter has no libdevice
        monkeypatch.setattr(sys.modules[f"liger_kernel.ops.{name}"], "rsqrt", inverse_root)
    x, residual, weight = random(13, 40), random(13, 40, seed=2), random(40, seed=1)
    agree(
        lambda x, w: rms_norm(x, w, 1e-5, "triton"),
        lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-5, 0.0, "llama", False),
        [x, weight],
    )
    theirs = lambda x, r, w: LigerFusedAddRMSNormFunction.apply(x, r, w, 1e-5, 0.0, "llama", False)
    agree(lambda x, r, w: add_rms_norm(x, r, w, 1e-5, "triton"), theirs, [x, residual, weight])


def test_swiglu():
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    theirs = lambda g, u: LigerSiLUMulFunction.apply(g.clone(), u.clone())
    agree(lambda g, u: swiglu(g, u, "triton"), theirs, [random(7, 33), random(7, 33, seed=1)])


def test_rope():
    from liger_kernel.ops.rope import LigerRopeFunction

    angles = torch.outer(torch.arange(6.0), torch.tensor([1.0, 0.3, 0.1, 0.01]))
    cos, sin = (torch.cat([x, x], -1)[None] for x in (angles.cos(), angles.sin()))

    def theirs(q, k):
        out = LigerRopeFunction.apply(q.transpose(0, 1)[None].clone(), k.transpose(0, 1)[None].clone(), cos, sin)
        return tuple(x[0].transpose(0, 1) for x in out)

    positions = torch.arange(6)
    ours = lambda q, k: rope_qk(q, k, angles.cos(), angles.sin(), positions, backend="triton")
    agree(ours, theirs, [random(6, 3, 8), random(6, 1, 8, seed=1)])


def test_cross_entropy():
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    logits, target = random(9, 50), torch.tensor([0, 49, -100, 3, 7, 7, 1, -100, 20])

    def theirs(x):
        return LigerCrossEntropyFunction.apply(x.clone(), target, None, -100, 0.0, 0.0, "sum")[0]

    x = logits.detach().clone().requires_grad_()
    loss = theirs(x)
    loss.backward()
    mine = logits.detach().clone()
    nll, _ = cross_entropy_(mine, target, 0, 50, label_weights(target), backend="triton")
    assert difference(nll.sum(), loss) <= BOUND and difference(mine, x.grad) <= BOUND


def test_linear_cross_entropy():
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    target = torch.tensor([0, 49, -100, 3, 7, 7, 1, -100, 20])
    theirs = lambda x, w: LigerFusedLinearCrossEntropyFunction.apply(x, w, target, None, None, -100, 0.0, 0.0, "sum")[0]
    ours = lambda x, w: linear_cross_entropy(x, w, target, 0, 50, label_weights(target), backend="triton")
    agree(ours, theirs, [random(9, 16), random(50, 16, seed=1)])
