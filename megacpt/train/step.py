"""One optimizer step: forward and backward of every micro-batch, reduction, norm, clip, update. No host sync inside.

An update whose loss or norm is not finite, or lies above a limit, is not made: the device decides, all ranks alike, and the host learns of
it with the loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megacpt import heartbeat
from megacpt.data.loader import Batch, StepCounts
from megacpt.model.decoder import Decoder
from megacpt.model.run import accumulate
from megacpt.objective.base import Objective
from megacpt.objective.next_token import NEXT_TOKEN
from megacpt.optim.adamw import AdamW
from megacpt.optim.clip import grad_norm, inverse_clip


@dataclass(frozen=True)
class Update:
    """Numbers of one update."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip_norm: float | None
    frozen: frozenset[str] = frozenset()
    """Parameters that it leaves alone; their gradients do not count in the norm."""
    most_loss: float = float("inf")
    most_norm: float = float("inf")
    """Above one of these the update is skipped."""


def train_step(
    model: Decoder,
    optimizer: AdamW,
    micro_batches: Sequence[Batch],
    counts: StepCounts,
    reduce: str,
    update: Update,
    asks: Sequence[bool] = (),
    objective: Objective = NEXT_TOKEN,
) -> Tensor:
    """Returns float64 [2 + 1 + len(asks)] on the device, the same on all ranks: loss, gradient norm before clipping, whether the update was
    skipped, and whether any rank asked each of the things it may ask.

    Args:
        counts: of the whole step, over all ranks.
        asks: this rank's. objective: whose first sum is the loss.
    """
    loss = accumulate(model, micro_batches, counts, reduce, objective)[0]
    for name in update.frozen & optimizer.parameters.keys():
        optimizer.parameters[name].grad = None
    heartbeat.reach("before_update", subject=lambda: _first_gradient(optimizer))
    norm = grad_norm(model.counted_parameters(), model.mesh, model.options.operations)
    fine = (loss <= update.most_loss) & (norm <= update.most_norm) & loss.isfinite()
    fine &= (
        (norm / (update.clip_norm or 1.0)).float().isfinite()
    )  # kernels read it in fp32, and make no update where it is none
    flags = torch.zeros(1 + len(asks), device=norm.device, dtype=norm.dtype)
    flags[0].copy_(~fine)
    for i, ask in enumerate(asks, 1):
        if ask:  # filled there: a copy from the host would wait for all that is queued
            flags[i].fill_(1.0)
    if dist.get_world_size() > 1:  # one rank's doubt is everyone's
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    scale = inverse_clip(norm, update.clip_norm, flags[0] > 0)
    optimizer.step(update.lr, update.betas, update.eps, update.weight_decay, scale, update.frozen)
    optimizer.zero_grad()
    return torch.cat([torch.stack([loss.to(norm.dtype), norm]), flags])


def _first_gradient(optimizer: AdamW) -> Tensor:
    grads = (parameter.grad for parameter in optimizer.parameters.values() if parameter.grad is not None)
    return next(local for grad in grads if (local := grad._local_tensor).numel())


def compute_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """auto (None): bfloat16 on a GPU, float32 on a CPU."""
    return getattr(torch, name) if name else torch.bfloat16 if device.type == "cuda" else torch.float32
