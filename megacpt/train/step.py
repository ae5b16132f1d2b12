"""One optimizer step: forward and backward of every micro-batch, reduction, norm, clip, update. No host sync inside."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megacpt.data.loader import Batch
from megacpt.model.llama import Llama
from megacpt.model.run import accumulate
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


def train_step(
    model: Llama, optimizer: AdamW, micro_batches: Sequence[Batch], num_labels: int, reduce: str, update: Update
) -> tuple[Tensor, Tensor]:
    """Returns (loss, gradient norm before clipping), scalars on the device."""
    loss = accumulate(model, micro_batches, num_labels, reduce)
    for name in update.frozen & optimizer.parameters.keys():
        optimizer.parameters[name].grad = None
    norm = grad_norm(model.counted_parameters(), model.mesh, model.options.operations)
    optimizer.step(update.lr, update.betas, update.eps, update.weight_decay, inverse_clip(norm, update.clip_norm))
    optimizer.zero_grad()
    return loss, norm


def compute_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """auto (None): bfloat16 on a GPU, float32 on a CPU."""
    return getattr(torch, name) if name else torch.bfloat16 if device.type == "cuda" else torch.float32
