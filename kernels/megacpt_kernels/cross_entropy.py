"""Cross-entropy over a vocabulary that ranks share: softmax statistics in at least fp32, the gradient in the logits' place.

The three numbers a token needs from all ranks (maximum, sum of exponentials, the target's logit) come through a
`reduce` function, so that the operation itself knows nothing of process groups.
"""

from collections.abc import Callable

import torch
from torch import Tensor

IGNORE = -100


def cross_entropy_(
    logits: Tensor,
    target: Tensor,
    vocab_start: int,
    valid: int,
    grad_scale: float | None,
    reduce: Callable[[Tensor, str], Tensor] = lambda tensor, operation: tensor,
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihoods, and, with `grad_scale`, their gradient written over `logits`.

    Args:
        logits: [t, v], this rank's columns; overwritten.
        target: int64 [t], global ids, -100 for tokens without label.
        vocab_start: global id of column 0. valid: columns that are real; the padding behind gets no probability.
        grad_scale: factor of the gradient, or None for none.
        reduce: all-reduces over the ranks of the vocabulary, operation "max" or "sum".
    Returns:
        (nll [t], 0 where ignored; lse [t]), at least fp32.
    """
    wide = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
    if valid < wide.shape[1]:
        wide[:, valid:] = float("-inf")
    maximum = reduce(wide.amax(-1) if valid > 0 else wide.new_full((len(wide),), float("-inf")), "max")
    local = target - vocab_start
    mine = (local >= 0) & (local < valid)
    column = local.clamp(0, wide.shape[1] - 1).unsqueeze(1)
    hit = torch.where(mine, wide.gather(1, column).squeeze(1) - maximum, 0)
    wide.sub_(maximum.unsqueeze(1)).exp_()
    sums = reduce(torch.stack([wide.sum(-1), hit]), "sum")
    log_sum = sums[0].log()
    has_label = target != IGNORE
    nll = torch.where(has_label, log_sum - sums[1], 0)
    if grad_scale is not None:
        factor = torch.where(has_label, grad_scale / sums[0], 0).unsqueeze(1)
        wide.mul_(factor)
        wide.scatter_add_(1, column, (mine & has_label).to(wide.dtype).mul_(-grad_scale).unsqueeze(1))
        if wide is not logits:
            logits.copy_(wide)
    return nll, log_sum + maximum
