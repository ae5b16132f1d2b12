"""The exact global batch of any step of a run, without training it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megacpt.checkpoint.manifest import decisions_of_run
from megacpt.config.clock import Clock, Step
from megacpt.config.decisions import extensions_of
from megacpt.config.model import load_model_config
from megacpt.config.recipe import Recipe
from megacpt.data.loader import Batch, Pick, StageData, mixtures, open_domains, pad_token
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
    clock = Clock(recipe, extensions_of(decisions))
    if not 1 <= number <= clock.num_steps:
        raise ConfigError([f"--step {number}: the recipe has steps 1 to {clock.num_steps}."], "the arguments")
    step = clock.step(number)
    stage, config = recipe.stages[step.stage], load_model_config(recipe.model)
    domains = open_domains(recipe, list(stage.mixture))
    order, pad = mixtures(recipe, clock, decisions)[step.stage], pad_token(domains, config.eos_token_id)
    data = StageData(recipe, stage, order, domains, pad, config.vocab_size)
    picks = data.picks(step.first_sequence, step.rows)
    return InspectedStep(step, picks, data.batch(picks))


def documents_of(batch: Batch) -> Iterator[list[np.ndarray]]:
    """Of each row, the tokens of its documents; the padding behind them is the last."""
    flat, edges = batch.tokens.reshape(-1), [*batch.document_starts.tolist(), batch.tokens.size]
    for first, end in zip(batch.row_offsets[:-1], batch.row_offsets[1:], strict=True):
        yield [flat[edges[i] : edges[i + 1]] for i in range(first, end)]


def save_batch(batch: Batch, path: str) -> None:
    """Writes the arrays of a batch as .npz."""
    with new_file(Path(path)) as partial, open(partial, "wb") as file:
        np.savez(
            file,
            tokens=batch.tokens,
            labels=batch.labels,
            positions=batch.positions,
            document_starts=batch.document_starts,
            row_offsets=batch.row_offsets,
            domain=np.array(batch.domain),
        )
