"""What a run works with between its events. Three things make a run: the plan, which is fixed (config/resolve.py); the state, which is
exactly what a checkpoint saves (checkpoint/manifest.py); and the session, its resources in this process."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from megacpt import heartbeat
from megacpt.checkpoint.background import Saver
from megacpt.checkpoint.manifest import RunState
from megacpt.checkpoint.save import prune
from megacpt.config.clock import Clock, Step
from megacpt.config.decisions import Decision, plain_decision
from megacpt.config.resolve import ResolvedStage, RunPlan
from megacpt.config.sections.health import Health
from megacpt.config.timeline import Event, timeline
from megacpt.data.domain import DomainData
from megacpt.data.loader import StageData, StepData, load_step, prefetch, stage_orders
from megacpt.data.mixture import Order
from megacpt.evaluate.validation import Loss, ValidationSets, rows_at_once, validate
from megacpt.model.decoder import Decoder
from megacpt.model.inputs import step_to_host
from megacpt.optim.adamw import AdamW
from megacpt.parallel.mesh import set_timeout
from megacpt.survive.health import Stragglers
from megacpt.survive.run_directory import RunDirectory
from megacpt.train.metrics import Console, StepMetrics, TensorBoard
from megacpt.train.profile import Profiler
from megacpt.train.stop import StopRequest

Phase = Literal["start", "step", "save", "evaluate"]

GRACE = 30.0
"""Seconds that a collective waits longer than the watchdog, which knows more about a hang."""


@dataclass
class Session:
    """Resources of a run in this process, and where it stands.

    Attributes:
        stage: the one that the model is set up for.
        base: folder with the base's config.json and tokenizer, the run's own copy.
        phase: "start" up to the end of the first step, then "step".
        saved: the state that was saved last; None if it is not sure that it was.
        retry_at: step after which a save that failed is tried again.
    """

    plan: RunPlan
    state: RunState
    directory: RunDirectory
    stop: StopRequest
    domains: dict[str, DomainData]
    base: Path
    pad_id: int
    model: Decoder
    optimizer: AdamW
    stage: ResolvedStage
    metrics: StepMetrics
    board: TensorBoard | None
    profiler: Profiler
    stragglers: Stragglers
    phase: Phase = "start"
    saved: RunState | None = None
    retry_at: int | None = None
    console_lost: bool = False
    """Whether the events say that nobody reads what is printed any more."""
    clock: Clock = field(init=False)
    orders: list[Order] = field(init=False)
    saver: Saver = field(init=False)
    console: Console = field(init=False)
    _rows: Generator[StepData, None, None] | None = None
    _sets: ValidationSets | None = None

    def __post_init__(self) -> None:
        self.refresh_schedule()
        self.open_saver()
        self.console = Console(self.plan.recipe.log.every_steps)

    @property
    def device(self) -> torch.device:
        return self.model.mesh.device

    @property
    def tokens(self) -> int:
        return self.state.tokens

    def next_event(self) -> Event | None:
        """What the timeline has behind the position; None at its end."""
        return next(timeline(self.plan.recipe, self.clock, self.state.position, self.retry_at), None)

    def state_after(self, event: Event) -> RunState:
        """The state once an event is done."""
        name = self.plan.stages[self.clock.step(max(1, event.step)).stage].name
        tokens, optimizer = self.clock.tokens_at(event.step), self.optimizer
        return replace(
            self.state,
            step=event.step,
            done=event.kind,
            tokens=tokens,
            stage=name,
            num_updates=optimizer.num_updates,
            missed=dict(optimizer.missed),
        )

    def refresh_schedule(self) -> None:
        """Clock and order of the data follow from the recipe and the decisions."""
        self.clock = Clock(self.plan.recipe, self.state.decisions.extensions())
        self.orders = stage_orders(self.plan.recipe, self.clock, self.state.decisions)
        self.drop_rows()

    def record_decision(self, decision: Decision, step: int) -> None:
        """Adds a decision to the state and the events."""
        self.state = replace(self.state, decisions=self.state.decisions.plus(decision))
        self.refresh_schedule()
        more = {key: value for key, value in plain_decision(decision).items() if key not in ("kind", "step")}
        self.directory.event(decision.kind, step, self.clock.tokens_at(step), **more)

    def take_rows(self, step: Step) -> StepData:
        """What this rank trains in a step; the steps behind it are read ahead."""
        if self._rows is None:
            self._rows = self._read_ahead(step)
        return next(self._rows)

    def drop_rows(self) -> None:
        """What was read ahead is not what comes next any more."""
        if self._rows is not None:
            self._rows.close()
        self._rows = None

    def _read_ahead(self, first: Step) -> Generator[StepData, None, None]:
        stage, clock, mesh, recipe = self.stage, self.clock, self.model.mesh, self.plan.recipe
        stop = recipe.run.stop_at_step or clock.num_steps
        last = min(clock.stage_numbers(stage.index)[-1], max(first.number, stop))
        vocabulary = self.model.config.vocab_size
        data = StageData(recipe, stage.recipe, self.orders[stage.index], self.domains, self.pad_id, vocabulary)

        def make(number: int) -> StepData:
            step = clock.step(number)
            ranks, rank = mesh.layout.data, mesh.data_rank
            return step_to_host(
                load_step(data, step.first_sequence, step.rows, ranks, rank, stage.micro_batch_rows), mesh
            )

        return prefetch(make, range(first.number, last + 1))

    def validation_sets(self) -> ValidationSets:
        """The held-out rows in the stage's length."""
        if self._sets is None or self._sets.seq_len != self.stage.seq_len:
            self._sets = ValidationSets(self.plan.recipe, self.stage.seq_len, self.domains)
        return self._sets

    def measure(self, sets: ValidationSets) -> dict[str, Loss]:
        """Validation losses of the model as it is. Collective."""
        rows = rows_at_once(self.stage.micro_batch_tokens, sets.seq_len, self.model.mesh.layout)
        with self.slow("evaluate"):
            return validate(self.model, sets, rows, self.pad_id)

    @contextmanager
    def slow(self, phase: Phase) -> Iterator[None]:
        """Ranks may wait long for each other: while one writes or reads slowly ("save"), or the model is asked ("evaluate")."""
        set_phase_timeout(self.plan.recipe.health, phase)
        try:
            yield
        finally:
            set_phase_timeout(self.plan.recipe.health, self.phase)

    def enter_phase(self, phase: Phase) -> None:
        self.phase = phase
        set_phase_timeout(self.plan.recipe.health, phase)

    def open_saver(self) -> None:
        """For the process groups that there are now."""
        self.saver = Saver(self.plan.recipe.checkpoint.publish, self._prune, self.directory.fence)

    def _prune(self) -> list[int]:
        keep = self.plan.recipe.checkpoint
        return prune(self.directory.checkpoints, keep.keep_last, keep.keep_every_steps)


def set_phase_timeout(rules: Health, phase: Phase) -> None:
    """From now on, what a rank may take between two signs of life, and what a collective waits."""
    seconds = {
        "start": rules.start_timeout_seconds,
        "step": rules.step_timeout_seconds,
        "save": rules.save_timeout_seconds,
        "evaluate": rules.evaluate_timeout_seconds,
    }[phase]
    heartbeat.set_deadline(phase, seconds)
    set_timeout(seconds + (GRACE if rules.watchdog else 0.0))
