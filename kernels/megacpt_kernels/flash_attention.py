"""Attention over packed documents in Triton: forward with log-sum-exp, backward without atomics (Dao 2023, arXiv 2307.08691).

Shapes: t_q queries, t_k keys, heads, kv heads, d head size; tiles of M queries and N keys.

Every query sees one contiguous range of keys, [first, last], and every key is seen by one contiguous range of queries; all four bounds
never fall along the sequence. So a tile of queries needs the keys from its least first to its greatest last: what lies before the
documents of a tile, or after its last query, is not read, and many short documents share a tile. Tiles that every query of the tile
sees whole are multiplied without a mask. Backward is two kernels, one a tile of keys (all query heads of the group inside it) and one a
tile of queries: sums have one order, results the same bits.
"""

# Triton annotates reductions as tuples, too, as those over several values give, which no kernel here has:
# pyright: reportOperatorIssue=false, reportOptionalOperand=false

import math

import torch
from torch import Tensor

from megacpt_kernels.backend import block_of, jit, tl, triton
from megacpt_kernels.device import DeviceProfile, profile_of

FORWARD = dict(M=128, N=64, num_warps=8, num_stages=3)
QUERIES = dict(M=128, N=64, num_warps=8, num_stages=2)
KEYS = dict(M=32, N=128, num_warps=8, num_stages=2)
"""Tiles, warps and stages of forward, backward of queries, backward of keys and values: bfloat16 and d <= 128."""
SMALL = dict(M=32, N=32, num_warps=4, num_stages=1)
"""Of all three for longer heads and fp32."""
_LOG2E = tl.constexpr(math.log2(math.e)) if triton else None
_BIG = tl.constexpr(2**31 - 1) if triton else None


AMPERE = dict(N=32)
"""What changes in the first two before Hopper, which has no warpgroup products."""


def tile(which: dict, q: Tensor, profile: DeviceProfile) -> dict:
    if q.element_size() > 2 or q.shape[2] > 128:
        return SMALL
    older = profile.kind == "cuda" and profile.capability < (9, 0)
    return which | AMPERE if older and which is not KEYS else which


def forward(q: Tensor, k: Tensor, v: Tensor, key_range: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Args:
        q: [t_q, heads, d]. k, v: [t_k, kv, d]. Any strides but of the last dim.
        key_range: int32 [2, t_q], first and last key of each query. May not fall along the sequence; first > last is nothing.
    Returns:
        (out [t_q, heads, d], lse fp32 [heads, t_q]).
    """
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    tokens, heads, d = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    if q.numel():
        how = tile(FORWARD, q, profile_of(q.device))
        _forward_kernel[(triton.cdiv(tokens, how["M"]), heads)](
            q, k, v, key_range, out, lse, *_strides(q, k, v),
            tokens, scale, heads // k.shape[1], d, D=_width(d), enable_fp_fusion=True, **how
        )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    key_range: Tensor,
    query_range: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Args:
        dout, out: [t_q, heads, d]. lse: of `forward`. query_range: int32 [2, t_k], first and last query of each key. May not fall either.
    Returns:
        (dq, dk, dv), contiguous.
    """
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    dout, out = dout.contiguous(), out.contiguous()
    (tokens, heads, d), (keys, kv, _) = q.shape, k.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    by_query, by_key = (tile(which, q, profile_of(q.device)) for which in (QUERIES, KEYS))
    shape = (tokens, scale, heads // kv, d)
    if q.numel():
        _delta_kernel[(triton.cdiv(tokens, 32), heads)](
            out, dout, delta, tokens, heads, d, D=_width(d), M=32, num_warps=4, enable_fp_fusion=True
        )
        _queries_kernel[(triton.cdiv(tokens, by_query["M"]), heads)](
            q, k, v, key_range, dout, lse, delta, dq, *_strides(q, k, v),
            *shape, D=_width(d), enable_fp_fusion=True, **by_query
        )  # fmt: skip
    if k.numel():
        _keys_kernel[(triton.cdiv(keys, by_key["N"]), kv)](
            q, k, v, key_range, query_range, dout, lse, delta, dk, dv, *_strides(q, k, v),
            keys, *shape, D=_width(d), enable_fp_fusion=True,
            **by_key,
        )  # fmt: skip
    return dq, dk, dv


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:2]]


def _width(d: int) -> int:
    return max(16, block_of(d))


@jit
def _forward_kernel(
    q, k, v, key_range, out, lse, q_token, q_head, k_token, k_head, v_token, v_head, tokens, scale, group, d,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    row, inside, first, last, begin, masked, whole, tiles = _range_of(key_range, tokens, tl.program_id(0), M, N)
    lane = tl.arange(0, D)
    both = inside[:, None] & (lane < d)[None, :]
    query = tl.load(q + row[:, None] * q_token + head * q_head + lane[None, :], mask=both, other=0.0)
    k += (head // group) * k_head
    v += (head // group) * v_head
    factor = scale * _LOG2E
    maximum, total = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32)
    result = tl.zeros((M, D), tl.float32)
    maximum, total, result = _attend(
        maximum, total, result, query, k, v, first, last, begin, 0, masked, k_token, v_token, d, factor, True, D, N
    )
    maximum, total, result = _attend(
        maximum, total, result, query, k, v, first, last, begin, masked, whole, k_token, v_token, d, factor, False, D, N
    )
    maximum, total, result = _attend(
        maximum, total, result, query, k, v, first, last, begin, whole, tiles, k_token, v_token, d, factor, True, D, N
    )
    result = result / tl.where(total > 0, total, 1.0)[:, None]
    target = out + (row[:, None] * tl.num_programs(1) + head) * d + lane[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=both)
    tl.store(lse + head * tokens + row, (maximum + tl.log2(tl.where(total > 0, total, 1.0))) / _LOG2E, mask=inside)


@jit
def _attend(
    maximum, total, result, query, k, v, first, last, begin, start, stop, k_token, v_token, d, factor,
    MASKED: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Takes tiles [start, stop) of keys, from `begin`, into the online softmax."""
    lane = tl.arange(0, D)
    for i in range(start, stop):
        at = begin + i * N + tl.arange(0, N)
        keys, values = _tile_of(k, at, last, k_token, lane, d, MASKED), _tile_of(v, at, last, v_token, lane, d, MASKED)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * factor
        if MASKED:
            visible = (at[None, :] >= first[:, None]) & (at[None, :] <= last[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        larger = tl.maximum(maximum, tl.max(scores, 1))
        base = larger
        if MASKED:
            base = tl.where(larger == float("-inf"), 0.0, larger)
        weight = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(maximum - base)
        total = total * shrink + tl.sum(weight, 1)
        result = tl.dot(weight.to(values.dtype), values, result * shrink[:, None], input_precision="ieee")
        maximum = larger
    return maximum, total, result


@jit
def _range_of(bounds, count, program, M: tl.constexpr, N: tl.constexpr):
    """What a tile of M rows has to do with the other side: (rows, inside, their first and last, where its tiles of N begin, how many
    are masked before the whole ones, where the whole ones end, how many there are)."""
    row = program.to(tl.int64) * M + tl.arange(0, M)
    inside = row < count
    first = tl.load(bounds + row, mask=inside, other=_BIG)
    last = tl.load(bounds + count + row, mask=inside, other=-1)
    begin, end = tl.min(first, 0), tl.max(last, 0) + 1
    all_from = tl.max(tl.where(inside, first, -1), 0)
    all_to = tl.min(tl.where(inside, last, _BIG - 1), 0) + 1
    tiles = tl.cdiv(tl.maximum(end - begin, 0), N)
    masked = tl.minimum(tl.cdiv(tl.maximum(all_from - begin, 0), N), tiles)
    whole = tl.minimum(tl.maximum(tl.maximum(all_to - begin, 0) // N, masked), tiles)
    return row, inside, first, last, begin, masked, whole, tiles


@jit
def _tile_of(x, at, last, stride, lane, d, MASKED: tl.constexpr):
    """Rows `at` of x; where masked, those behind the greatest of `last` are 0."""
    inside = (lane < d)[None, :]
    if MASKED:
        inside = inside & (at <= tl.max(last, 0))[:, None]
    return tl.load(x + at.to(tl.int64)[:, None] * stride + lane[None, :], mask=inside, other=0.0)


@jit
def _delta_kernel(out, dout, delta, tokens, heads, d, D: tl.constexpr, M: tl.constexpr):
    """The row sums of out * dout."""
    head = tl.program_id(1).to(tl.int64)
    row, lane = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M), tl.arange(0, D)
    inside = row < tokens
    at = (row[:, None] * heads + head) * d + lane[None, :]
    both = inside[:, None] & (lane < d)[None, :]
    product = tl.load(out + at, mask=both, other=0.0).to(tl.float32) * tl.load(dout + at, mask=both, other=0.0).to(
        tl.float32
    )
    tl.store(delta + head * tokens + row, tl.sum(product, 1), mask=inside)


@jit
def _queries_kernel(
    q, k, v, key_range, dout, lse, delta, dq, q_token, q_head, k_token, k_head, v_token, v_head, tokens, scale, group, d,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    head, heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    row, inside, first, last, begin, masked, whole, tiles = _range_of(key_range, tokens, tl.program_id(0), M, N)
    lane = tl.arange(0, D)
    both = inside[:, None] & (lane < d)[None, :]
    query = tl.load(q + row[:, None] * q_token + head * q_head + lane[None, :], mask=both, other=0.0)
    grad = tl.load(dout + (row[:, None] * heads + head) * d + lane[None, :], mask=both, other=0.0)
    normal = tl.load(lse + head * tokens + row, mask=inside, other=0.0) * _LOG2E
    offset = tl.load(delta + head * tokens + row, mask=inside, other=0.0)
    k += (head // group) * k_head
    v += (head // group) * v_head
    result = tl.zeros((M, D), tl.float32)
    result = _into_queries(result, query, grad, normal, offset, k, v, first, last, begin, 0, masked, k_token, v_token, d,
                           scale, True, D, N)  # fmt: skip
    result = _into_queries(result, query, grad, normal, offset, k, v, first, last, begin, masked, whole, k_token, v_token, d,
                           scale, False, D, N)  # fmt: skip
    result = _into_queries(result, query, grad, normal, offset, k, v, first, last, begin, whole, tiles, k_token, v_token, d,
                           scale, True, D, N)  # fmt: skip
    target = dq + (row[:, None] * heads + head) * d + lane[None, :]
    tl.store(target, (result * scale).to(dq.dtype.element_ty), mask=both)


@jit
def _into_queries(
    result, query, grad, normal, offset, k, v, first, last, begin, start, stop, k_token, v_token, d, scale,
    MASKED: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, D)
    for i in range(start, stop):
        at = begin + i * N + tl.arange(0, N)
        keys, values = _tile_of(k, at, last, k_token, lane, d, MASKED), _tile_of(v, at, last, v_token, lane, d, MASKED)
        weight = tl.exp2(tl.dot(query, tl.trans(keys), input_precision="ieee") * (scale * _LOG2E) - normal[:, None])
        if MASKED:
            visible = (at[None, :] >= first[:, None]) & (at[None, :] <= last[:, None])
            weight = tl.where(visible, weight, 0.0)
        dscores = weight * (tl.dot(grad, tl.trans(values), input_precision="ieee") - offset[:, None])
        result = tl.dot(dscores.to(keys.dtype), keys, result, input_precision="ieee")
    return result


@jit
def _keys_kernel(
    q, k, v, key_range, query_range, dout, lse, delta, dk, dv,
    q_token, q_head, k_token, k_head, v_token, v_head, keys, tokens, scale, group, d,
    D: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    kv, kvs = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    at, inside, first, last, begin, _masked, _whole, tiles = _range_of(query_range, keys, tl.program_id(0), N, M)
    lane = tl.arange(0, D)
    both = inside[:, None] & (lane < d)[None, :]
    key = tl.load(k + at[:, None] * k_token + kv * k_head + lane[None, :], mask=both, other=0.0)
    value = tl.load(v + at[:, None] * v_token + kv * v_head + lane[None, :], mask=both, other=0.0)
    into_key, into_value = tl.zeros((N, D), tl.float32), tl.zeros((N, D), tl.float32)
    until = tl.max(last, 0)
    row_stride = kvs * group * d
    for i in range(0, group * tiles):  # all query heads of the group, one after the other
        head = kv * group + i // tiles
        row = begin + (i % tiles) * M + tl.arange(0, M)
        real = row <= until
        loaded = real[:, None] & (lane < d)[None, :]
        row = row.to(tl.int64)
        query = tl.load(q + head * q_head + row[:, None] * q_token + lane[None, :], mask=loaded, other=0.0)
        grad = tl.load(dout + head * d + row[:, None] * row_stride + lane[None, :], mask=loaded, other=0.0)
        normal = tl.load(lse + head * tokens + row, mask=real, other=0.0) * _LOG2E
        offset = tl.load(delta + head * tokens + row, mask=real, other=0.0)
        weight = tl.exp2(tl.dot(key, tl.trans(query), input_precision="ieee") * (scale * _LOG2E) - normal[None, :])
        visible = (row[None, :] >= first[:, None]) & (row[None, :] <= last[:, None])
        weight = tl.where(visible, weight, 0.0)
        into_value = tl.dot(weight.to(grad.dtype), grad, into_value, input_precision="ieee")
        dscores = weight * (tl.dot(value, tl.trans(grad), input_precision="ieee") - offset[None, :])
        into_key = tl.dot(dscores.to(query.dtype), query, into_key, input_precision="ieee")
    target = (at[:, None] * kvs + kv) * d + lane[None, :]
    tl.store(dk + target, (into_key * scale).to(dk.dtype.element_ty), mask=both)
    tl.store(dv + target, into_value.to(dv.dtype.element_ty), mask=both)
