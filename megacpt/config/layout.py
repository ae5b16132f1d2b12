"""How ranks are laid out: degrees of the parallel axes for a world size, and the arithmetic when they do not fit."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megacpt.config.sections.parallel import Parallel


@dataclass(frozen=True)
class Layout:
    """Degrees, outermost first, in Llama 3's order (arXiv 2407.21783, section 3.3.2)."""

    data_replicate: int = 1
    data_shard: int = 1
    pipeline: int = 1
    context: int = 1
    tensor: int = 1

    @property
    def data(self) -> int:
        """Ranks that see different rows."""
        return self.data_replicate * self.data_shard

    @property
    def world_size(self) -> int:
        return self.data * self.pipeline * self.context * self.tensor

    def __str__(self) -> str:
        return (
            f"data {self.data_replicate} x {self.data_shard}, pipeline {self.pipeline}, "
            f"context {self.context}, tensor {self.tensor}"
        )


def resolve_layout(parallel: "Parallel", world_size: int) -> Layout:
    """Degrees with `data_shard = "auto"` filled in.

    Raises:
        ValueError: if the degrees do not multiply to the world size, with the arithmetic.
    """
    fixed = parallel.tensor * parallel.context * parallel.pipeline * parallel.data_replicate
    product = (
        f"tensor {parallel.tensor} x context {parallel.context} x pipeline {parallel.pipeline} "
        f"x data_replicate {parallel.data_replicate}"
    )
    shard = parallel.data_shard
    if shard is None:
        if world_size % fixed:
            raise ValueError(
                f"{product} = {fixed} does not divide the world size {world_size}. "
                f"Start a multiple of {fixed} processes or lower a degree."
            )
        shard = world_size // fixed
    elif fixed * shard != world_size:
        raise ValueError(
            f"{product} x data_shard {shard} = {fixed * shard}, but the world size is {world_size}. "
            'Start as many processes, or set data_shard = "auto".'
        )
    return Layout(parallel.data_replicate, shard, parallel.pipeline, parallel.context, parallel.tensor)


def token_unit(tensor: int, context: int) -> int:
    """What the tokens of a micro-batch must be a multiple of: 2 chunks a context rank, each rank's tokens over tensor."""
    return math.lcm(2 * context, context * tensor) if context > 1 else tensor


def least_world_size(layouts: Iterable["Parallel"]) -> int:
    """The fewest processes on which every stage of a recipe can have its layout, `data_shard = "auto"` counting as 1."""
    return math.lcm(*(p.tensor * p.context * p.pipeline * p.data_replicate * (p.data_shard or 1) for p in layouts))
