"""A run while it runs: what a step needs, and what happens between steps: validating, saving, deciding, being asked to stop."""

import os
import signal
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from megacpt import log
from megacpt.checkpoint.background import BackgroundSaver
from megacpt.checkpoint.manifest import State
from megacpt.checkpoint.save import prune, save, tensors_of
from megacpt.config.clock import Clock
from megacpt.config.decisions import Decision, extensions_of
from megacpt.config.layout import token_unit
from megacpt.config.recipe import Recipe
from megacpt.config.stage import Stage
from megacpt.data.loader import mixtures
from megacpt.data.mixture import Order
from megacpt.data.packing import DomainData
from megacpt.evaluate.validation import Loss, ValidationSets, rows_at_once, validate
from megacpt.model.llama import Llama
from megacpt.optim.adamw import AdamW
from megacpt.parallel.mesh import set_timeout
from megacpt.train.metrics import TensorBoard
from megacpt.train.run_directory import RunDirectory


class StopRequest:
    """SIGTERM, SIGUSR1 or SIGINT ask for a checkpoint at the next step boundary; a second one leaves at once."""

    def __init__(self) -> None:
        self.signal: str | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame) -> None:
        if self.signal:
            os._exit(75)
        self.signal = signal.Signals(number).name
        log.info(f"{self.signal}: saving after this step; once more to leave at once.")


@dataclass
class Run:
    """Everything a step needs."""

    recipe: Recipe
    model: Llama
    optimizer: AdamW
    directory: RunDirectory
    fingerprints: dict[str, str]
    facts: dict
    domains: dict[str, DomainData]
    pad_id: int
    stop: StopRequest
    decisions: list[Decision]
    timeout: float
    clock: Clock = field(init=False)
    orders: list[Order] = field(init=False)
    board: TensorBoard | None = None
    saver: BackgroundSaver | None = None
    validated_at: int = -1
    saved_at: int = -1
    saved_decisions: int = 0
    stopping: bool = False

    def __post_init__(self) -> None:
        self.reckon()
        self.open_saver()

    def reckon(self) -> None:
        """Clock and order of the data, from recipe and decisions."""
        self.clock = Clock(self.recipe, extensions_of(self.decisions))
        self.orders = mixtures(self.recipe, self.clock, self.decisions)

    def decide(self, decision: Decision, number: int) -> None:
        """Adds a decision to the run's state and the events."""
        self.decisions.append(decision)
        self.reckon()
        more = {key: value for key, value in decision.items() if key not in ("kind", "step")}
        self.directory.event(decision["kind"], number, self.clock.tokens_at(number), **more)

    def open_saver(self) -> None:
        """For the process groups that there are now."""
        if self.recipe.checkpoint.asynchronous:
            self.saver = BackgroundSaver(self._prune)

    def _prune(self) -> list[int]:
        keep = self.recipe.checkpoint
        return prune(self.directory.checkpoints, keep.keep_last, keep.keep_every_steps)

    def asked(self) -> tuple[bool, bool]:
        """(whether any rank was asked to stop, whether a save failed on any). Collective; one small reduction a step."""
        mine = [self.stop.signal is not None, self.saver is not None and self.saver.error is not None]
        if dist.get_world_size() == 1:
            return mine[0], mine[1]
        flags = torch.tensor([float(x) for x in mine], device=self.model.mesh.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        stop, failed = flags.tolist()
        return bool(stop), bool(failed)


@contextmanager
def slow_phase(run: Run):
    """Ranks may wait long for each other: while rank 0 writes, or one reads slowly."""
    set_timeout(run.recipe.health.save_timeout_seconds)
    try:
        yield
    finally:
        set_timeout(run.timeout)


def measure(run: Run, sets: ValidationSets, stage: Stage) -> dict[str, Loss]:
    """Validation losses of the model as it is."""
    layout = run.model.mesh.layout
    micro = run.recipe.parallel_of(stage).micro_batch_tokens
    rows = rows_at_once(micro, sets.seq_len, token_unit(layout.tensor, layout.context))
    with slow_phase(run):
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
    tokens = run.clock.tokens_at(number)
    return State(number, tokens, run.optimizer.num_updates, stage.name, list(run.decisions), run.fingerprints)


def saved(run: Run, number: int, wait: bool = True) -> None:
    """Saves the state after a step.

    Args:
        wait: until it is published, with `checkpoint.asynchronous` too.
    """
    state, tensors = state_of(run, number), tensors_of(run.optimizer.parameters, run.optimizer)
    with slow_phase(run):
        if run.saver:
            stall = run.saver.start(run.directory.checkpoints, tensors, state, run.facts)
            log.info(f"saving step {number} behind the training, {stall:.2f} s to copy")
            if wait:
                run.saver.wait()
        else:
            seconds = save(run.directory.checkpoints, tensors, state, run.facts)
            if dist.get_rank() == 0:
                _written(run, state, seconds, run._prune())
        dist.barrier()  # the others wait for rank 0 here, not in the next step
    run.saved_at, run.saved_decisions = number, len(run.decisions)
    if wait:
        told_of_saves(run)


def told_of_saves(run: Run) -> None:
    """Writes down what the background saver has published; raises what it met. The latter where all ranks come."""
    if run.saver:
        while run.saver.published:
            _written(run, *run.saver.published.pop(0))
        if run.saver.thread is None and run.saver.error:
            run.saver.raise_error()


def _written(run: Run, state: State, seconds: float, removed: list[int]) -> None:
    run.directory.event("saved", state.step, state.tokens, seconds=round(seconds, 3), removed=removed)
    log.info(f"saved {Path(run.directory.checkpoints).name}/step-{state.step:08d} in {seconds:.1f} s")
