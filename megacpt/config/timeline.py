"""The run as a list of events, from the recipe, the clock and a position. Pure; imports no torch.

    enter   baseline   validate                                              before the first step
    train   checksum   validate   reweight   snapshot   save                 of a step, in this order, those that are due
    average   gates   enter                                                  at a stage's end, and into the next
    finish                                                                   at the run's end, or where it was told to stop

A position is the last event that is done. A resume goes on behind it; an extension or a rollback is another clock behind the same
position. A kind stands at most once at a step, so a position names one place.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from megacpt.config.clock import Clock, Step
from megacpt.config.decisions import groups_of
from megacpt.config.recipe import Recipe

Kind = Literal[
    "enter", "baseline", "train", "checksum", "validate", "reweight", "snapshot", "save", "average", "gates", "finish"
]
AT_START: tuple[Kind, ...] = ("enter", "baseline", "validate", "finish")
AT_STEP: tuple[Kind, ...] = (
    "train", "checksum", "validate", "reweight", "snapshot", "save", "average", "gates", "enter", "finish",
)  # fmt: skip


@dataclass(frozen=True)
class Event:
    """What happens next.

    Attributes:
        stage: its index in the recipe.
        step: of `train`, the step that is trained; of all others, the last that is done.
    """

    kind: Kind
    stage: int
    step: int


@dataclass(frozen=True)
class Position:
    """The last event that is done. None: nothing is."""

    step: int = 0
    kind: Kind | None = None


def timeline(
    recipe: Recipe, clock: Clock, after: Position = Position(), retry_at: int | None = None
) -> Iterator[Event]:
    """The events behind a position, in order.

    Args:
        clock: of the recipe and of what was decided so far. An extension makes another clock: take the rest of its list instead.
        retry_at: a step after which a save that could not be made is tried again.
    """
    for step in range(after.step, last_step(recipe, clock) + 1):
        events = _at_step(recipe, clock, step, retry_at) if step else _at_start(recipe, clock)
        if step == after.step and after.kind:
            order = AT_STEP if step else AT_START
            done = order.index(after.kind)
            events = [event for event in events if order.index(event.kind) > done]
        yield from events


def last_step(recipe: Recipe, clock: Clock) -> int:
    """Where the run ends, or was told to stop."""
    stop = recipe.run.stop_at_step
    return clock.num_steps if stop is None else min(stop, clock.num_steps)


def _at_start(recipe: Recipe, clock: Clock) -> list[Event]:
    kinds: dict[Kind, bool] = {
        "enter": True,
        "baseline": bool(recipe.gates),
        "validate": bool(recipe.validation),
        "finish": last_step(recipe, clock) == 0,
    }
    return [Event(kind, 0, 0) for kind in AT_START if kinds[kind]]


def _at_step(recipe: Recipe, clock: Clock, number: int, retry_at: int | None) -> list[Event]:
    step = clock.step(number)
    stage = recipe.stages[step.stage]
    ends_stage = step.tokens_after == clock.stage_first_token[step.stage + 1]
    ends_run, stops = number == clock.num_steps, number == last_step(recipe, clock)
    asks = bool(stage.gates or stage.average)  # what follows at the stage's end may still change what is saved
    due: dict[Kind, bool] = {
        "train": True,
        "checksum": number % recipe.health.checksum_every_steps == 0,
        "validate": validates(recipe, step) or (ends_run and bool(recipe.validation)),
        "reweight": reweights(recipe, clock, step),
        "snapshot": bool(stage.average) and (_ends_interval(clock, step, stage.average.every_tokens) or ends_stage),
        "save": number % recipe.checkpoint.every_steps == 0
        or number == retry_at
        or (stops and not (asks and ends_stage)),
        "average": ends_stage and bool(stage.average),
        "gates": ends_stage and bool(stage.gates),
        "finish": stops,
    }
    events = [Event(kind, step.stage, number) for kind in AT_STEP if due.get(kind)]
    if ends_stage and not stops:
        events.append(Event("enter", step.stage + 1, number))
    return events


def validates(recipe: Recipe, step: Step) -> bool:
    """Whether a validation interval ends in this step."""
    intervals = [rules.every_tokens for rules in recipe.validation if rules.every_tokens]
    return any(step.tokens_before // n != step.tokens_after // n for n in intervals)


def reweights(recipe: Recipe, clock: Clock, step: Step) -> bool:
    """Whether an interval of the online mixture ends in this step. Not with a stage's last: nothing of it is left to mix."""
    rules, stage = recipe.mixture.online, recipe.stages[step.stage]
    if rules is None or not groups_of(recipe, stage):
        return False
    if step.tokens_after == clock.stage_first_token[step.stage + 1]:
        return False
    before, after = _inside(clock, step)
    started = before < rules.start_tokens <= after
    return started or (after >= rules.start_tokens and before // rules.every_tokens != after // rules.every_tokens)


def _ends_interval(clock: Clock, step: Step, every_tokens: int) -> bool:
    before, after = _inside(clock, step)
    return before // every_tokens != after // every_tokens


def _inside(clock: Clock, step: Step) -> tuple[int, int]:
    """Tokens of the step's stage before and after it."""
    first = clock.stage_first_token[step.stage]
    return step.tokens_before - first, step.tokens_after - first


def folded(events: Iterable[Event], recipe: Recipe) -> list[str]:
    """The list as text: a line for each stage and kind, with how often and where."""
    places: dict[tuple[int, Kind], list[int]] = {}
    for event in events:
        places.setdefault((event.stage, event.kind), []).append(event.step)
    lines = []
    for (stage, kind), steps in places.items():
        if kind == "train":
            where = f"steps {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"step {steps[0]}"
        elif len(steps) <= 4:
            where = f"after step {', '.join(map(str, steps))}"
        else:
            where = f"{len(steps)} times, after step {', '.join(map(str, steps[:3]))}, … {steps[-1]}"
        lines.append(f"{recipe.stages[stage].name}: {kind} {where}")
    return lines
