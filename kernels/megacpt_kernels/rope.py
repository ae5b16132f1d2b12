"""Rotary position embedding of Q and K, half-rotation form as in Hugging Face (Su et al. 2021, arXiv 2104.09864).

With halves (a, b) of a head: (a cos - b sin, b cos + a sin). Linear and orthogonal up to the scale in cos and sin, so
backward is the rotation by -sin and nothing but the tables is saved.
"""

import torch
from torch import Tensor


def rope_qk(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys.

    Args:
        q: [t, heads, d]. k: [t, kv_heads, d].
        cos, sin: [t, d / 2], the rows of each token's position, in q's type.
    Returns:
        New tensors of the same shapes.
    """
    if cos.shape != (q.shape[0], q.shape[2] // 2):
        raise ValueError(f"cos has shape {tuple(cos.shape)}; q {tuple(q.shape)} needs {(q.shape[0], q.shape[2] // 2)}.")
    return _Rope.apply(q, k, cos, sin)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor):
        ctx.save_for_backward(cos, sin)
        return _rotate(q, cos, sin), _rotate(k, cos, sin)

    @staticmethod
    def backward(ctx, dq: Tensor, dk: Tensor):
        cos, sin = ctx.saved_tensors
        return _rotate(dq, cos, -sin), _rotate(dk, cos, -sin), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    left, right = out.chunk(2, dim=-1)
    torch.mul(a, cos, out=left).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=right).addcmul_(a, sin)
    return out
