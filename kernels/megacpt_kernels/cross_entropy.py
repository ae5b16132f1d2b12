"""Cross-entropy over a vocabulary that ranks share: softmax statistics in at least fp32, the gradient in the logits' place.

Each rank makes one pass over its columns (online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867) and has three numbers a
token: maximum, sum of exponentials relative to it, the target's logit. One collective brings together all ranks' numbers, through
a `gather` function, so that the operation itself knows nothing of process groups. Backward reads the logits once more and
writes over them: 6 bytes a bf16 logit in all, nothing of the logits' size beside them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megacpt_kernels.backend import jit, tl, triton, use_triton, wide_of

IGNORE = -100


def cross_entropy_(
    logits: Tensor,
    target: Tensor,
    vocab_start: int,
    valid: int,
    grad_scale: float | None,
    gather: Callable[[Tensor], Tensor] = lambda statistics: statistics[None],
    z_loss: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihoods, and, with `grad_scale`, their gradient written over `logits`.

    Args:
        logits: [t, v], this rank's columns; overwritten.
        target: int64 [t], global ids, -100 for tokens without label.
        vocab_start: global id of column 0. valid: columns that are real; the padding behind gets no probability.
        grad_scale: factor of the gradient, or None for none.
        gather: [3, t] of this rank -> [ranks, 3, t], over the ranks of the vocabulary.
        z_loss: weight of lse^2, which is added to the loss (PaLM, Chowdhery et al. 2022, section 5).
    Returns:
        (nll [t], 0 where ignored; lse [t]), at least fp32.
    """
    fast, column = use_triton(backend, logits), target - vocab_start
    wide = None if fast else wide_of(logits)
    statistics = _statistics_triton(logits, column, valid) if fast else _statistics_(wide, column, valid)
    maximum, sums, hits = gather(statistics).unbind(1)
    largest = maximum.amax(0)
    lse = largest + (sums * (maximum - largest).exp()).sum(0).log()
    has_label = target != IGNORE
    nll = torch.where(has_label, lse - hits.sum(0) + z_loss * lse.square(), torch.zeros_like(lse))
    if grad_scale is not None:
        factor = has_label * (grad_scale * (1 + 2 * z_loss * lse))
        hit = has_label.to(lse.dtype) * grad_scale
        if fast:
            _gradient_triton_(logits, column, valid, lse, factor, hit)
        else:
            _gradient_(wide, column, valid, factor * (statistics[0] - lse).exp(), hit)
            if wide is not logits:
                logits.copy_(wide)
    return nll, lse


def _statistics_(wide: Tensor, column: Tensor, valid: int) -> Tensor:
    """[3, t]: maximum, sum of exponentials relative to it, the target's logit or 0; of the first `valid` columns. Leaves the
    exponentials in `wide`."""
    if valid < wide.shape[1]:
        wide[:, valid:] = float("-inf")
    if valid == 0:
        wide.zero_()
        return wide.new_zeros(3, len(wide)).index_fill_(
            0, torch.zeros(1, dtype=torch.long, device=wide.device), float("-inf")
        )
    maximum = wide.amax(-1)
    mine = (column >= 0) & (column < valid)
    hit = wide.gather(1, column.clamp(0, valid - 1).unsqueeze(1)).squeeze(1)
    sums = wide.sub_(maximum.unsqueeze(1)).exp_().sum(-1)
    return torch.stack([maximum, sums, torch.where(mine, hit, torch.zeros_like(hit))])


def _gradient_(wide: Tensor, column: Tensor, valid: int, factor: Tensor, hit: Tensor) -> None:
    """From the exponentials, in their place."""
    wide.mul_(factor.unsqueeze(1))
    if valid:
        mine = (column >= 0) & (column < valid)
        wide.scatter_add_(1, column.clamp(0, valid - 1).unsqueeze(1), (-hit * mine).unsqueeze(1))


def _statistics_triton(logits: Tensor, column: Tensor, valid: int) -> Tensor:
    out = torch.empty(3, len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        block = min(4096, max(16, triton.next_power_of_2(valid)))
        _statistics_kernel[(len(logits),)](
            logits, column, out, logits.stride(0), valid, len(logits), BLOCK=block, num_warps=8, enable_fp_fusion=True
        )
    return out


def _gradient_triton_(logits: Tensor, column: Tensor, valid: int, lse: Tensor, factor: Tensor, hit: Tensor) -> None:
    rows, columns = logits.shape
    if rows and columns:
        block = min(4096, triton.next_power_of_2(columns))
        _gradient_kernel[(rows, triton.cdiv(columns, block))](
            logits,
            column,
            lse,
            factor,
            hit,
            logits.stride(0),
            columns,
            valid,
            BLOCK=block,
            num_warps=8,
            enable_fp_fusion=True,
        )


@jit
def _statistics_kernel(logits, column, out, stride, valid, rows, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    wanted = tl.load(column + row)
    lanes = tl.arange(0, BLOCK)
    maximum = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    hit = tl.full((), 0.0, tl.float32)
    for begin in range(0, valid, BLOCK):
        at = begin + lanes
        x = tl.load(logits + row * stride + at, mask=at < valid, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(maximum, tl.max(x, 0))
        total = total * tl.exp(maximum - larger) + tl.sum(tl.exp(x - larger), 0)
        # a target of the next rank may fall on a padded lane here: that lane is no hit
        hit += tl.sum(tl.where((at == wanted) & (at < valid), x, 0.0), 0)
        maximum = larger
    tl.store(out + row, maximum)
    tl.store(out + rows + row, total)
    tl.store(out + 2 * rows + row, hit)


@jit
def _gradient_kernel(logits, column, lse, factor, hit, stride, columns, valid, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = logits + row * stride + at
    x = tl.load(place, mask=at < valid, other=float("-inf")).to(tl.float32)
    grad = tl.exp(x - tl.load(lse + row)) * tl.load(factor + row)
    grad -= tl.where((at == tl.load(column + row)) & (at < valid), tl.load(hit + row), 0.0)
    tl.store(place, grad.to(logits.dtype.element_ty), mask=at < columns)
