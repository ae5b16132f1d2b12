"""Validation: mean loss over the labels of a domain's held-out documents, the same rows on every layout."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megacpt.config.recipe import Recipe
from megacpt.data.domain import DomainData
from megacpt.data.loader import Batch, deal, make_batch, open_domains, selection_of
from megacpt.data.packing import PackingIndex, open_index
from megacpt.model.decoder import Decoder, Inputs
from megacpt.model.run import each_loss


class ValidationSets:
    """The held-out rows of every domain that a recipe validates, or of `names`, for one seq_len."""

    def __init__(
        self,
        recipe: Recipe,
        seq_len: int,
        domains: dict[str, DomainData] | None = None,
        names: Sequence[str] | None = None,
    ):
        self.seq_len = seq_len
        limits: dict[str, int | None] = {}
        for validation in recipe.validation:
            limits |= dict.fromkeys(validation.domains, validation.max_tokens)
        if names is not None:
            limits = {name: limits.get(name) for name in names}
        domains = domains or open_domains(recipe, list(limits))
        self.rows: dict[str, tuple[PackingIndex, int]] = {}
        for name, limit in limits.items():
            index = open_index(
                domains[name], selection_of(recipe, name, seq_len, holdout=True), recipe.packing.directory
            )
            count = index.num_rows if limit is None else min(index.num_rows, max(1, limit // seq_len))
            self.rows[name] = (index, count)


@dataclass(frozen=True)
class Loss:
    """Mean negative log-likelihood of a domain and its standard error."""

    mean: float
    error: float


def validate(model: Decoder, sets: ValidationSets, micro_batch_rows: int, pad_id: int) -> dict[str, Loss]:
    """The loss of each domain. All ranks call it and get the same numbers."""
    mesh, losses = model.mesh, {}
    for name, (index, count) in sets.rows.items():
        dealt = deal(count, mesh.layout.data, micro_batch_rows, mesh.data_rank)
        total = torch.zeros(3, dtype=torch.float64, device=mesh.device)

        def batch_of(i: int, name=name, index=index, dealt=dealt) -> Batch:
            picked = [(index, name, row) if row is not None else None for row in dealt[i]]
            return make_batch(picked, sets.seq_len, pad_id, model.config.vocab_size)

        def add(i: int, inputs: Inputs, nll: torch.Tensor, right: torch.Tensor, total=total) -> None:
            wide = nll.double()
            total += torch.stack([wide.sum(), wide.square().sum(), (inputs.labels >= 0).sum()])

        each_loss(model, len(dealt), batch_of, add)
        loss, squares, labels = mesh.sum_over_tokens(total).tolist()
        mean = loss / labels
        losses[name] = Loss(mean, math.sqrt(max(0.0, squares / labels - mean * mean) / labels))
    return losses


def rows_at_once(micro_batch_tokens: int, seq_len: int, unit: int) -> int:
    """Rows of a micro-batch: what fits, and at least so many that their tokens divide over the ranks."""
    rows = max(1, micro_batch_tokens // seq_len)
    step = unit // math.gcd(seq_len, unit)
    return max(step, rows // step * step)
