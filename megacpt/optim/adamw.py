"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) over the local shards of sharded parameters.

Moments are DTensors placed like their parameters, so that checkpoints reshard them alike. The update itself runs on
the local tensors, with the clip coefficient inside: one pass over the state.
"""

import functools
import math
import zlib
from collections.abc import Collection

import torch
from megacpt_kernels import adamw_
from megacpt_kernels.adamw import Place
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def place_of(name: str, parameter: Tensor) -> Place:
    """Where this rank's part stands in the whole parameter."""
    key = zlib.crc32(name.encode())
    if not isinstance(parameter, DTensor):
        return Place(0, max(1, parameter.numel()), max(1, parameter.numel()), key)
    whole, mesh = parameter.shape, parameter.device_mesh
    _, offset = compute_local_shape_and_global_offset(whole, mesh, parameter.placements)
    row = math.prod(whole[1:])
    columns = math.prod(parameter._local_tensor.shape[1:])
    return Place(offset[0] * row + (offset[1] if len(whole) > 1 else 0), max(1, columns), row, key)


class AdamW:
    """Args:
    parameters: by name.
    decayed: names of those that weight decay acts on; default the matrices.
    backend: of the update, `megacpt_kernels.adamw_`.
    state_dtype: of the moments, default the parameters'. bfloat16 is rounded stochastically, by `seed`.

    Attributes:
        exp_avg, exp_avg_sq: moments by name.
        num_updates: updates so far, for the bias correction.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        backend: str = "auto",
        state_dtype: torch.dtype | None = None,
        seed: int = 0,
        decayed: Collection[str] | None = None,
    ):
        self.parameters, self.backend, self.seed = parameters, backend, seed
        self.decayed = {n for n, p in parameters.items() if p.ndim >= 2} if decayed is None else set(decayed)
        zeros = functools.partial(torch.zeros_like, requires_grad=False, dtype=state_dtype)
        self.exp_avg = {name: zeros(p) for name, p in parameters.items()}
        self.exp_avg_sq = {name: zeros(p) for name, p in parameters.items()}
        self.places = {name: place_of(name, p) for name, p in parameters.items()}
        self.num_updates = 0

    @torch.no_grad()
    def step(
        self, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, inverse_clip: Tensor | None = None
    ) -> None:
        """One update from the gradients of the parameters.

        Args:
            inverse_clip: scalar on the device by which gradients are divided, 1 / the clip coefficient. Where it is not finite no
                parameter and no moment changes; the caller then takes the update back from `num_updates`.
        """
        self.num_updates += 1
        for decay, names in self._groups(weight_decay):
            if not names:
                continue
            tensors = [[local(source[name]) for name in names] for source in (self.exp_avg, self.exp_avg_sq)]
            weights = [local(self.parameters[name]) for name in names]
            grads = [local(self.parameters[name].grad) for name in names]
            places = [self.places[name] for name in names]
            settings = (lr, betas, eps, decay, self.num_updates, inverse_clip)
            adamw_(weights, grads, *tensors, *settings, places, self.seed, self.backend)

    def _groups(self, weight_decay: float) -> list[tuple[float, list[str]]]:
        """(decay, names) of the parameters that this rank holds a part of and that have a gradient."""
        mine = [n for n, p in self.parameters.items() if p.grad is not None and local(p).numel()]
        decayed = [name for name in mine if name in self.decayed]
        return [(weight_decay, decayed), (0.0, [name for name in mine if name not in self.decayed])]

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None
