"""A batch of rows becomes the inputs of a model: one packed token dimension, this rank's part of it, on the device.

All integers of a micro-batch travel in one int32 buffer, pinned where the device is a GPU: a copy from other memory may wait until the
device has done all that it was given. The buffer can be made ahead, in the thread that reads.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from megacpt_kernels import label_weights
from torch import Tensor

from megacpt.data.loader import Batch, StepData
from megacpt.model.decoder import Inputs
from megacpt.parallel.context import ContextPlan, make_plan
from megacpt.parallel.items import Items
from megacpt.parallel.mesh import Mesh

ALIGNED = 32
"""Each part begins at a multiple of as many integers, 128 bytes: kernels are compiled anew for addresses that are not."""


@dataclass(frozen=True)
class HostInputs:
    """A context rank's part of a micro-batch, on the host.

    Attributes:
        buffer: int32: tokens, labels, positions, keys of the plan, first queries and first keys of documents.
        sizes: of the six. longest: rows of the rotary tables that are needed.
        weights: float32 [T / cp], where the batch has them. items: of the tokens.
    """

    buffer: Tensor
    sizes: tuple[int, ...]
    plan: ContextPlan
    longest: int
    weights: Tensor | None
    items: Items


def to_host(batch: Batch, mesh: Mesh) -> HostInputs:
    """[rows, seq_len] -> this context rank's tokens [rows * seq_len / cp] and its plan, ready for one copy."""
    plan = make_plan(batch.document_starts, batch.tokens.size, mesh.layout.context, mesh.context_rank)
    parts = [array.reshape(-1)[plan.tokens] for array in (batch.tokens, batch.labels, batch.positions)]
    parts += [np.empty(0) if plan.keys is None else plan.keys, plan.documents.q, plan.documents.k]
    sizes = tuple(len(part) for part in parts)
    whole, begin = np.zeros(sum(map(_room, sizes)), np.int32), 0
    for part, size in zip(parts, sizes, strict=True):
        whole[begin : begin + size] = part
        begin += _room(size)
    buffer, weights = torch.from_numpy(whole), None
    if batch.weights is not None:
        weights = torch.from_numpy(batch.weights.reshape(-1)[plan.tokens])
    if mesh.device.type == "cuda":
        torch.cuda.set_device(mesh.device)  # a thread begins on GPU 0, and pinning would open a context there
        buffer, weights = buffer.pin_memory(), None if weights is None else weights.pin_memory()
    return HostInputs(buffer, sizes, plan, batch.tokens.shape[1], weights, _items(batch, plan))


def _items(batch: Batch, plan: ContextPlan) -> Items:
    """The items of this context rank's tokens."""
    lengths = np.diff(batch.document_starts, append=batch.tokens.size)
    item = np.arange(len(lengths), dtype=np.int32) if batch.item is None else batch.item
    assert len(item) == len(lengths), f"{len(item)} items for {len(lengths)} documents"
    return Items(np.repeat(item, lengths)[plan.tokens], int(item.max()) + 1)


def _room(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


def to_inputs(batch: Batch | HostInputs, mesh: Mesh) -> Inputs:
    """On the device. The copy does not wait for what the device has to do."""
    host = to_host(batch, mesh) if isinstance(batch, Batch) else batch
    flat, parts, begin = host.buffer.to(mesh.device, non_blocking=True), [], 0
    for size in host.sizes:
        parts.append(flat[begin : begin + size])
        begin += _room(size)
    tokens, labels, positions, keys, cu_q, cu_k = parts
    documents = replace(host.plan.documents, cu_q=cu_q, cu_k=cu_k)
    plan = replace(host.plan, keys=None if host.plan.keys is None else keys, documents=documents)
    tokens, labels = tokens.long(), labels.long()
    weights = label_weights(labels)
    if host.weights is not None:
        weights = torch.where(weights > 0, host.weights.to(mesh.device, non_blocking=True), weights)
    return Inputs(tokens, labels, positions, plan, host.longest, weights, host.items)


def step_to_host(step: StepData, mesh: Mesh) -> StepData:
    """A step whose micro-batches are ready for the device."""
    return replace(step, micro_batches=[to_host(batch, mesh) for batch in step.micro_batches])
