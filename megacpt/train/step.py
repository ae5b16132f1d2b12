"""One optimizer step: forward and backward of every micro-batch, reduction, norm, clip, update. No host sync inside.

An update whose loss or norm is not finite, or lies above a limit, is not made: the device decides, all ranks alike, and the host learns of
it with the loss.
"""

from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megacpt import heartbeat
from megacpt.data.loader import StepData
from megacpt.model.decoder import Decoder
from megacpt.model.run import forward_backward
from megacpt.objective.base import Objective
from megacpt.objective.next_token import NEXT_TOKEN
from megacpt.optim.adamw import AdamW
from megacpt.optim.clip import grad_norm, inverse_clip
from megacpt.parallel.sharded import local_part
from megacpt.survive.health import StepStats


@dataclass(frozen=True)
class Update:
    """Numbers of one update."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip_norm: float | None
    frozen: frozenset[str] = frozenset()
    """Parameters of the whole model that the stage does not train; none of them has a gradient."""
    max_loss: float = float("inf")
    max_grad_norm: float = float("inf")
    """Above one of these the update is skipped."""


@dataclass(frozen=True)
class StepSignals:
    """What a rank has to tell the others with its step: it was asked to stop, it knows of a save that failed, the run directory is another
    job's."""

    stop: bool = False
    save_failed: bool = False
    lost: bool = False


@dataclass(frozen=True)
class StepResult:
    """What came of a step, alike on all ranks: loss and gradient norm before clipping, whether the update was skipped, and whether any rank
    gave each of the signals."""

    stats: StepStats
    skipped: bool
    stop: bool
    save_failed: bool
    lost: bool


def read_result(measured: Tensor) -> StepResult:
    """What `train_step` measured, on the host: the step's one wait for the device."""
    loss, norm, *flags = measured.tolist()
    return StepResult(StepStats(loss, norm), *(flag > 0 for flag in flags))


def train_step(
    model: Decoder,
    optimizer: AdamW,
    batch: StepData,
    reduction: str,
    update: Update,
    signals: StepSignals = StepSignals(),
    objective: Objective = NEXT_TOKEN,
) -> Tensor:
    """Returns float64 [6] on the device, the same on all ranks; `read_result` takes it apart.

    Args:
        batch: this rank's micro-batches, and the counts of the whole step.
        reduction: "step" or "micro_batch", when gradients are reduced.
        signals: this rank's.
        objective: whose first sum is the loss.
    """
    loss = forward_backward(model, batch.micro_batches, batch.counts, reduction, objective)[0]
    heartbeat.reach("before_update", subject=lambda: _first_gradient(optimizer))
    norm = grad_norm(model.counted_parameters(), model.mesh, model.options.operations)
    fine = (loss <= update.max_loss) & (norm <= update.max_grad_norm) & loss.isfinite()
    fine &= (
        (norm / (update.clip_norm or 1.0)).float().isfinite()
    )  # kernels read it in fp32, and make no update where it is none
    asked = astuple(signals)
    flags = torch.zeros(1 + len(asked), device=norm.device, dtype=norm.dtype)
    flags[0].copy_(~fine)
    for i, ask in enumerate(asked, 1):
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
    return next((part for grad in grads if (part := local_part(grad)).numel()), torch.zeros(1))


def compute_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """auto (None): bfloat16 on a GPU, float32 on a CPU."""
    return getattr(torch, name) if name else torch.bfloat16 if device.type == "cuda" else torch.float32
