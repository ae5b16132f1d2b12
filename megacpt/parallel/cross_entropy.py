"""Head and loss over a vocabulary that tp ranks share: `megacpt_kernels.linear_cross_entropy` with the collectives and the products of
the tensor axis.

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

from megacpt.parallel.collectives import start_gather, start_scatter_sum
from megacpt.parallel.gemm import OneMatrix
from megacpt.parallel.sharded import local_part
from megacpt.parallel.tensor import NamedParameter, TensorAxis, local_with_grad


def linear_cross_entropy(
    x: Tensor,
    head: NamedParameter,
    target: Tensor,
    vocab_size: int,
    axis: TensorAxis,
    token_weights: Tensor,
    scale: float,
    backend: str = "auto",
) -> Tensor:
    """scale * sum of the negative log-likelihoods of this rank's T tokens, each times its weight. At least fp32.

    Args:
        x: [t, h], the final norm's output. head: of a weight [v, h], this rank's rows.
        target: int64 [T], -100 without label. vocab_size: the true size; padding rows get no probability.
        token_weights: float32 or float64 [T], the same on all tp ranks; 0 for no loss and no gradient.
    """
    columns, gemm = _columns(local_part(head.weight), vocab_size, axis.group), OneMatrix(axis.gemm, head.name)
    ranks, local = _ranks(axis.group), local_with_grad(head.weight)
    return head_and_loss(x, local, target, *columns, token_weights, ranks, scale=scale, backend=backend, gemm=gemm)


@torch.no_grad()
def token_losses(
    x: Tensor, head: NamedParameter, target: Tensor, vocab_size: int, axis: TensorAxis, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(negative log-likelihood of each token [T], at least fp32, 0 without label; whether its label is the most probable, bool [T]).
    No gradient, no logits on a GPU."""
    lse, logit, largest = _label_logits(x, head, target, vocab_size, axis, backend)
    has_label = target != IGNORE
    return torch.where(has_label, lse - logit, torch.zeros_like(lse)), has_label & (logit >= largest)


@torch.no_grad()
def log_probs(
    x: Tensor, head: NamedParameter, target: Tensor, vocab_size: int, axis: TensorAxis, backend: str = "auto"
) -> Tensor:
    """The log-probability of each label [T], at least fp32, 0 without label; the same on all tp ranks. No gradient, no logits on a GPU."""
    lse, logit, _ = _label_logits(x, head, target, vocab_size, axis, backend)
    return torch.where(target != IGNORE, logit - lse, torch.zeros_like(lse))


def _label_logits(
    x: Tensor, head: NamedParameter, target: Tensor, vocab_size: int, axis: TensorAxis, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """As `linear_lse`, over the vocabulary of all tp ranks."""
    local, gemm = local_part(head.weight), OneMatrix(axis.gemm, head.name)
    columns = _columns(local, vocab_size, axis.group)
    return linear_lse(x, local, target, *columns, _ranks(axis.group), backend=backend, gemm=gemm)


def _ranks(group: dist.ProcessGroup) -> Ranks:
    start = functools.partial(start_gather, group=group)
    return Ranks(group.size(), start, functools.partial(start_scatter_sum, group=group))


def _columns(weight: Tensor, vocab_size: int, group: dist.ProcessGroup) -> tuple[int, int]:
    """(first id, number of real rows) of this rank's part of the vocabulary."""
    start = group.rank() * weight.shape[0]
    return start, max(0, min(weight.shape[0], vocab_size - start))
