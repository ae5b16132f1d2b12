"""A training step and its row, and looking at the weights after it."""

import gc
import time
from dataclasses import replace

from megacpt import heartbeat, log
from megacpt.config.clock import Step
from megacpt.config.decisions import Skip
from megacpt.config.run_layout import SNAPSHOTS
from megacpt.config.timeline import Event
from megacpt.data.loader import domain_tokens
from megacpt.errors import LeaseError
from megacpt.objective.choose import objective_of
from megacpt.optim.schedule import rate_of_step
from megacpt.survive.health import add_accepted_step, check_finite, check_replicas, spike_thresholds
from megacpt.survive.recover import Rollback, Streak, check_rollbacks, find_target, left_out_since, rewind
from megacpt.train.metrics import StepFacts, memory_gib
from megacpt.train.saving import report_finished_saves
from megacpt.train.session import Session
from megacpt.train.step import StepResult, StepSignals, Update, read_result, train_step

COLLECT_EVERY_STEPS = 100
"""A garbage collection in one rank's step is a stall of all: it runs on all at once."""


def train(session: Session, event: Event) -> None:
    """Trains one step, writes its row, and goes back to a checkpoint if too many updates in a row were skipped.

    Raises:
        Rollback, NumbersError: after `health.rollback_after` skipped updates in a row.
        LeaseError: if the run directory has become another job's.
    """
    step = session.clock.step(event.step)
    heartbeat.reach("step.begin", step.number)
    session.profiler.before(step.number)
    begin = time.monotonic()
    batch = session.take_rows(step)
    data_seconds = time.monotonic() - begin
    update, signals = update_of(session, step), signals_of(session)
    how = session.stage.reduction, update, signals, objective_of(session.stage.objective)
    result = read_result(train_step(session.model, session.optimizer, batch, *how))
    seconds = time.monotonic() - begin
    if result.lost:
        raise LeaseError(
            f"{session.directory.path}: another job owns the run directory by now. Nothing more is written there."
        )
    if session.phase == "start":
        session.enter_phase("step")
    why = record_outcome(session, step, result)
    session.profiler.after(step.number)
    session.stragglers.add(seconds, data_seconds)
    write_row(session, step, facts_of(session, step, result, update.lr, batch.num_pairs, seconds, data_seconds, why))
    if why and session.state.skipped_in_row >= session.plan.recipe.health.rollback_after:
        roll_back(session, step, why)
    after_step(session, step, result)


def signals_of(session: Session) -> StepSignals:
    """What this rank has to tell the others."""
    return StepSignals(session.stop.signal is not None, session.saver.failed, session.directory.lost)


def update_of(session: Session, step: Step) -> Update:
    """Numbers of the step's update."""
    stage = session.stage
    rate = rate_of_step(stage.schedule, session.clock, step)
    thresholds = spike_thresholds(session.state.accepted, session.plan.recipe.health)
    frozen = frozenset(stage.frozen)
    return Update(
        rate, stage.betas, stage.eps, stage.weight_decay, stage.clip_norm, frozen, thresholds.loss, thresholds.grad_norm
    )


def record_outcome(session: Session, step: Step, result: StepResult) -> str | None:
    """Takes notice of an update that was made or skipped, on all ranks alike. Returns why it was skipped."""
    state = session.state
    if not result.skipped:
        accepted = add_accepted_step(state.accepted, result.stats, session.plan.recipe.health)
        session.state = replace(state, accepted=accepted, skipped_in_row=0)
        return None
    session.optimizer.take_back()
    session.state = replace(state, skipped_in_row=state.skipped_in_row + 1)
    loss, norm = result.stats.loss, result.stats.grad_norm
    why = "spike" if abs(loss) < float("inf") and abs(norm) < 3e38 else "not finite"  # false for nan; in fp32
    rows = [step.first_sequence, step.first_sequence + step.rows]
    session.directory.event(
        "skipped", step.number, step.tokens_after, why=why, loss=repr(loss), grad_norm=repr(norm), sequences=rows
    )
    log.warn(f"step {step.number}: the update was skipped ({why}): loss {loss:.4g}, gradient norm {norm:.4g}")
    return why


def facts_of(
    session: Session,
    step: Step,
    result: StepResult,
    lr: float,
    pairs: int,
    seconds: float,
    data_seconds: float,
    why: str | None,
) -> StepFacts:
    """What the step's row is made of."""
    return StepFacts(
        stage=session.stage.name,
        trained=session.stage.trainable.names,
        stats=result.stats,
        lr=lr,
        pairs=pairs,
        domain_tokens=domain_tokens(session.plan.recipe, session.clock, session.orders, step.number),
        seconds=seconds,
        data_seconds=data_seconds,
        memory_gib=memory_gib(session.device),
        skipped=why,
        effective_time=session.directory.effective(0.0 if why else seconds),
    )


def write_row(session: Session, step: Step, facts: StepFacts) -> None:
    """The step's row in metrics.jsonl, TensorBoard and on the console. Collective where ranks' times are due."""
    row = session.metrics.row(step, facts)
    if step.number % session.plan.recipe.health.straggler_every_steps == 0:
        row |= session.stragglers.gather()
    session.directory.metrics(row)
    if session.board:
        session.board.step(row)
    if line := session.console.line(row, session.clock):
        log.info(line)
    if log.lost and not session.console_lost:
        session.console_lost = True
        session.directory.event("console_lost", step.number, step.tokens_after, error=log.lost)


def after_step(session: Session, step: Step, result: StepResult) -> None:
    """What all ranks agreed in the step."""
    if step.number % COLLECT_EVERY_STEPS == 0:
        gc.collect()
    session.stop.agreed = result.stop
    if result.save_failed:
        session.saver.wait()
    report_finished_saves(session, step.number, agreed=result.save_failed)
    heartbeat.reach("step.end")


def roll_back(session: Session, step: Step, why: str) -> None:
    """Goes back to the newest checkpoint from before the updates that were skipped in a row, of which `step` is the last. Collective.

    Raises:
        Rollback: always, unless NumbersError: there is nowhere to go back to, or it was done too often.
    """
    stage, clock, directory, decisions = session.stage, session.clock, session.directory, session.state.decisions
    streak = Streak(step.number - session.state.skipped_in_row + 1, step.number, why, session.optimizer.num_updates)
    session.saver.wait()
    report_finished_saves(session, step.number, agreed=True)
    check_rollbacks(decisions, streak, session.plan.recipe.health.max_rollbacks)
    target = find_target(directory.checkpoints, decisions, streak, session.saver.group)
    same = target >= clock.stage_numbers(step.stage)[0]
    sequence = clock.step(target + 1).first_sequence if same else 0
    count = step.first_sequence + step.rows - sequence + left_out_since(decisions, stage.name, target, sequence)
    skip = Skip(stage=stage.name, step=step.number, to_step=target, sequence=sequence, count=count, why=why)
    rewind(directory.checkpoints, directory.path / SNAPSHOTS, target, skip, directory.fence, session.saver.group)
    facts = {"stage": skip.stage, "sequence": sequence, "count": count, "why": why}
    directory.event("rollback", step.number, step.tokens_after, to_step=target, **facts)
    log.warn(f"{streak}: back to step {target}, without {count} sequences from {sequence} on")
    raise Rollback


def checksum(session: Session, event: Event) -> None:
    """Compares what several ranks hold alike, and looks for what is no number. Collective."""
    check_finite(session.optimizer, event.step)
    check_replicas(session.optimizer, session.model, event.step)
