"""Collectives over the first dimension, without autograd; groups of one rank cost nothing."""

import torch.distributed as dist
from torch import Tensor

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def gather_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[t, …] of each rank -> [t * size, …] in rank order."""
    if group.size() == 1:
        return x
    out = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
    _all_gather(out, x.contiguous(), group=group)
    return out


def scatter_sum_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over the ranks of [T, …]; each keeps its [T / size, …]."""
    if group.size() == 1:
        return x
    out = x.new_empty((x.shape[0] // group.size(), *x.shape[1:]))
    _reduce_scatter(out, x.contiguous(), group=group)
    return out


def all_reduce(x: Tensor, operation: str, group: dist.ProcessGroup) -> Tensor:
    """In place. operation: "sum" or "max"."""
    if group.size() > 1:
        dist.all_reduce(x, {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}[operation], group=group)
    return x
