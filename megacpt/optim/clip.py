"""The global gradient norm, each element counted once, and the coefficient that clips it. No host sync."""

import functools

import torch
from megacpt_kernels import grad_norm as norm_of
from torch import Tensor, nn

from megacpt.parallel.mesh import Mesh
from megacpt.parallel.sharded import is_replicated, local_part


@torch.no_grad()
def grad_norm(parameters: list[nn.Parameter], mesh: Mesh, backend: str = "auto") -> Tensor:
    """Norm over all parameters of all ranks, a float64 scalar on the device.

    Every tp rank holds the whole gradient of a parameter that tp replicates, so its square counts 1 / tp there.
    """
    held = [(p, p.grad) for p in parameters if p.grad is not None]
    weights = [1 / mesh.tensor.size() if is_replicated(p) else 1.0 for p, _ in held]

    reduce = functools.partial(mesh.sum_over, ("dp_shard", "cp", "tp", "pp"))
    return norm_of([local_part(grad) for _, grad in held], weights, reduce, mesh.device, backend)


def inverse_clip(norm: Tensor, clip_norm: float | None, skip: Tensor | None = None) -> Tensor:
    """max(1, norm / clip_norm): what gradients are divided by; 1 if nothing is clipped, nan if the update must not be made.

    Args:
        skip: bool scalar on the device.
    """
    scale = torch.ones_like(norm) if clip_norm is None else (norm / clip_norm).clamp(min=1.0)
    return scale if skip is None else torch.where(skip, torch.nan, scale)
