"""Teacher-forced forward of many token sequences on any layout: loss and right predictions of each, the same on every layout.

Sequences are packed one behind the other, each a document of its own, into micro-batches that are dealt to the data ranks.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from megacpt.config.layout import token_unit
from megacpt.data.loader import IGNORE, Batch, deal
from megacpt.model.decoder import Decoder, Inputs
from megacpt.model.run import forward_losses

Read = Callable[[int], tuple[np.ndarray, int]]
"""A sequence by its number: (tokens, the place of the first token that is predicted, at least 1)."""


def groups_of(lengths: Sequence[int], micro_batch_tokens: int) -> list[list[int]]:
    """Numbers of sequences in order, as many to a micro-batch as fit."""
    groups: list[list[int]] = []
    filled = micro_batch_tokens
    for number, length in enumerate(lengths):
        if filled + length > micro_batch_tokens:
            groups.append([])
            filled = 0
        groups[-1].append(number)
        filled += length
    return groups


def score_sequences(model: Decoder, lengths: Sequence[int], read: Read, micro_batch_tokens: int) -> np.ndarray:
    """float64 [sequences, 3]: sum of losses, right predictions, predicted tokens of each. All ranks call it and get the same."""
    mesh = model.mesh
    groups = groups_of(lengths, micro_batch_tokens)
    mine = [groups[i] if i is not None else [] for (i,) in deal(len(groups), mesh.layout.data, 1, mesh.data_rank)]
    total = torch.zeros(len(lengths), 3, dtype=torch.float64, device=mesh.device)
    unit = token_unit(mesh.layout.tensor, mesh.layout.context)

    def add(i: int, inputs: Inputs, losses: torch.Tensor, right: torch.Tensor) -> None:
        owners = np.repeat(mine[i], [lengths[number] for number in mine[i]]).astype(np.int64)
        kept = inputs.plan.tokens < len(owners)  # of this context rank, without filling
        values = torch.stack([losses.double(), right.double(), (inputs.labels >= 0).double()], 1)
        places = torch.from_numpy(owners[inputs.plan.tokens[kept]]).to(mesh.device)
        total.index_add_(0, places, values[torch.from_numpy(kept).to(mesh.device)])

    forward_losses(model, len(mine), lambda i: _batch(mine[i], read, unit), add)
    return mesh.sum_over_tokens(total).cpu().numpy()


def _batch(numbers: list[int], read: Read, unit: int) -> Batch:
    """Sequences one behind the other, filled to a multiple of `unit` with a document without labels."""
    pieces = [read(number) for number in numbers]
    total = sum(len(tokens) for tokens, _ in pieces)
    padded = max(1, -(-total // unit)) * unit
    tokens, labels, positions = (
        np.zeros(padded, np.int64),
        np.full(padded, IGNORE, np.int64),
        np.zeros(padded, np.int64),
    )
    starts, at = [], 0
    for piece, first in pieces:
        end = at + len(piece)
        tokens[at:end], positions[at:end] = piece, np.arange(len(piece))
        labels[at + first - 1 : end - 1] = piece[first:]
        starts.append(at)
        at = end
    if at < padded:
        positions[at:] = np.arange(padded - at)
        starts.append(at)
    return Batch(tokens[None], labels[None], positions[None], np.array(starts), np.array([0, len(starts)]), [""])
