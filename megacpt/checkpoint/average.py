"""Weighted means of checkpoints, shard by shard: Polyak averaging, and weights that stand for a decay of the learning rate (WSM, arXiv
2507.17634: merging n+0 … n+k with weights c equals a decay w of the gradients, c_0 = 1 - w_1, c_j = w_j - w_(j+1), c_k = w_k)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megacpt.checkpoint.load import load
from megacpt.optim.schedule import remaining
from megacpt.parallel.sharded import local_part


def average_weights(decay: str, count: int) -> list[float]:
    """Weights of `count` checkpoints, oldest first; they sum to 1. mean: equal."""
    if decay == "mean" or count == 1:
        return [1 / count] * count
    left = [remaining(decay, i / count) for i in range(1, count)]  # of the gradients between checkpoint i - 1 and i
    return [a - b for a, b in zip([1.0, *left], [*left, 0.0], strict=True)]


@torch.no_grad()
def average_into(parameters: dict[str, Any], directories: Sequence[Path], weights: Sequence[float]) -> None:
    """Fills parameters with the weighted mean of some checkpoints, summed in at least fp32. All ranks call it."""
    parts = {name: local_part(parameter) for name, parameter in parameters.items()}
    total = {
        name: torch.zeros_like(part, dtype=torch.promote_types(part.dtype, torch.float32))
        for name, part in parts.items()
    }
    for directory, weight in zip(directories, weights, strict=True):
        load(directory, {"model": parameters})
        for name, part in parts.items():
            total[name].add_(part, alpha=weight)
    for name, part in parts.items():
        part.copy_(total[name])
