"""A batch of rows becomes the inputs of a model: one packed token dimension, this rank's part of it, on the device."""

import numpy as np
import torch
from megacpt_kernels import label_weights

from megacpt.data.loader import Batch
from megacpt.model.llama import Inputs
from megacpt.parallel.context import ContextPlan, make_plan
from megacpt.parallel.items import Items
from megacpt.parallel.mesh import Mesh


def to_inputs(batch: Batch, mesh: Mesh) -> Inputs:
    """[rows, seq_len] on the host -> this context rank's tokens [rows * seq_len / cp] on the device. Copies do not wait."""
    plan = make_plan(batch.document_starts, batch.tokens.size, mesh.layout.context, mesh.context_rank, mesh.device)
    move = lambda array: torch.from_numpy(array.reshape(-1)[plan.tokens]).to(mesh.device, non_blocking=True)
    positions, labels = move(batch.positions.astype(np.int32)), move(batch.labels)
    weights = label_weights(labels)
    if batch.weights is not None:
        weights = torch.where(weights > 0, move(batch.weights), weights)
    return Inputs(move(batch.tokens), labels, positions, plan, batch.tokens.shape[1], weights, _items(batch, plan))


def _items(batch: Batch, plan: ContextPlan) -> Items:
    """The items of this context rank's tokens."""
    lengths = np.diff(batch.document_starts, append=batch.tokens.size)
    item = np.arange(len(lengths), dtype=np.int32) if batch.item is None else batch.item
    assert len(item) == len(lengths), f"{len(item)} items for {len(lengths)} documents"
    return Items(np.repeat(item, lengths)[plan.tokens], int(item.max()) + 1)
