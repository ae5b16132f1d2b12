"""Head and loss over a vocabulary that tp ranks share: `megacpt_kernels.linear_cross_entropy` with the collectives of a group.

Shapes: t local tokens, T = t * tp, h hidden, v vocabulary rows of this tp rank.
"""

import functools

import torch
import torch.distributed as dist
from megacpt_kernels import linear_cross_entropy as head_and_loss
from megacpt_kernels import linear_lse
from megacpt_kernels.cross_entropy import IGNORE
from megacpt_kernels.linear_cross_entropy import Ranks
from torch import Tensor
from torch.distributed.tensor import DTensor

from megacpt.parallel.collectives import start_gather, start_scatter_sum
from megacpt.parallel.tensor import replicated


def linear_cross_entropy(
    x: Tensor,
    weight: DTensor,
    target: Tensor,
    vocab_size: int,
    group: dist.ProcessGroup,
    scale: float,
    backend: str = "auto",
) -> Tensor:
    """scale * sum of the negative log-likelihoods of this rank's T tokens. At least fp32.

    Args:
        x: [t, h], the final norm's output. weight: [v, h], this rank's rows of the head.
        target: int64 [T], -100 without label. vocab_size: the true size; padding rows get no probability.
    """
    columns = _columns(weight._local_tensor, vocab_size, group)
    return head_and_loss(x, replicated(weight), target, *columns, scale, _ranks(group), backend=backend)


@torch.no_grad()
def token_losses(
    x: Tensor, weight: DTensor, target: Tensor, vocab_size: int, group: dist.ProcessGroup, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(negative log-likelihood of each token [T], at least fp32, 0 without label; whether its label is the most probable, bool [T]).
    No gradient, no logits on a GPU."""
    local = weight._local_tensor
    columns = _columns(local, vocab_size, group)
    lse, logit, largest = linear_lse(x, local, target, *columns, _ranks(group), backend=backend)
    has_label = target != IGNORE
    return torch.where(has_label, lse - logit, torch.zeros_like(lse)), has_label & (logit >= largest)


def _ranks(group: dist.ProcessGroup) -> Ranks:
    start = functools.partial(start_gather, group=group)
    return Ranks(group.size(), start, functools.partial(start_scatter_sum, group=group))


def _columns(weight: Tensor, vocab_size: int, group: dist.ProcessGroup) -> tuple[int, int]:
    """(first id, number of real rows) of this rank's part of the vocabulary."""
    start = group.rank() * weight.shape[0]
    return start, max(0, min(weight.shape[0], vocab_size - start))
