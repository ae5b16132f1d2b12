"""Gates: what a stage must show before the next begins. Measured on all ranks under the layout that trains; numbers are rounded before they
decide, so that every layout decides alike."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megacpt.config.decisions import Baseline
from megacpt.config.recipe import Recipe
from megacpt.config.sections.gates import ForgettingGate, NeedleGate, RecoveryGate
from megacpt.config.sections.stage import Stage
from megacpt.data.domain import DomainData
from megacpt.data.loader import selection_of
from megacpt.data.packing import open_index
from megacpt.data.questions import read_task
from megacpt.data.tokenizer import Tokenizer
from megacpt.evaluate.choices import accuracy
from megacpt.evaluate.needle import Grid, hay_of, run_needles
from megacpt.evaluate.validation import ValidationSets, rows_at_once, validate
from megacpt.model.decoder import Decoder


@dataclass(frozen=True)
class Outcome:
    """What one gate said: the numbers, and in words those that did not pass."""

    gate: str
    passed: bool
    numbers: dict[str, Any]
    complaints: list[str] = field(default_factory=list)
    grid: Grid | None = None

    def plain(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self).items() if k != "grid"}


def needle_lengths(gate: NeedleGate, seq_len: int) -> list[int]:
    """Up to the stage's length: the gate's own, or an eighth, a quarter, a half and all of it."""
    return [n for n in gate.lengths if n <= seq_len] if gate.lengths else [seq_len // n for n in (8, 4, 2, 1)]


class GateRunner:
    """Measures a model for the gates of a recipe.

    Args:
        pad_id: what fills rows.
        tokenizer: folder of the model's.
        micro_batch_tokens: at once.
    """

    def __init__(
        self,
        recipe: Recipe,
        domains: dict[str, DomainData],
        pad_id: int,
        tokenizer: str | Path,
        micro_batch_tokens: int,
    ):
        self.recipe, self.domains, self.pad_id = recipe, domains, pad_id
        self.tokenizer, self.micro_batch_tokens = Tokenizer(tokenizer), micro_batch_tokens

    def baseline(self, model: Decoder) -> Baseline | None:
        """What recovery and forgetting compare with, measured before the first step; None if no stage asks them."""
        asked = {name for stage in self.recipe.stages for name in stage.gates}
        gates = [gate for name, gate in self.recipe.gates.items() if name in asked and not isinstance(gate, NeedleGate)]
        if not gates:
            return None
        domains = sorted({domain for gate in gates for domain in gate.domains})
        measured = self._measure(model, domains, sorted({task for gate in gates for task in gate.tasks}))
        return Baseline(losses=_finite(measured["losses"]), accuracies=_finite(measured["accuracies"]))

    def evaluate(self, model: Decoder, stage: Stage, baseline: Baseline | None) -> list[Outcome]:
        """Every gate of a stage."""
        outcomes = []
        for name in stage.gates:
            gate = self.recipe.gates[name]
            if isinstance(gate, NeedleGate):
                grid = self._needles(model, stage, gate)
                mean = round(grid.mean, 4)
                complaints = [] if mean >= gate.minimum else [f"mean recall {mean} is below {gate.minimum}"]
                by_length = zip(map(str, grid.lengths), grid.recall.mean(1).round(4).tolist(), strict=True)
                numbers = {"recall": mean, "by_length": dict(by_length)}
                outcomes.append(Outcome(name, not complaints, numbers, complaints, grid))
            else:
                now = self._measure(model, gate.domains, gate.tasks)
                complaints = compare(gate, baseline, now)
                outcomes.append(Outcome(name, not complaints, now, complaints))
        return outcomes

    def _measure(self, model: Decoder, domains: list[str], tasks: list[str]) -> dict[str, dict[str, float]]:
        """Losses in rows of the first stage's seq_len, and accuracies."""
        seq_len, micro = self.recipe.stages[0].seq_len, self.micro_batch_tokens
        rows = rows_at_once(micro, seq_len, model.mesh.layout)
        sets = ValidationSets(self.recipe, seq_len, self.domains, domains)
        losses = validate(model, sets, rows, self.pad_id)
        scores = {task: accuracy(model, read_task(task), self.tokenizer, seq_len, micro) for task in tasks}
        return {
            "losses": {name: round(loss.mean, 4) for name, loss in losses.items()},
            "accuracies": {task: round(value, 4) for task, value in scores.items()},
        }

    def _needles(self, model: Decoder, stage: Stage, gate: NeedleGate) -> Grid:
        held_out = self.recipe.data[gate.haystack].holdout_documents > 0
        selection = selection_of(self.recipe, gate.haystack, stage.seq_len, held_out)
        index = open_index(self.domains[gate.haystack], selection, self.recipe.packing.directory)
        lengths = needle_lengths(gate, stage.seq_len)
        settings = (gate.depths, gate.inserted, gate.asked, self.micro_batch_tokens, self.recipe.run.seed)
        return run_needles(model, self.tokenizer, hay_of(index, max(lengths)), lengths, *settings)


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _measured(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


def compare(
    gate: RecoveryGate | ForgettingGate, baseline: Baseline | None, now: dict[str, dict[str, float]]
) -> list[str]:
    """What of a recovery or forgetting gate is not as it must be, in words with the numbers."""
    complaints = []
    forgetting = isinstance(gate, ForgettingGate)
    losses, accuracies = (_measured(baseline.losses), _measured(baseline.accuracies)) if baseline else ({}, {})
    missing = [name for name in now["losses"] if name not in losses]
    missing += [name for name in now["accuracies"] if name not in accuracies]
    if missing:
        return [f"{', '.join(missing)} was not measured at the run's start: there is nothing to compare with"]
    for name, loss in now["losses"].items():
        start = losses[name]
        bound = start + gate.max_rise if forgetting else start * (1 + gate.tolerance)
        if not loss <= bound + 1e-9:  # nan is no loss
            complaints.append(f"loss of {name} is {loss}, at most {bound:.4f} (start {start})")
    for task, value in now["accuracies"].items():
        start = accuracies[task]
        bound = start - (gate.max_fall if forgetting else gate.tolerance)
        if value < bound - 1e-9:
            complaints.append(f"accuracy of {task} is {value}, at least {bound:.4f} (start {start})")
    return complaints
