"""Numbers that are none, looked for before weights are taken in or given out."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors of which some rank holds a part with inf or nan, the same on all ranks. Collective; one pass over each part on
    its device, one wait of the host.

    Args:
        tensors: this rank's, DTensors or plain ones; other ranks may have others.
    """
    parts = {name: getattr(tensor, "_local_tensor", tensor) for name, tensor in tensors.items()}
    held = [name for name, part in parts.items() if part.numel()]
    ends = [torch.stack(parts[name].aminmax()).double() for name in held]  # both nan if one element is
    fine = torch.stack(ends).isfinite().all(1) if ends else torch.ones(0, dtype=torch.bool)
    device = fine.device if ends else next((part.device for part in parts.values()), torch.device("cpu"))
    doubt = (~fine).any().to(device, torch.float32).reshape(1)
    if dist.get_world_size() > 1:
        dist.all_reduce(doubt, op=dist.ReduceOp.MAX)
    if not doubt.item():
        return []
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    mine = [name for name, good in zip(held, fine.tolist(), strict=True) if not good]
    dist.all_gather_object(everyone, mine)
    return sorted({name for names in everyone for name in names})
