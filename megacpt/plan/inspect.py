"""The exact global batch of any step of a run, without training it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from megacpt.checkpoint.manifest import decisions_of_run
from megacpt.config.clock import Clock, Step
from megacpt.config.plan_file import base_of
from megacpt.config.recipe import Recipe
from megacpt.data.loader import Batch, Pick, StageData, open_domains, pad_token, stage_orders
from megacpt.errors import ConfigError
from megacpt.files import new_file


@dataclass(frozen=True)
class InspectedStep:
    """Attributes: picks: where each row of the batch comes from."""

    step: Step
    picks: list[Pick]
    batch: Batch


def inspect_step(recipe: Recipe, number: int) -> InspectedStep:
    """The batch of a step, with what the run has decided up to its newest checkpoint.

    Raises:
        ConfigError: if the run has no such step.
    """
    decisions = decisions_of_run(Path(recipe.directory))
    clock = Clock(recipe, decisions.extensions())
    if not 1 <= number <= clock.num_steps:
        raise ConfigError([f"--step {number}: the recipe has steps 1 to {clock.num_steps}."], "the arguments")
    step = clock.step(number)
    stage, config = recipe.stages[step.stage], base_of(recipe)
    domains = open_domains(recipe, list(stage.mixture))
    order, pad = stage_orders(recipe, clock, decisions)[step.stage], pad_token(domains, config.eos_token_id)
    data = StageData(recipe, stage, order, domains, pad, config.vocab_size)
    picks = data.picks(step.first_sequence, step.rows)
    return InspectedStep(step, picks, data.batch(picks))


@dataclass(frozen=True)
class InspectedDocument:
    """Attributes:
    weights: float32, of each token in the loss, 0 for the first, which nothing predicts; None where the batch has none.
    item: its number in the batch; None where each document is its own.
    """

    tokens: np.ndarray
    weights: np.ndarray | None
    item: int | None


def documents_of(batch: Batch) -> Iterator[list[InspectedDocument]]:
    """The documents of each row; the padding behind them is the last."""
    edges = [*batch.document_starts.tolist(), batch.tokens.size]
    tokens, weights = batch.tokens.reshape(-1), None
    if batch.weights is not None:
        of_label = np.where(batch.labels >= 0, batch.weights, np.float32(0)).reshape(-1)
        weights = np.append(np.float32(0), of_label[:-1])  # of the token itself: its label stands one place before it
    for first, end in zip(batch.row_offsets[:-1], batch.row_offsets[1:], strict=True):
        yield [
            InspectedDocument(
                tokens[edges[i] : edges[i + 1]],
                None if weights is None else weights[edges[i] : edges[i + 1]],
                None if batch.item is None else int(batch.item[i]),
            )
            for i in range(first, end)
        ]


def show_document(document: InspectedDocument, decode: Callable[[Sequence[int]], str], colour: bool) -> str:
    """A document in a line: its text or, with weights, each run of tokens behind its weight, dim where that is 0.

    Args:
        colour: for a terminal.
    """
    head = f"[{len(document.tokens)} tokens" + ("" if document.item is None else f", item {document.item}")
    if document.weights is None:
        return f"{head}] {decode(document.tokens.tolist())!r}"
    parts = []
    edges = [0, *(np.flatnonzero(np.diff(document.weights)) + 1).tolist(), len(document.tokens)]
    for begin, end in pairwise(edges):
        weight = float(document.weights[begin])
        text = f"<{weight:.6g}>{decode(document.tokens[begin:end].tolist())!r}"
        style = "2" if weight == 0 else "32" if weight == 1 else "33"
        parts.append(f"\x1b[{style}m{text}\x1b[0m" if colour else text)
    return f"{head}, weight {document.weights.sum(dtype=np.float64):.6g}] " + " ".join(parts)


def save_batch(batch: Batch, path: str) -> None:
    """Writes the arrays of a batch as .npz: weights are 1, and each document is an item, where the data does not say otherwise."""
    documents = np.arange(len(batch.document_starts), dtype=np.int32)
    with new_file(Path(path)) as partial, open(partial, "wb") as file:
        np.savez(
            file,
            tokens=batch.tokens,
            labels=batch.labels,
            positions=batch.positions,
            weights=np.ones(batch.tokens.shape, np.float32) if batch.weights is None else batch.weights,
            document_starts=batch.document_starts,
            row_offsets=batch.row_offsets,
            item=documents if batch.item is None else batch.item,
            domain=np.array(batch.domain),
        )
