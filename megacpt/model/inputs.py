"""A batch of rows becomes the inputs of a model: one packed token dimension, this rank's part of it, on the device."""

import numpy as np
import torch

from megacpt.data.loader import Batch
from megacpt.model.llama import Inputs
from megacpt.parallel.context import make_plan
from megacpt.parallel.mesh import Mesh


def to_inputs(batch: Batch, mesh: Mesh) -> Inputs:
    """[rows, seq_len] on the host -> this context rank's tokens [rows * seq_len / cp] on the device. Copies do not wait."""
    plan = make_plan(batch.document_starts, batch.tokens.size, mesh.layout.context, mesh.context_rank, mesh.device)
    move = lambda array: torch.from_numpy(array.reshape(-1)[plan.tokens]).to(mesh.device, non_blocking=True)
    positions = move(batch.positions.astype(np.int32))
    return Inputs(move(batch.tokens), move(batch.labels), positions, plan, batch.tokens.shape[1])
