"""A run while it runs: what a step needs, and what happens between steps: validating, saving, deciding, being asked to stop."""

import os
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

from megacpt import heartbeat, log
from megacpt.checkpoint.background import Saver
from megacpt.checkpoint.manifest import State
from megacpt.checkpoint.save import prune, tensors_of
from megacpt.config.clock import Clock
from megacpt.config.decisions import Decision, extensions_of
from megacpt.config.layout import token_unit
from megacpt.config.recipe import Recipe
from megacpt.config.stage import Stage
from megacpt.data.loader import mixtures
from megacpt.data.mixture import Order
from megacpt.data.packing import DomainData
from megacpt.errors import SaveError
from megacpt.evaluate.validation import Loss, ValidationSets, rows_at_once, validate
from megacpt.model.decoder import Decoder
from megacpt.optim.adamw import AdamW
from megacpt.parallel.mesh import set_timeout
from megacpt.survive.health import Measured, check_finite, check_replicas
from megacpt.survive.lease import REPEAT_SECONDS
from megacpt.survive.run_directory import RunDirectory, plain_numbers
from megacpt.train.metrics import TensorBoard, resident_gib


class StopRequest:
    """SIGTERM, SIGUSR1 or SIGINT ask for a checkpoint at the next step boundary; a second one leaves at once. SIGTERM and SIGUSR1 may come
    twice for one reason, from the scheduler to every process and from torchrun, so they must be ten seconds apart for that.

    A thread hears them: Python's own handlers run in the main thread only between two of its instructions, and a collective is one.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.signal: str | None = None
        """What this rank heard: a signal's name, or what a stop request in the run directory says."""
        self._heard = 0.0
        self.agreed = False
        """Whether any rank heard something, as all know."""
        self._before = {number: signal.signal(number, lambda *_: None) for number in self.SIGNALS}
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._old = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def _listen(self) -> None:
        while received := os.read(self._reader, 1):
            if received[0] not in self.SIGNALS:
                continue
            now = time.monotonic()
            if self._heard and (received[0] == signal.SIGINT or now - self._heard > REPEAT_SECONDS):
                os._exit(75)
            self._heard = self._heard or now
            self.ask(signal.Signals(received[0]).name)
        os.close(self._reader)

    def ask(self, why: str) -> None:
        """As a signal does; what asks by a file and by a signal, as a supervisor and torchrun may, asks once."""
        if not self.signal:
            self.signal = why
            log.info(f"{why}: saving after this step or the next; SIGINT to leave at once.")

    def close(self) -> None:
        """Signals do again what they did before."""
        signal.set_wakeup_fd(self._old)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._writer)


@dataclass
class Run:
    """Everything a step needs."""

    recipe: Recipe
    model: Decoder
    optimizer: AdamW
    directory: RunDirectory
    fingerprints: dict[str, str]
    facts: dict
    domains: dict[str, DomainData]
    pad_id: int
    stop: StopRequest
    decisions: list[Decision]
    began_at: int
    """Step of the checkpoint that was resumed, or 0."""
    phase: str = "start"
    """Up to the end of the first step, then "step"."""
    accepted: list[Measured] = field(default_factory=list)
    """Loss and gradient norm of the steps that a spike is measured by."""
    skipped_in_row: int = 0
    clock: Clock = field(init=False)
    orders: list[Order] = field(init=False)
    saver: Saver = field(init=False)
    board: TensorBoard | None = None
    validated_at: int = -1
    saved_at: int = -1
    saved_decisions: int = 0
    retry_at: int | None = None
    """Step after which a save that failed is tried again."""
    stopping: bool = False
    console_lost: bool = False
    """Whether the events say that nobody reads what is printed any more."""

    def __post_init__(self) -> None:
        self.reckon()
        self.open_saver()

    def reckon(self) -> None:
        """Clock and order of the data, from recipe and decisions."""
        self.clock = Clock(self.recipe, extensions_of(self.decisions))
        self.orders = mixtures(self.recipe, self.clock, self.decisions)

    def decide(self, decision: Decision, number: int) -> None:
        """Adds a decision to the run's state and the events. What was measured and is no number is null in it."""
        decision = plain_numbers(decision)
        self.decisions.append(decision)
        self.reckon()
        more = {key: value for key, value in decision.items() if key not in ("kind", "step")}
        self.directory.event(decision["kind"], number, self.clock.tokens_at(number), **more)

    def open_saver(self) -> None:
        """For the process groups that there are now."""
        self.saver = Saver(self.recipe.checkpoint.publish, self._prune, self.directory.fence)

    def _prune(self) -> list[int]:
        keep = self.recipe.checkpoint
        return prune(self.directory.checkpoints, keep.keep_last, keep.keep_every_steps)


@contextmanager
def slow_phase(run: Run, phase: str):
    """Ranks may wait long for each other: while one writes or reads slowly ("save"), or the model is asked ("evaluate")."""
    allowed(run.recipe, phase)
    try:
        yield
    finally:
        allowed(run.recipe, run.phase)


GRACE = 30.0
"""Seconds that a collective waits longer than the watchdog, which knows more about a hang."""


def allowed(recipe: Recipe, phase: str) -> None:
    """From now on, what a rank may take between two signs of life, and what a collective waits."""
    rules = recipe.health
    seconds = {
        "start": rules.start_timeout_seconds,
        "step": rules.step_timeout_seconds,
        "save": rules.save_timeout_seconds,
        "evaluate": rules.evaluate_timeout_seconds,
    }[phase]
    heartbeat.set_deadline(phase, seconds)
    set_timeout(seconds + (GRACE if recipe.health.watchdog else 0.0))


def measure(run: Run, sets: ValidationSets, stage: Stage) -> dict[str, Loss]:
    """Validation losses of the model as it is."""
    layout = run.model.mesh.layout
    micro = run.recipe.parallel_of(stage).micro_batch_tokens
    rows = rows_at_once(micro, sets.seq_len, token_unit(layout.tensor, layout.context))
    with slow_phase(run, "evaluate"):
        return validate(run.model, sets, rows, run.pad_id)


def validated(run: Run, sets: ValidationSets, number: int, stage: Stage) -> None:
    """Measures and writes it down."""
    losses = {name: loss.mean for name, loss in measure(run, sets, stage).items()}
    run.validated_at = number
    run.directory.event("validation", number, run.clock.tokens_at(number), losses=losses)
    if run.board:
        run.board.validation(losses, number)
    log.info("validation  " + "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))


def state_of(run: Run, number: int) -> State:
    stage = run.recipe.stages[run.clock.step(max(1, number)).stage]
    tokens, measured = run.clock.tokens_at(number), [list(pair) for pair in run.accepted]
    updates, missed = run.optimizer.num_updates, dict(run.optimizer.missed)
    return State(
        number, tokens, updates, stage.name, list(run.decisions), run.fingerprints, measured, run.skipped_in_row, missed
    )


def saved(run: Run, number: int, wait: bool = True, must: bool = True) -> None:
    """Saves the state after a step.

    Args:
        wait: until it is published, with `checkpoint.asynchronous` too.
        must: the run cannot go on without it.
    Raises:
        ReplicaError, NumbersError: if ranks hold different weights, or some that are not finite; nothing is saved then.
        SaveError: with `must`, if it was not saved. Without, training goes on and tries again later.
    """
    state, tensors = state_of(run, number), tensors_of(run.optimizer.parameters, run.optimizer)
    with slow_phase(run, "save"):
        check_finite(run.optimizer, number)
        check_replicas(run.optimizer, run.model, number)
        if run.recipe.checkpoint.asynchronous:
            stall = run.saver.start(run.directory.checkpoints, tensors, state, run.facts)
            log.info(f"saving step {number} behind the training, {stall:.2f} s to copy")
            if wait:
                run.saver.wait()
        else:
            run.saver.now(run.directory.checkpoints, tensors, state, run.facts)
    run.saved_at, run.saved_decisions, run.retry_at = number, len(run.decisions), None
    told_of_saves(run, number, wait or not run.recipe.checkpoint.asynchronous, must)


def told_of_saves(run: Run, number: int, agreed: bool, must: bool = False) -> None:
    """Writes down what has become of saves.

    Args:
        number: of the step that is done.
        agreed: all ranks call it, knowing that a save has ended. Without, this rank keeps a failure to itself.
        must: raise what went wrong.
    """
    if run.saver.failed and not agreed:
        return
    while run.saver.outcomes:
        outcome = run.saver.outcomes.pop(0)
        state = outcome.state
        if outcome.error is None:
            more = {"host_gib": round(resident_gib(), 3)}
            run.directory.event(
                "saved", state.step, state.tokens, seconds=round(outcome.seconds, 3), removed=outcome.removed, **more
            )
            log.info(
                f"saved {run.directory.checkpoints.name}/step-{state.step:08d} in {outcome.seconds:.1f} s, "
                f"{more['host_gib']:.2f} GiB of host memory"
            )
            continue
        run.directory.event("save_failed", state.step, state.tokens, error=str(outcome.error))
        if must or not isinstance(outcome.error, SaveError):
            raise outcome.error
        run.saved_at, run.saved_decisions = -1, 0
        run.retry_at = number + min(RETRY_STEPS, run.recipe.checkpoint.every_steps)
        log.warn(f"{outcome.error} Training goes on; tried again after step {run.retry_at}.")


RETRY_STEPS = 10
