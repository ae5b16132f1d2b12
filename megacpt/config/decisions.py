"""What a run decided while it ran: an append-only list in every checkpoint, from which clock and order follow. Imports no torch.

Kinds: {"kind": "baseline", losses, accuracies}, {"kind": "mixture", stage, sequence, losses, weights}, {"kind": "extend", stage, step,
by_tokens}, {"kind": "gates", stage, step, passed, action, results}, {"kind": "average", stage, step, steps, losses, better},
{"kind": "skip", stage, step, sequence, count, why}. Measured numbers are rounded before they decide, so that layouts agree.
"""

from typing import Any

from megacpt.config.recipe import Recipe
from megacpt.config.sections.mixture import OnlineMixture
from megacpt.config.sections.stage import Stage

Decision = dict[str, Any]
UNIT = 1024
"""Weights inside a group are multiples of 1 / UNIT."""


def extensions_of(decisions: list[Decision]) -> dict[str, int]:
    """Tokens by which stages were extended, by name."""
    total: dict[str, int] = {}
    for decision in decisions:
        if decision["kind"] == "extend":
            total[decision["stage"]] = total.get(decision["stage"], 0) + decision["by_tokens"]
    return total


def weight_changes(stage: Stage, decisions: list[Decision]) -> list[tuple[int, dict[str, float]]]:
    """(first sequence, weights) of a stage in order, from the recipe's own on."""
    changes = {0: dict(stage.mixture)}
    for decision in decisions:
        if decision["kind"] == "mixture" and decision["stage"] == stage.name and decision["weights"]:
            changes[decision["sequence"]] = decision["weights"]
    return sorted(changes.items())


def skips_of(stage: Stage, decisions: list[Decision]) -> list[tuple[int, int]]:
    """(sequence of the stage, how many were left out there) of a stage, from rollbacks."""
    return [(d["sequence"], d["count"]) for d in decisions if d["kind"] == "skip" and d["stage"] == stage.name]


def baseline_of(decisions: list[Decision]) -> Decision | None:
    """Losses and accuracies at the run's start."""
    return next((decision for decision in decisions if decision["kind"] == "baseline"), None)


def groups_of(recipe: Recipe, stage: Stage) -> list[list[str]]:
    """Domains of a stage whose weights move against each other."""
    groups = [[name for name in names if stage.mixture.get(name, 0) > 0] for names in recipe.mixture.groups.values()]
    return [group for group in groups if len(group) > 1]


def adjusted(
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
    clipped = lambda s: {n: min(max(value * s, bounds[n][0]), bounds[n][1]) for n, value in raw.items()}
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
    room = lambda name: units[name] + 1 <= bounds[name][1] * UNIT + 1e-9
    while sum(units.values()) < UNIT:
        name = next((n for n in order if room(n)), order[0])
        units[name] += 1
        order.remove(name)
        order.append(name)
    while sum(units.values()) > UNIT:
        units[max(units, key=lambda name: (units[name] - exact[name], name))] -= 1
    return units
