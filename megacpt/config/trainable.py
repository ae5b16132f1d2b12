"""What a stage trains, and what a run holds for it: masters, moments and gradients exist for no other parameter.

A parameter has a gradient in the stages that train it. It has a master of at least fp32 and moments from the first of them on, also while a
later stage freezes it: a thaw goes on from where it stood. Until then it lives in the type of the computation, if what it was read from
holds it in that type, so that nothing is lost when a later stage begins to train it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from megacpt.family.base import ModelConfig


@dataclass(frozen=True)
class Trainable:
    """Of the whole model.

    Attributes:
        names: the parameters that the stage trains.
        held: those that it or a stage before it trains.
    """

    names: frozenset[str]
    held: frozenset[str]


def trainable_in(config: ModelConfig, frozen: Sequence[Collection[str]], index: int) -> Trainable:
    """Of a stage.

    Args:
        frozen: of each stage, the parameters that it does not train.
    """
    every = frozenset(config.shapes())
    names = [every.difference(some) for some in frozen[: index + 1]]
    return Trainable(names[-1], frozenset().union(*names))
