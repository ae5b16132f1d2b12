"""Rotary position embedding of Q and K, half-rotation form as in Hugging Face (Su et al. 2021, arXiv 2104.09864).

With halves (a, b) of a head: (a cos - b sin, b cos + a sin). Linear and orthogonal up to the scale in cos and sin, so
backward is the rotation by -sin and nothing but the tables is saved.
"""

import torch
from torch import Tensor

from megacpt_kernels.backend import block_of, jit, tl, use_triton


def rope_qk(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Rotates queries and keys.

    Args:
        q: [t, heads, d]. k: [t, kv_heads, d]. Any strides between tokens and heads.
        cos, sin: [t, d / 2], the rows of each token's position, in q's type.
    Returns:
        New tensors of the same shapes.
    """
    if cos.shape != (q.shape[0], q.shape[2] // 2) or sin.shape != cos.shape:
        raise ValueError(f"cos has shape {tuple(cos.shape)}; q {tuple(q.shape)} needs {(q.shape[0], q.shape[2] // 2)}.")
    return _Rope.apply(q, k, cos, sin, use_triton(backend, q))


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, fast: bool):
        ctx.save_for_backward(cos, sin)
        ctx.rotate = _rotate_triton if fast else _rotate_both
        return ctx.rotate(q, k, cos, sin, 1)

    @staticmethod
    def backward(ctx, dq: Tensor, dk: Tensor):
        return *ctx.rotate(dq, dk, *ctx.saved_tensors, -1), None, None, None


def _rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    sin = sin if sign > 0 else -sin
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    left, right = out.chunk(2, dim=-1)
    torch.mul(a, cos, out=left).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=right).addcmul_(a, sin)
    return out


def _rotate_triton(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    """Q and K in one launch, a program a token."""
    q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
    cos, sin = cos.contiguous(), sin.contiguous()
    out_q, out_k = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    if q.shape[0]:
        half = q.shape[2] // 2
        _rotate_kernel[(q.shape[0],)](
            q, k, out_q, out_k, cos, sin, q.stride(0), q.stride(1), k.stride(0), k.stride(1), q.shape[1], k.shape[1], half,
            SIGN=sign, HALF=block_of(half), HEADS=min(16, block_of(max(q.shape[1], 1))), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out_q, out_k


@jit
def _rotate_kernel(
    q, k, out_q, out_k, cos, sin, q_token, q_head, k_token, k_head, q_heads, k_heads, half,
    SIGN: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, HALF)
    c = tl.load(cos + token * half + at, mask=at < half, other=0.0).to(tl.float32)[None, :]
    s = tl.load(sin + token * half + at, mask=at < half, other=0.0).to(tl.float32)[None, :] * SIGN
    _rotate_heads(q + token * q_token, out_q + token * q_heads * 2 * half, q_head, q_heads, half, c, s, HALF, HEADS)
    _rotate_heads(k + token * k_token, out_k + token * k_heads * 2 * half, k_head, k_heads, half, c, s, HALF, HEADS)


@jit
def _rotate_heads(x, out, stride, heads, half, c, s, HALF: tl.constexpr, HEADS: tl.constexpr):
    """One token's heads; out is contiguous."""
    at = tl.arange(0, HALF)
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)
        inside = (head < heads)[:, None] & (at < half)[None, :]
        place = x + head[:, None] * stride + at[None, :]
        a = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
        target = out + head[:, None] * 2 * half + at[None, :]
        tl.store(target, (a * c - b * s).to(out.dtype.element_ty), mask=inside)
        tl.store(target + half, (b * c + a * s).to(out.dtype.element_ty), mask=inside)
