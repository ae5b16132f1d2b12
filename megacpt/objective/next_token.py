"""Next-token prediction: the mean negative log-likelihood of a step's labels, each as heavy as the data says."""

from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist
from torch import Tensor

from megacpt.data.loader import StepCounts
from megacpt.objective.base import Targets, Weighted
from megacpt.parallel.items import item_sums, spread_to_tokens


@dataclass(frozen=True)
class NextToken:
    """Attributes:
    normalize: of the labels of the whole step,
        "weight": sum_t w_t nll_t / sum_t w_t;
        "token": sum_t w_t nll_t / the number of labels with w_t > 0;
        "item": the mean over items of (sum_t w_t nll_t / sum_t w_t over the item's labels). Those of an item whose weights are all 0
        are none.
    """

    normalize: Literal["weight", "token", "item"] = "weight"

    sums = ("loss",)
    needs_log_probs = False

    def normalizer(self, counts: StepCounts) -> float:
        by_name = {"weight": counts.weight, "token": float(counts.labels), "item": float(counts.items)}
        return by_name[self.normalize] or 1.0  # a step without labels has no loss

    def weights(self, log_p: Tensor | None, targets: Targets, group: dist.ProcessGroup) -> Weighted:
        if self.normalize != "item":
            return Weighted(targets.weights)
        given = targets.weights.double()
        total = item_sums(given, targets.items, group).clamp(min=1e-300)  # without weight: 0 / 1e-300
        return Weighted(given / spread_to_tokens(total, targets.items))


NEXT_TOKEN = NextToken()
