"""Items are documents that a loss looks at together (one alone, a pair, a group, a conversation). All documents of an item are in one
micro-batch; context ranks may share any of them.

Shapes: T tokens of this context rank, n items of the micro-batch.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megacpt.parallel.collectives import gather_tokens


@dataclass(frozen=True)
class Items:
    """The items of a micro-batch, on the host: an objective that does not ask for them costs no copy.

    Attributes:
        of_token: int32 [T], the item of each of this rank's tokens, 0 … count - 1.
        count: items of the micro-batch over all context ranks.
    """

    of_token: np.ndarray
    count: int


def item_sums(values: Tensor, items: Items, group: dist.ProcessGroup) -> Tensor:
    """The sum of each item's values over the context ranks, float64 [n], the same bits on all of them and in every run.

    A sum of 100,000 log-probabilities would lose in fp32 what a difference of two such sums is about. The order is fixed: tokens in a
    rank's order, then the ranks; nothing waits for the device.

    Args:
        values: [T]. group: the context ranks; all of them call at once.
    """
    order = np.argsort(items.of_token, kind="stable")
    lengths = np.bincount(items.of_token, minlength=items.count)
    sorted_values = values.double().index_select(0, _to_device(order, values))
    own = torch.segment_reduce(sorted_values, "sum", lengths=_to_device(lengths, values), unsafe=True)
    return gather_tokens(own.unsqueeze(0), group).sum(0)


def spread_to_tokens(values: Tensor, items: Items) -> Tensor:
    """[n], a value an item -> [T], at each of its tokens."""
    return values.index_select(0, _to_device(items.of_token, values))


def counted_once(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """What all context ranks know alike, as parts that sum to it: the first rank's is all of it, the others' are zero."""
    return values if group.rank() == 0 else torch.zeros_like(values)


def _to_device(array: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(array).to(like.device, non_blocking=True)
