"""SwiGLU (Shazeer 2020, arXiv 2002.05202): silu(gate) * up. Saves its two inputs; backward recomputes silu."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megacpt_kernels.backend import jit, operation, same_device, tl, triton, use_triton

_BLOCK = 1024


def swiglu(gate: Tensor, up: Tensor, backend: str = "auto") -> Tensor:
    """Args:
        gate, up: [t, f].
    Returns:
        [t, f].
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(f"gate is {tuple(gate.shape)} {gate.dtype}, up {tuple(up.shape)} {up.dtype}.")
    same_device(gate=gate, up=up)
    return _SwiGLU.apply(gate, up, use_triton(backend, gate))


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, fast: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.fast = fast
        return _forward(gate.contiguous(), up.contiguous()) if fast else F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (dy,) = grads
        gate, up = ctx.saved_tensors
        if ctx.fast:
            return *_backward(dy.contiguous(), gate.contiguous(), up.contiguous()), None
        dup = F.silu(gate).mul_(dy)
        return torch.ops.aten.silu_backward(dy * up, gate), dup, None


@operation("swiglu_forward(Tensor gate, Tensor up) -> Tensor", lambda gate, up: torch.empty_like(gate))
def _forward(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty_like(gate)
    if y.numel():
        _forward_kernel[_grid(y)](gate, up, y, y.numel(), BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=True)
    return y


@operation(
    "swiglu_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    lambda dy, gate, up: (torch.empty_like(gate), torch.empty_like(up)),
)
def _backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    if dy.numel():
        _backward_kernel[_grid(dy)](
            gate, up, dy, dgate, dup, dy.numel(), BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=True
        )
    return dgate, dup


def _grid(x: Tensor) -> tuple[int]:
    return (triton.cdiv(x.numel(), _BLOCK),)


@jit
def _forward_kernel(gate, up, y, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), mask=inside)


@jit
def _backward_kernel(gate, up, dy, dgate, dup, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    g = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(dup + at, (d * g * s).to(dup.dtype.element_ty), mask=inside)
    tl.store(dgate + at, (d * u * s * (1.0 + g * (1.0 - s))).to(dgate.dtype.element_ty), mask=inside)
