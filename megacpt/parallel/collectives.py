"""Collectives over the first dimension, without autograd; groups of one rank cost nothing."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass
class Pending:
    """A collective under way. Its tensor is whole after `wait`, which on a GPU holds up the stream, not the host."""

    tensor: Tensor
    work: dist.Work | None = None
    source: Tensor | None = None

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
            self.work = self.source = None
        return self.tensor


def start_gather(x: Tensor, group: dist.ProcessGroup) -> Pending:
    """Starts [t, …] of each rank -> [t * size, …] in rank order."""
    if group.size() == 1:
        return Pending(x)
    x = x.contiguous()
    out = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
    return Pending(out, _all_gather(out, x, group=group, async_op=True), x)


def start_scatter_sum(x: Tensor, group: dist.ProcessGroup) -> Pending:
    """Starts the sum over the ranks of [T, …], of which each keeps its [T / size, …]."""
    if group.size() == 1:
        return Pending(x)
    x = x.contiguous()
    out = x.new_empty((x.shape[0] // group.size(), *x.shape[1:]))
    return Pending(out, _reduce_scatter(out, x, group=group, async_op=True), x)


def gather_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[t, …] of each rank -> [t * size, …] in rank order."""
    return start_gather(x, group).wait()


def scatter_sum_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over the ranks of [T, …]; each keeps its [T / size, …]."""
    return start_scatter_sum(x, group).wait()
