"""SwiGLU (Shazeer 2020, arXiv 2002.05202): silu(gate) * up. Saves its two inputs; backward recomputes silu."""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Args:
        gate, up: [t, f].
    Returns:
        [t, f].
    """
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, dy: Tensor):
        gate, up = ctx.saved_tensors
        dup = F.silu(gate).mul_(dy)
        dgate = torch.ops.aten.silu_backward(dy * up, gate)
        return dgate, dup
