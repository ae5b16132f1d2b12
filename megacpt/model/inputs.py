"""A batch of rows becomes the inputs of a model: one packed token dimension, on the device."""

import torch
from megacpt_kernels import Documents

from megacpt.data.loader import Batch
from megacpt.model.llama import Inputs


def to_inputs(batch: Batch, device: torch.device) -> Inputs:
    """[rows, seq_len] on the host -> [rows * seq_len] on the device. Copies do not wait."""
    move = lambda array: torch.from_numpy(array.reshape(-1)).to(device, non_blocking=True)
    documents = Documents.of(batch.document_starts.tolist(), batch.tokens.size, device)
    return Inputs(move(batch.tokens), move(batch.labels), move(batch.positions), documents, batch.tokens.shape[1])
