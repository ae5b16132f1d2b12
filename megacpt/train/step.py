"""One optimizer step: forward and backward of every micro-batch, reduction, norm, clip, update. No host sync inside."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megacpt.data.loader import Batch
from megacpt.model.inputs import to_inputs
from megacpt.model.llama import Llama
from megacpt.optim.adamw import AdamW
from megacpt.optim.clip import grad_norm, inverse_clip
from megacpt.parallel.tensor import sum_replicated_gradients


@dataclass(frozen=True)
class Update:
    """Numbers of one update."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip_norm: float | None


def forward_backward(model: Llama, micro_batches: Sequence[Batch], num_labels: int, reduce: str) -> Tensor:
    """Accumulates the gradients of the step's mean loss. Returns the loss, a scalar on the device, summed over ranks.

    Args:
        num_labels: of the whole step over all ranks; each micro-batch's sum is divided by it.
        reduce: "step" reduces gradients with the last micro-batch, "micro_batch" with each.
    """
    scale = 1.0 / max(1, num_labels)
    total = None
    for i, batch in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        model.set_is_last_backward(last)
        model.set_requires_gradient_sync(last or reduce == "micro_batch")
        loss = model(to_inputs(batch, model.mesh), scale)
        loss.backward()
        total = loss.detach() if total is None else total + loss.detach()
    sum_replicated_gradients(list(model.parameters()), model.mesh.tensor_group)
    return model.mesh.sum_over_tokens(total)


def train_step(
    model: Llama, optimizer: AdamW, micro_batches: Sequence[Batch], num_labels: int, reduce: str, update: Update
) -> tuple[Tensor, Tensor]:
    """Returns (loss, gradient norm before clipping), scalars on the device."""
    loss = forward_backward(model, micro_batches, num_labels, reduce)
    norm = grad_norm(list(model.parameters()), model.mesh)
    optimizer.step(update.lr, update.betas, update.eps, update.weight_decay, inverse_clip(norm, update.clip_norm))
    optimizer.zero_grad()
    return loss, norm


def resolve_reduce(reduce: str, pipeline: int) -> str:
    """auto: once a step under pipeline parallelism, where weights stay gathered; else with every micro-batch."""
    return ("step" if pipeline > 1 else "micro_batch") if reduce == "auto" else reduce


def compute_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """auto (None): bfloat16 on a GPU, float32 on a CPU."""
    return getattr(torch, name) if name else torch.bfloat16 if device.type == "cuda" else torch.float32
