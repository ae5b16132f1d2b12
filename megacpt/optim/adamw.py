"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) over the local shards of sharded parameters.

Moments are DTensors placed like their parameters, so that checkpoints reshard them alike. The update itself runs on
the local tensors, with the clip coefficient inside: one pass over the state.

Updates are counted by parameter, as torch.optim.AdamW does: one that was frozen stands where it stood, and after a thaw its bias correction
goes on from there.
"""

import functools
import math
import zlib
from collections.abc import Collection, Mapping

import torch
from megacpt_kernels import adamw_
from megacpt_kernels.adamw import ShardPosition
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megacpt.parallel.sharded import global_offset, local_part


def place_of(name: str, parameter: Tensor) -> ShardPosition:
    """Where this rank's part stands in the whole parameter."""
    key = zlib.crc32(name.encode())
    if not isinstance(parameter, DTensor):
        return ShardPosition(0, max(1, parameter.numel()), max(1, parameter.numel()), key)
    whole, offset = parameter.shape, global_offset(parameter)
    row, columns = math.prod(whole[1:]), math.prod(local_part(parameter).shape[1:])
    return ShardPosition(offset[0] * row + (offset[1] if len(whole) > 1 else 0), max(1, columns), row, key)


class AdamW:
    """Args:
    parameters: by name.
    decayed: names of those that weight decay acts on.
    backend: of the update, `megacpt_kernels.adamw_`.
    state_dtype: of the moments, default the parameters'. bfloat16 is rounded stochastically, by `seed`.
    held: names of parameters that have moments; default those that need a gradient.

    Attributes:
        exp_avg, exp_avg_sq: moments by name, of what is or was trained.
        num_updates: updates so far. missed: how many of them passed a parameter by, for those that any did; also for parameters of other
            pipeline ranks, so that every rank can save and any layout can load it.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        backend: str = "auto",
        state_dtype: torch.dtype | None = None,
        seed: int = 0,
        decayed: Collection[str] = (),
        held: Collection[str] | None = None,
    ):
        self.parameters, self.backend, self.seed = parameters, backend, seed
        self.decayed, self.state_dtype = set(decayed), state_dtype
        self.exp_avg: dict[str, Tensor] = {}
        self.exp_avg_sq: dict[str, Tensor] = {}
        self.hold([name for name, p in parameters.items() if p.requires_grad] if held is None else held)
        self.places = {name: place_of(name, p) for name, p in parameters.items()}
        self.num_updates = 0
        self.missed: dict[str, int] = {}
        self._passed_by: frozenset[str] = frozenset()

    def hold(self, names: Collection[str]) -> None:
        """These parameters have moments from now on: zeros, where they had none."""
        for name, parameter in self.parameters.items():  # in one order on all ranks
            if name in names and name not in self.exp_avg:
                zeros = functools.partial(torch.zeros_like, parameter, requires_grad=False, dtype=self.state_dtype)
                self.exp_avg[name], self.exp_avg_sq[name] = zeros(), zeros()

    @torch.no_grad()
    def step(
        self,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        inverse_clip: Tensor | None = None,
        frozen: Collection[str] = (),
    ) -> None:
        """One update from the gradients of the parameters. It passes by what has no gradient.

        Args:
            inverse_clip: scalar on the device by which gradients are divided, 1 / the clip coefficient. Where it is not finite no
                parameter and no moment changes; the caller then takes the count back (`take_back`).
            frozen: parameters of the whole model that have no gradient now, this rank's and others'.
        """
        self._passed_by = frozenset(frozen) | {name for name, p in self.parameters.items() if p.grad is None}
        self._count(1)
        for (decay, count), names in self._groups(weight_decay).items():
            exp_avg, exp_avg_sq = (
                [local_part(source[name]) for name in names] for source in (self.exp_avg, self.exp_avg_sq)
            )
            weights = [local_part(self.parameters[name]) for name in names]
            grads = [local_part(grad) for name in names if (grad := self.parameters[name].grad) is not None]
            places = [self.places[name] for name in names]
            adamw_(
                weights, grads, exp_avg, exp_avg_sq, lr, betas, eps, decay, count, inverse_clip, places, self.seed, self.backend
            )  # fmt: skip

    def take_back(self) -> None:
        """The last update was not made: no parameter has counted it."""
        self._count(-1)

    def restore(self, num_updates: int, missed: Mapping[str, int]) -> None:
        """Goes on from counts that were saved."""
        self.num_updates, self.missed = num_updates, dict(missed)

    def count_of(self, name: str) -> int:
        """Updates of a parameter so far."""
        return self.num_updates - self.missed.get(name, 0)

    def _count(self, by: int) -> None:
        self.num_updates += by
        for name in self._passed_by:
            self.missed[name] = self.missed.get(name, 0) + by
            if not self.missed[name]:
                del self.missed[name]

    def _groups(self, weight_decay: float) -> dict[tuple[float, int], list[str]]:
        """Names of the parameters that this rank holds a part of and that have a gradient, by their decay and the number of this update:
        what one call of a kernel takes."""
        groups: dict[tuple[float, int], list[str]] = {}
        for name, parameter in self.parameters.items():
            if parameter.grad is not None and local_part(parameter).numel():
                decay = weight_decay if name in self.decayed else 0.0
                groups.setdefault((decay, self.count_of(name)), []).append(name)
        return groups

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None
