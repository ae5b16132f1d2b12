"""Rotary position embedding of Q and K in one launch, half-rotation form as in Hugging Face (Su et al. 2021, arXiv 2104.09864).

With halves (a, b) of a head: (a cos - b sin, b cos + a sin). Linear and orthogonal up to the scale in cos and sin, so
backward is the rotation by -sin and nothing but the tables is saved.

Shapes: t tokens, d head size, p positions of the tables.
"""

import torch
from torch import Tensor

from megacpt_kernels.backend import block_of, jit, operation, same_device, tl, use_triton, wide_of


def rope_qk(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, backend: str = "auto", check: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotates queries and keys.

    Args:
        q: [t, heads, d]. k: [t, kv_heads, d]. Any strides between tokens and heads.
        cos, sin: fp32 [p, d / 2], contiguous. positions: int32 or int64 [t], any order, below p.
        check: also look at the values of the positions (waits for the device).
    Returns:
        New tensors of the same shapes.
    """
    _check(q, k, cos, sin, positions, check)
    return _Rope.apply(q, k, cos, sin, positions, use_triton(backend, q), False)


def rope_qk_(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, *, backend: str = "auto", check: bool = False
) -> tuple[Tensor, Tensor]:
    """The same in place, of q and k that are not views, in arguments and results. Not for what something else has saved or
    selective activation checkpointing keeps."""
    _check(q, k, cos, sin, positions, check)
    return _Rope.apply(q, k, cos, sin, positions, use_triton(backend, q), True)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, values: bool) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}, positions {tuple(positions.shape)}"
    if q.ndim != 3 or k.ndim != 3 or (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[2]) or q.shape[2] % 2:
        raise ValueError(f"{shapes}: q and k are [t, heads, d] of the same t and even d.")
    if cos.ndim != 2 or cos.shape != sin.shape or cos.shape[1] != q.shape[2] // 2 or positions.shape != q.shape[:1]:
        raise ValueError(f"{shapes}: cos and sin are [p, {q.shape[2] // 2}], positions [{q.shape[0]}].")
    if cos.dtype != torch.float32 or sin.dtype != torch.float32 or positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cos {cos.dtype}, sin {sin.dtype}, positions {positions.dtype}: they are float32, float32 and int32 or int64."
        )
    if q.dtype != k.dtype or not (cos.is_contiguous() and sin.is_contiguous()):
        raise ValueError(
            f"q {q.dtype}, k {k.dtype}, strides of cos {cos.stride()}, sin {sin.stride()}: one type, contiguous tables."
        )
    same_device(q=q, k=k, cos=cos, sin=sin, positions=positions)
    if (
        values
        and len(positions)
        and not 0 <= (low := int(positions.min())) <= (high := int(positions.max())) < len(cos)
    ):
        raise ValueError(f"positions {low} to {high}; the tables hold 0 to {len(cos) - 1}.")


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, fast: bool, in_place: bool):
        ctx.save_for_backward(cos, sin, positions)
        ctx.fast = fast
        if in_place:
            _rotate_(q, k, cos, sin, positions, 1, fast)
            ctx.mark_dirty(q, k)
            return q, k
        return _rotate(q, k, cos, sin, positions, 1, fast)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (dq, dk), (cos, sin, positions) = grads, ctx.saved_tensors
        return *_rotate(dq, dk, cos, sin, positions, -1, ctx.fast), *[None] * 5


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, sign: int, fast: bool):
    if fast:
        q, k = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k))
        return _launch(q, k, cos, sin, positions, sign)
    cos, sin = cos[positions][:, None], sin[positions][:, None] * sign
    return _rotate_torch(q, cos, sin), _rotate_torch(k, cos, sin)


def _rotate_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, sign: int, fast: bool) -> None:
    if not fast:
        for x, y in zip((q, k), _rotate(q, k, cos, sin, positions, sign, False), strict=True):
            x.copy_(y)
    elif q.stride(2) != 1 or k.stride(2) != 1:
        raise ValueError(f"strides of q {q.stride()}, k {k.stride()}: the last must be 1 to rotate in place.")
    else:
        _launch_(q, k, cos, sin, positions, sign)


def _rotate_torch(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide = wide_of(x)
    (a, b), cos, sin = wide.chunk(2, dim=-1), cos.to(wide.dtype), sin.to(wide.dtype)
    out = torch.empty_like(wide, memory_format=torch.contiguous_format)
    left, right = out.chunk(2, dim=-1)
    torch.mul(a, cos, out=left).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=right).addcmul_(a, sin)
    return out.to(x.dtype)


@operation(
    "rope_qk(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor positions, int sign) -> (Tensor, Tensor)",
    lambda q, k, cos, sin, positions, sign: (q.new_empty(q.shape), k.new_empty(k.shape)),
)
def _launch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, sign: int) -> tuple[Tensor, Tensor]:
    out_q, out_k = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    _start(q, k, out_q, out_k, cos, sin, positions, sign)
    return out_q, out_k


@operation(
    "rope_qk_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, Tensor positions, int sign) -> ()",
    lambda q, k, cos, sin, positions, sign: None,
)
def _launch_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, sign: int) -> None:
    _start(q, k, q, k, cos, sin, positions, sign)


def _start(q: Tensor, k: Tensor, out_q: Tensor, out_k: Tensor, cos, sin, positions, sign: int) -> None:
    """A program a token."""
    if q.shape[0]:
        half = q.shape[2] // 2
        strides = [stride for x in (q, k, out_q, out_k) for stride in x.stride()[:2]]
        _rotate_kernel[(q.shape[0],)](
            q, k, out_q, out_k, cos, sin, positions, *strides, q.shape[1], k.shape[1], half,
            SIGN=sign, HALF=block_of(half), HEADS=min(16, block_of(max(q.shape[1], 1))), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


@jit
def _rotate_kernel(
    q, k, out_q, out_k, cos, sin, positions, q_token, q_head, k_token, k_head, out_q_token, out_q_head, out_k_token, out_k_head,
    q_heads, k_heads, half, SIGN: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(positions + token).to(tl.int64) * half
    at = tl.arange(0, HALF)
    c = tl.load(cos + row + at, mask=at < half, other=0.0)[None, :]
    s = tl.load(sin + row + at, mask=at < half, other=0.0)[None, :] * SIGN
    _rotate_heads(
        q + token * q_token, out_q + token * out_q_token, q_head, out_q_head, q_heads, half, c, s, HALF, HEADS
    )
    _rotate_heads(
        k + token * k_token, out_k + token * out_k_token, k_head, out_k_head, k_heads, half, c, s, HALF, HEADS
    )


@jit
def _rotate_heads(x, out, stride, out_stride, heads, half, c, s, HALF: tl.constexpr, HEADS: tl.constexpr):
    """One token's heads. x may be out: both halves are read before either is written."""
    at = tl.arange(0, HALF)
    for first in range(0, heads, HEADS):
        head = first + tl.arange(0, HEADS)
        inside = (head < heads)[:, None] & (at < half)[None, :]
        place = x + head[:, None] * stride + at[None, :]
        a = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(place + half, mask=inside, other=0.0).to(tl.float32)
        target = out + head[:, None] * out_stride + at[None, :]
        tl.store(target, (a * c - b * s).to(out.dtype.element_ty), mask=inside)
        tl.store(target + half, (b * c + a * s).to(out.dtype.element_ty), mask=inside)
