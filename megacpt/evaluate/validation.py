"""Validation: the mean loss of the labels of a domain's held-out documents, each as heavy as the data says, the same rows on every layout.

Whatever a stage minimises, and however it is normalised, this is sum_t w_t nll_t / sum_t w_t.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megacpt.config.layout import Layout, token_unit
from megacpt.config.recipe import Recipe
from megacpt.data.domain import DomainData
from megacpt.data.loader import Batch, deal, make_batch, open_domains, selection_of
from megacpt.data.packing import PackingIndex, open_index
from megacpt.errors import DataError
from megacpt.model.decoder import Decoder, Inputs
from megacpt.model.run import forward_losses


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
    """Weighted mean negative log-likelihood of a domain's labels, and its standard error."""

    mean: float
    error: float


def validate(model: Decoder, sets: ValidationSets, micro_batch_rows: int, pad_id: int) -> dict[str, Loss]:
    """The loss of each domain. All ranks call it and get the same numbers.

    The standard error is that of a ratio of sums, sqrt(sum w^2 (nll - mean)^2) / sum w: that of a mean where all weights are alike.

    Raises:
        DataError: if no label of a domain has a weight.
    """
    mesh, losses = model.mesh, {}
    for name, (index, count) in sets.rows.items():
        dealt = deal(count, mesh.layout.data, micro_batch_rows, mesh.data_rank)
        total = torch.zeros(5, dtype=torch.float64, device=mesh.device)

        def batch_of(i: int, name=name, index=index, dealt=dealt) -> Batch:
            picked = [(index, name, row) if row is not None else None for row in dealt[i]]
            return make_batch(picked, sets.seq_len, pad_id, model.config.vocab_size)

        def add(i: int, inputs: Inputs, nll: torch.Tensor, right: torch.Tensor, total=total) -> None:
            loss, weight = nll.double(), inputs.weights.double()
            heavy = weight * loss
            total += torch.stack(
                [heavy.sum(), heavy.square().sum(), weight.sum(), (weight * heavy).sum(), weight.square().sum()]
            )

        forward_losses(model, len(dealt), batch_of, add)
        sums = mesh.sum_over_tokens(total).tolist()
        if not sums[2]:
            raise DataError(
                f"domain {name}: no label of its held-out documents has a weight above 0. Hold out more, or others."
            )
        losses[name] = _mean_and_error(*sums)
    return losses


def _mean_and_error(loss: float, squares: float, weight: float, loss_by_weight: float, weight_squares: float) -> Loss:
    """From the sums of w x, (w x)^2, w, w^2 x and w^2 over the labels. With weights of 1 to the bit as for a plain mean."""
    mean = loss / weight
    variance = squares / weight_squares - mean * (2 * (loss_by_weight / weight_squares) - mean)
    labels = weight / (weight_squares / weight)  # Kish's effective number
    return Loss(mean, math.sqrt(max(0.0, variance) / labels))


def rows_at_once(micro_batch_tokens: int, seq_len: int, layout: Layout) -> int:
    """Rows of a micro-batch: what fits, and at least so many that their tokens divide over the ranks."""
    rows, unit = max(1, micro_batch_tokens // seq_len), token_unit(layout.tensor, layout.context)
    step = unit // math.gcd(seq_len, unit)
    return max(step, rows // step * step)
