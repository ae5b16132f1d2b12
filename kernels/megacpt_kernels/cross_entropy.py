"""Cross-entropy over a vocabulary that ranks share: softmax statistics in at least fp32, the gradient in the logits' place.

Each rank makes one pass over its columns (online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867) and has three numbers a
token: maximum, sum of exponentials relative to it, the target's logit. One collective brings together all ranks' numbers, through
a `gather` function, so that the operation itself knows nothing of process groups. Backward reads the logits once more and
writes over them: 6 bytes a bf16 logit in all, nothing of the logits' size beside them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megacpt_kernels.backend import block_of, jit, operation, same_device, tl, triton, use_triton, wide_of

IGNORE = -100


def cross_entropy_(
    logits: Tensor,
    target: Tensor,
    vocab_start: int,
    valid: int,
    grad_weights: Tensor | None,
    gather: Callable[[Tensor], Tensor] = lambda statistics: statistics[None],
    z_loss: float = 0.0,
    backend: str = "auto",
    check: bool = False,
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihoods, and, with `grad_weights`, the gradient of their weighted sum written over `logits`.

    Args:
        logits: [t, v], this rank's columns; overwritten.
        target: int64 [t], global ids, -100 for tokens without label.
        vocab_start: global id of column 0. valid: columns that are real; the padding behind gets no probability.
        grad_weights: float32 or float64 [t], of any sign, the same on all ranks of the vocabulary: the gradient is that of
            sum_t grad_weights[t] nll[t]. Not read where there is no label. None for no gradient.
        gather: [3, t] of this rank -> [ranks, 3, t], over the ranks of the vocabulary.
        z_loss: weight of lse^2, which is added to each nll (PaLM, Chowdhery et al. 2022, section 5).
        check: also look at the values of the targets (waits for the device).
    Returns:
        (nll [t] without weights, 0 where ignored; lse [t]), at least fp32.
    """
    _check(logits, target, valid)
    if grad_weights is not None:
        check_weights(grad_weights, target)
    fast, column = use_triton(backend, logits), target - vocab_start
    if check:
        check_targets(target, column, valid, gather)
    wide = logits if fast else wide_of(logits)
    statistics = _statistics_triton(logits, column, valid) if fast else _statistics_(wide, column, valid)
    lse, hits = combined(gather(statistics))
    has_label = target != IGNORE
    nll = torch.where(has_label, lse - hits + z_loss * lse.square(), torch.zeros_like(lse))
    if grad_weights is not None:
        hit = torch.where(has_label, grad_weights.to(lse.dtype), torch.zeros_like(lse))
        factor = hit * (1 + 2 * z_loss * lse)
        if fast:
            _gradient_triton_(logits, column, valid, lse, factor, hit)
        else:
            _gradient_(wide, column, valid, factor * (statistics[0] - lse).exp(), hit)
            if wide is not logits:
                logits.copy_(wide)
    return nll, lse


def combined(statistics: Tensor) -> tuple[Tensor, Tensor]:
    """[parts, 3, t], maximum, sum of exponentials and target's logit of parts of the vocabulary -> (lse [t], target's logit [t])."""
    maximum, sums, hits = statistics.unbind(1)
    largest = maximum.amax(0)
    return largest + (sums * (maximum - largest).exp()).sum(0).log(), hits.sum(0)


def _check(logits: Tensor, target: Tensor, valid: int) -> None:
    if (
        logits.ndim != 2
        or target.shape != logits.shape[:1]
        or target.dtype != torch.int64
        or not 0 <= valid <= logits.shape[1]
    ):
        raise ValueError(
            f"logits {tuple(logits.shape)}, target {tuple(target.shape)} {target.dtype}, {valid} columns real: they are [t, v], int64 [t], "
            "at most v."
        )
    if not logits.is_contiguous():
        raise ValueError(f"logits have strides {logits.stride()}; they are written over, so they must be contiguous.")
    same_device(logits=logits, target=target)


def label_weights(target: Tensor, weight: float = 1.0) -> Tensor:
    """float32 [t]: `weight` where a label is, else 0. The token weights of a plain sum or mean."""
    return (target != IGNORE).float() * weight


def check_weights(weights: Tensor, target: Tensor) -> None:
    """Raises ValueError if these cannot be the weights of the tokens that `target` [t] labels."""
    if weights.shape != target.shape or weights.dtype not in (torch.float32, torch.float64) or weights.requires_grad:
        raise ValueError(
            f"weights {tuple(weights.shape)} {weights.dtype}{', with a gradient' * weights.requires_grad}, target "
            f"{tuple(target.shape)}: there is one weight a token, float32 or float64, and none gets a gradient (detach them)."
        )
    same_device(weights=weights, target=target)


def check_targets(target: Tensor, column: Tensor, valid: int, gather: Callable[[Tensor], Tensor]) -> None:
    """Raises ValueError if a target with a label belongs to no rank. Waits for the device."""
    mine = ((column >= 0) & (column < valid)).float()
    homeless = (target != IGNORE) & (gather(mine.expand(3, -1).contiguous())[:, 0].sum(0) == 0)
    if homeless.any():
        at = int(homeless.nonzero()[0])
        raise ValueError(
            f"{int(homeless.sum())} targets outside the vocabulary, the first {int(target[at])} at token {at}."
        )


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


@operation(
    "cross_entropy_statistics(Tensor logits, Tensor column, int valid) -> Tensor",
    lambda logits, column, valid: logits.new_empty((3, logits.shape[0]), dtype=torch.float32),
)
def _statistics_triton(logits: Tensor, column: Tensor, valid: int) -> Tensor:
    out = torch.empty(3, len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        block = min(4096, max(16, block_of(valid)))
        _statistics_kernel[(len(logits),)](
            logits, column, out, logits.stride(0), valid, len(logits), BLOCK=block, num_warps=8, enable_fp_fusion=True
        )
    return out


@operation(
    "cross_entropy_gradient_(Tensor(a!) logits, Tensor column, int valid, Tensor lse, Tensor factor, Tensor hit) -> ()",
    lambda logits, column, valid, lse, factor, hit: None,
)
def _gradient_triton_(logits: Tensor, column: Tensor, valid: int, lse: Tensor, factor: Tensor, hit: Tensor) -> None:
    rows, columns = logits.shape
    if rows and columns:
        block = min(4096, block_of(columns))
        _gradient_kernel[(rows, triton.cdiv(columns, block))](
            logits, column, lse, factor, hit, logits.stride(0), columns, valid, BLOCK=block, num_warps=8, enable_fp_fusion=True
        )  # fmt: skip


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
