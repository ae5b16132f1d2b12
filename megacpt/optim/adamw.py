"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) over the local shards of sharded parameters.

Moments are DTensors placed like their parameters, so that checkpoints reshard them alike. The update itself runs on
the local tensors, with the clip coefficient inside: one pass over the state.
"""

import torch
from megacpt_kernels import adamw_
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


class AdamW:
    """Args:
    parameters: by name; matrices are decayed, vectors (norms) are not.
    backend: of the update, `megacpt_kernels.adamw_`.

    Attributes:
        exp_avg, exp_avg_sq: moments by name.
        num_updates: updates so far, for the bias correction.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], backend: str = "auto"):
        self.parameters, self.backend = parameters, backend
        self.exp_avg = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
        self.exp_avg_sq = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}
        self.num_updates = 0

    @torch.no_grad()
    def step(
        self, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, inverse_clip: Tensor | None = None
    ) -> None:
        """One update from the gradients of the parameters.

        Args:
            inverse_clip: scalar on the device by which gradients are divided, 1 / the clip coefficient.
        """
        self.num_updates += 1
        for decay, names in self._groups(weight_decay):
            if not names:
                continue
            tensors = [[local(source[name]) for name in names] for source in (self.exp_avg, self.exp_avg_sq)]
            weights = [local(self.parameters[name]) for name in names]
            grads = [local(self.parameters[name].grad) for name in names]
            adamw_(
                weights, grads, *tensors, lr, betas, eps, decay, self.num_updates, inverse_clip, backend=self.backend
            )

    def _groups(self, weight_decay: float) -> list[tuple[float, list[str]]]:
        """(decay, names) of the parameters that this rank holds a part of and that have a gradient."""
        mine = [n for n, p in self.parameters.items() if p.grad is not None and local(p).numel()]
        matrices = [n for n in mine if self.parameters[n].ndim >= 2]
        return [(weight_decay, matrices), (0.0, [n for n in mine if self.parameters[n].ndim < 2])]

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None
