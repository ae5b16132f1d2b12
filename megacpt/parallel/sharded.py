"""Tensors of which every rank holds a part: the part, where it stands in the whole, and the way back from a part to such a tensor.

A parameter is a DTensor on the tp mesh while its weights are gathered, and on the mesh of data shards and tp between steps. Everything that
looks inside one does it here: without DTensor's dispatch, which costs about 50 µs a use.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from megacpt.compat import offset_of


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, itself if it is a plain one. Without autograd."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def global_offset(tensor: Tensor) -> tuple[int, ...]:
    """Where this rank's part begins in the whole tensor, in every dimension."""
    return offset_of(tensor) if isinstance(tensor, DTensor) else (0,) * tensor.ndim


def is_replicated(tensor: Tensor) -> bool:
    """Whether every tp rank holds all of a parameter."""
    assert isinstance(tensor, DTensor), type(tensor)
    return tensor.placements[-1].is_replicate()


def copies(tensor: DTensor) -> int:
    """Ranks that hold the same part."""
    count = 1
    for i, placement in enumerate(tensor.placements):
        count *= tensor.device_mesh.size(i) if placement.is_replicate() else 1
    return count


@dataclass(frozen=True)
class Placing:
    """How parts make up a tensor: all of it but the parts' values."""

    spec: Any
    local_shape: tuple[int, ...]

    def wrap(self, part: Tensor) -> DTensor:
        """The tensor of which the ranks hold such parts."""
        return DTensor(part, self.spec, requires_grad=False)


def placing_of(tensor: DTensor) -> Placing:
    """That of another tensor, such as a gradient: its values may have another type."""
    return Placing(tensor._spec, tensor._local_tensor.shape)


def wrap_as(part: Tensor, like: DTensor) -> DTensor:
    """The tensor that is placed as `like` and of which the ranks hold such parts."""
    return DTensor(part, like._spec, requires_grad=False)
