"""What a stage minimises."""

from typing import Literal

from megacpt.config.base import Section


class Objective(Section, heading="[objective], or objective (in a stage)"):
    """The loss that training minimises."""

    kind: Literal["next_token"] = "next_token"
    """Kind of the loss. `next_token` is the negative log-likelihood of each token times the weight that the prepared data gives it."""
    normalize: Literal["weight", "token", "item"] = "weight"
    """What the sum of a step's losses is divided by. `weight`: the sum of its weights. `token`: the number of tokens with a weight above 0.
    `item`: each item (a document, or documents that belong together) is a weighted mean of its own, and the step is the mean of its
    items."""
