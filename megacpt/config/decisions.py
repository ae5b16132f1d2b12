"""What a run decided while it ran: an append-only list in every checkpoint, from which clock and order follow. Imports no torch.

Measured numbers are rounded before they decide, so that layouts agree.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, TypeAdapter

from megacpt.config.recipe import Recipe
from megacpt.config.sections.mixture import OnlineMixture
from megacpt.config.sections.stage import Stage

UNIT = 1024
"""Weights inside a group are multiples of 1 / UNIT."""

Measured = float | None
"""None: what was measured is no number."""


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Baseline(_Entry):
    """What was measured before the first step; recovery and forgetting are compared with it."""

    kind: Literal["baseline"] = "baseline"
    losses: dict[str, Measured]
    accuracies: dict[str, Measured]


class MixtureChange(_Entry):
    """Losses of domains, as (mean, standard error), and the weights of the stage from a sequence on. Without weights it only stands for the
    next measurement to compare with."""

    kind: Literal["mixture"] = "mixture"
    stage: str
    sequence: int
    losses: dict[str, Annotated[tuple[float, float], Field(strict=False)]]
    weights: dict[str, float]


class Extension(_Entry):
    """A stage is longer than the recipe says."""

    kind: Literal["extend"] = "extend"
    stage: str
    step: int
    by_tokens: int


GateAction = Literal["pass", "warn", "extend", "stop"]
"""What follows when the gates of a stage were asked."""


class GateDecision(_Entry):
    """What the gates at a stage's end said, and what follows."""

    kind: Literal["gates"] = "gates"
    stage: str
    step: int
    passed: bool
    action: GateAction
    results: list[dict[str, Any]]


class AverageDecision(_Entry):
    """An average of a stage's snapshots beside its last weights: validation losses of both, and which is better."""

    kind: Literal["average"] = "average"
    stage: str
    step: int
    steps: list[int]
    losses: dict[str, dict[str, Measured]]
    better: str


class Skip(_Entry):
    """Sequences of a stage that are left out from `sequence` on, because a run went back over them.

    Attributes:
        step: at which it went back. to_step: to which; checkpoints of early versions say neither.
    """

    kind: Literal["skip"] = "skip"
    stage: str
    step: int = 0
    to_step: int = 0
    sequence: int
    count: int
    why: str


Decision = Baseline | MixtureChange | Extension | GateDecision | AverageDecision | Skip
_LIST = TypeAdapter(list[Annotated[Decision, Field(discriminator="kind")]])


@dataclass(frozen=True)
class Decisions:
    """All decisions of a run, in order."""

    entries: tuple[Decision, ...] = ()

    @classmethod
    def parse(cls, raw: Any) -> "Decisions":
        """From what a checkpoint holds.

        Raises:
            ValueError: for what is no decision.
        """
        return raw if isinstance(raw, cls) else cls(tuple(_LIST.validate_python(raw)))

    def plain(self) -> list[dict[str, Any]]:
        """As `parse` reads it."""
        return [plain_decision(entry) for entry in self.entries]

    def plus(self, *more: Decision) -> "Decisions":
        """These and some more."""
        return Decisions((*self.entries, *more))

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Decision]:
        return iter(self.entries)

    def of(self, kind: type[Any], stage: str | None = None) -> list[Any]:
        """Those of a kind, of one stage or of all."""
        found = (entry for entry in self.entries if isinstance(entry, kind))
        return [entry for entry in found if stage is None or getattr(entry, "stage", None) == stage]

    def baseline(self) -> Baseline | None:
        return next(iter(self.of(Baseline)), None)

    def extension(self, stage: str) -> int:
        """Tokens by which a stage is longer than the recipe says."""
        return sum(entry.by_tokens for entry in self.of(Extension, stage))

    def extensions(self) -> dict[str, int]:
        """Tokens by which stages are longer, by name."""
        return {name: self.extension(name) for name in dict.fromkeys(entry.stage for entry in self.of(Extension))}

    def weights(self, stage: Stage) -> list[tuple[int, dict[str, float]]]:
        """(first sequence, weights of the mixture) of a stage in order, from the recipe's own on."""
        changes = {0: dict(stage.mixture)}
        changes |= {entry.sequence: entry.weights for entry in self.of(MixtureChange, stage.name) if entry.weights}
        return sorted(changes.items())

    def skips(self, stage: str) -> list[tuple[int, int]]:
        """(sequence of the stage, how many were left out there)."""
        return [(entry.sequence, entry.count) for entry in self.of(Skip, stage)]

    def settled(self, stage: str, step: int) -> bool:
        """Whether the gates of a stage that ended with a step were asked and did not stop the run."""
        return any(entry.step == step and entry.action != "stop" for entry in self.of(GateDecision, stage))

    def averaged(self, stage: str, step: int) -> bool:
        """Whether the average of a stage that ended with a step was made."""
        return any(entry.step == step for entry in self.of(AverageDecision, stage))


NONE = Decisions()
"""Of a run that has decided nothing yet."""


def plain_decision(decision: Decision) -> dict[str, Any]:
    """As JSON holds it; what an early version did not say stays unsaid."""
    return {"kind": decision.kind} | decision.model_dump(mode="json", exclude_unset=True)


StoredDecisions = Annotated[Decisions, PlainValidator(Decisions.parse), PlainSerializer(Decisions.plain)]
"""For pydantic, as a field of what is stored."""


def groups_of(recipe: Recipe, stage: Stage) -> list[list[str]]:
    """Domains of a stage whose weights move against each other."""
    groups = [[name for name in names if stage.mixture.get(name, 0) > 0] for names in recipe.mixture.groups.values()]
    return [group for group in groups if len(group) > 1]


def reweighted(
    prior: dict[str, float],
    current: dict[str, float],
    groups: list[list[str]],
    before: dict[str, tuple[float, float]],
    now: dict[str, tuple[float, float]],
    rules: OnlineMixture,
) -> dict[str, float]:
    """Weights after one measurement (Llama-3-SynE's rule, bounded): a domain whose perplexity rose is sampled more.

    f = clip(1 + alpha w (p / p_before - 1), 1/2, 2); r = r^(1 - pull) prior^pull f; then floor and cap on the prior, and each group's
    common share is what it was. Without a measurement, or inside the dead-band, f is 1.

    Args:
        prior: the stage's own weights. current: those of now.
        before, now: (mean loss, its standard error) by domain.
    """
    result = dict(current)
    for group in groups:
        share = sum(prior[name] for name in group)
        inside = sum(current[name] for name in group)
        raw = {}
        for name in group:
            factor = 1.0
            if name in before and name in now:
                change = now[name][0] - before[name][0]
                if abs(change) >= rules.dead_band * max(now[name][1], before[name][1]):
                    relative = 2.718281828459045 ** max(-5.0, min(5.0, change)) - 1
                    factor = min(2.0, max(0.5, 1 + rules.alpha * rules.topic_weights.get(name, 1.0) * relative))
            own, old = prior[name] / share, current[name] / inside
            raw[name] = old ** (1 - rules.pull) * own**rules.pull * factor
        bounds = {n: (rules.floor * prior[n] / share, min(1.0, rules.cap * prior[n] / share)) for n in group}
        parts = _in_units(_bounded(raw, bounds), bounds)
        result |= {name: share * parts[name] / UNIT for name in group}
    return result


def _bounded(raw: dict[str, float], bounds: dict[str, tuple[float, float]]) -> dict[str, float]:
    """The scaling of `raw` that sums to 1 between the bounds: clip(raw * s), s by bisection."""

    def clipped(s: float) -> dict[str, float]:
        return {n: min(max(value * s, bounds[n][0]), bounds[n][1]) for n, value in raw.items()}

    low, high = 0.0, 1.0
    while sum(clipped(high).values()) < 1 and high < 1e12:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(clipped(middle).values()) < 1 else (low, middle)
    return clipped(high)


def _in_units(parts: dict[str, float], bounds: dict[str, tuple[float, float]]) -> dict[str, int]:
    """Multiples of 1 / UNIT that sum to UNIT, by largest remainder; no domain falls to nothing or passes its cap by rounding."""
    total = sum(parts.values())
    exact = {name: part / total * UNIT for name, part in parts.items()}
    units = {name: max(1, int(value)) for name, value in exact.items()}
    order = sorted(exact, key=lambda name: (-(exact[name] - int(exact[name])), name))

    def has_room(name: str) -> bool:
        return units[name] + 1 <= bounds[name][1] * UNIT + 1e-9

    while sum(units.values()) < UNIT:
        name = next((n for n in order if has_room(n)), order[0])
        units[name] += 1
        order.remove(name)
        order.append(name)
    while sum(units.values()) > UNIT:
        units[max(units, key=lambda name: (units[name] - exact[name], name))] -= 1
    return units
