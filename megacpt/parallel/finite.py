"""Numbers that are none, looked for before weights are taken in or given out."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megacpt.parallel.sharded import local_part


@torch.no_grad()
def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors of which some rank holds a part with inf or nan, the same on all ranks. Collective; one pass over each part on
    its device, one wait of the host.

    Args:
        tensors: this rank's, DTensors or plain ones; other ranks may have others.
    """
    parts = {name: local_part(tensor) for name, tensor in tensors.items()}
    held, fine = [], []
    for dtype in sorted({part.dtype for part in parts.values()}, key=str):
        names = [name for name, part in parts.items() if part.dtype == dtype and part.numel()]
        if names:
            ends = [end for name in names for end in parts[name].aminmax()]  # both are nan if one element is
            held += names
            fine.append(torch.stack(ends).isfinite().view(-1, 2).all(1))
    device = next((part.device for part in parts.values()), torch.device("cpu"))
    good = torch.cat(fine) if fine else torch.ones(0, dtype=torch.bool, device=device)
    doubt = (~good).any().float().reshape(1)
    if dist.get_world_size() > 1:
        dist.all_reduce(doubt, op=dist.ReduceOp.MAX)
    if not doubt.item():
        return []
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    mine = [name for name, is_good in zip(held, good.tolist(), strict=True) if not is_good]
    dist.all_gather_object(everyone, mine)
    return sorted({name for names in everyone for name in names})
