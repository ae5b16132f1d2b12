"""The contract of an objective.

Every loss L on log-probabilities of labels has the gradient sum_t dL/dlog p_t * grad log p_t. So an objective only says, for each token,
w_t = -dL/dlog p_t: the head's backward takes that vector, and layers, layouts and schedules never know which loss it is.

Shapes: T tokens of a micro-batch on this context rank.
"""

from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from megacpt.data.loader import StepCounts
from megacpt.parallel.items import Items


class Targets(Protocol):
    """What an objective sees of a micro-batch: the tokens of this context rank."""

    @property
    def labels(self) -> Tensor:
        """int64 [T], -100 without label."""
        ...

    @property
    def weights(self) -> Tensor:
        """float32 [T], as the data gives them, 1 unless it says otherwise; 0 without label."""
        ...

    @property
    def items(self) -> Items:
        """Which item (document, pair, group, conversation) each token belongs to."""
        ...


@dataclass(frozen=True)
class Weighted:
    """A micro-batch, weighed.

    Attributes:
        weights: float32 or float64 [T], -dL/dlog p_t of the loss before it is divided by the step's normaliser; without gradient.
        sums: [len(objective.sums)], this context rank's part of what is reported, before that division. None: the only sum is the loss,
            sum_t w_t nll_t, which the head computes.
    """

    weights: Tensor
    sums: Tensor | None = None


class Objective(Protocol):
    """Pure: the same arguments give the same values on every rank that holds these tokens."""

    @property
    def sums(self) -> tuple[str, ...]:
        """Names of what is reported, the loss first."""
        ...

    @property
    def needs_log_probs(self) -> bool:
        """Whether the weights depend on the model: then the head runs once more before, forward only."""
        ...

    def normalizer(self, counts: StepCounts) -> float:
        """What the step's sums are divided by, over all ranks. Not zero."""
        ...

    def weights(self, log_p: Tensor | None, targets: Targets, group: dist.ProcessGroup) -> Weighted:
        """Weighs the tokens of a micro-batch.

        Args:
            log_p: at least fp32 [T], log-probability of each label, 0 without one; None unless `needs_log_probs`. Without gradient.
            group: the context ranks, which hold the other tokens of the same items. All of them call at once.
        """
        ...
