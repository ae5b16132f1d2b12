"""Rows of a table of which ranks may hold parts; backward sums in one order, without atomics: the same bits twice.

Shapes: t tokens, v rows of this rank, h hidden.

Backward sorts the ids (stable, so equal ids keep the order of their tokens); the first place of each id's run sums the run.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megacpt_kernels.backend import jit, operation, same_device, tl, triton, use_triton, wide_of

_BLOCK = 512


def embedding(ids: Tensor, table: Tensor, start: int = 0, *, backend: str = "auto", check: int | None = None) -> Tensor:
    """Args:
        ids: int64 [t], global. table: [v, h], contiguous. start: id of row 0; other ranks' ids give zeros.
        check: the size of the whole vocabulary, against which values are looked at (waits for the device).
    Returns:
        [t, h].
    """
    if ids.ndim != 1 or table.ndim != 2 or ids.dtype != torch.int64 or not table.is_contiguous():
        raise ValueError(
            f"ids {tuple(ids.shape)} {ids.dtype}, table {tuple(table.shape)} with strides {table.stride()}: they are int64 [t] and "
            "contiguous [v, h]."
        )
    same_device(ids=ids, table=table)
    if check is not None and len(ids) and not 0 <= (low := int(ids.min())) <= (high := int(ids.max())) < check:
        raise ValueError(f"token ids {low} to {high}; the vocabulary has 0 to {check - 1}.")
    return _Embedding.apply(ids - start, table, use_triton(backend, table))


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, row: Tensor, table: Tensor, fast: bool) -> Tensor:
        ctx.rows, ctx.fast = table.shape[0], fast
        ctx.save_for_backward(row)
        if fast:
            return _launch_forward(row, table)
        outside = (row < 0) | (row >= len(table))
        return F.embedding(row.masked_fill(outside, 0), table).masked_fill_(outside.unsqueeze(1), 0)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (dy,) = grads
        (row,) = ctx.saved_tensors
        outside = (row < 0) | (row >= ctx.rows)
        if ctx.fast:
            ordered, order = torch.sort(row.masked_fill(outside, ctx.rows), stable=True)
            return None, _launch_backward(dy.contiguous(), ordered, order, ctx.rows), None
        wide = wide_of(dy).masked_fill(outside.unsqueeze(1), 0)
        dtable = torch.ops.aten.embedding_dense_backward(wide, row.masked_fill(outside, 0), ctx.rows, -1, False)
        return None, dtable.to(dy.dtype), None


@operation(
    "embedding_forward(Tensor row, Tensor table) -> Tensor",
    lambda row, table: table.new_empty((row.shape[0], table.shape[1])),
)
def _launch_forward(row: Tensor, table: Tensor) -> Tensor:
    out = torch.empty(len(row), table.shape[1], dtype=table.dtype, device=table.device)
    if out.numel():
        _forward_kernel[(len(row), triton.cdiv(table.shape[1], _BLOCK))](
            row, table, out, len(table), table.shape[1], BLOCK=_BLOCK, num_warps=1
        )
    return out


@operation(
    "embedding_backward(Tensor dy, Tensor ordered, Tensor order, int rows) -> Tensor",
    lambda dy, ordered, order, rows: dy.new_empty((rows, dy.shape[1])),
)
def _launch_backward(dy: Tensor, ordered: Tensor, order: Tensor, rows: int) -> Tensor:
    dtable = torch.zeros(rows, dy.shape[1], dtype=dy.dtype, device=dy.device)
    if dy.numel():
        _backward_kernel[(len(order), triton.cdiv(dy.shape[1], _BLOCK))](
            dy, ordered, order, dtable, len(order), rows, dy.shape[1], BLOCK=_BLOCK, num_warps=1
        )
    return dtable


@jit
def _forward_kernel(row, table, out, rows, columns, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = tl.load(row + token)
    width = tl.where((source >= 0) & (source < rows), columns, 0)
    value = tl.load(table + source * columns + at, mask=at < width, other=0.0)
    tl.store(out + token * columns + at, value, mask=at < columns)


@jit
def _backward_kernel(dy, ordered, order, dtable, tokens, rows, columns, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mine = tl.load(ordered + place)
    before = tl.where(place > 0, tl.load(ordered + tl.maximum(place - 1, 0)), -1)
    if (mine != before) & (mine < rows):
        total = tl.zeros((BLOCK,), tl.float32)
        there = mine
        while there == mine:
            token = tl.load(order + place)
            total += tl.load(dy + token * columns + at, mask=at < columns, other=0.0).to(tl.float32)
            place += 1
            there = tl.where(place < tokens, tl.load(ordered + tl.minimum(place, tokens - 1)), -1)
        tl.store(dtable + mine * columns + at, total.to(dtable.dtype.element_ty), mask=at < columns)
