"""Next-token prediction: the mean negative log-likelihood of a step's labels, each as heavy as the data says."""

from dataclasses import dataclass
from typing import ClassVar

import torch.distributed as dist
from torch import Tensor

from megacpt.data.loader import StepCounts
from megacpt.objective.base import Targets, Weighted


@dataclass(frozen=True)
class NextToken:
    """sum_t w_t nll_t / sum_t w_t over the labels of the whole step."""

    sums: ClassVar[tuple[str, ...]] = ("loss",)
    needs_log_probs: ClassVar[bool] = False

    def normalizer(self, counts: StepCounts) -> float:
        return counts.weight or 1.0  # a step without labels has no loss

    def weights(self, log_p: Tensor | None, targets: Targets, group: dist.ProcessGroup) -> Weighted:
        return Weighted(targets.weights)


NEXT_TOKEN = NextToken()
