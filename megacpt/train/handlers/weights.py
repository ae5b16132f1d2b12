"""Weights kept: checkpoints, the snapshots of a stage's average, the average, and the end of the run."""

import math
from pathlib import Path

from megacpt import log
from megacpt.checkpoint.average import average_into, average_weights
from megacpt.checkpoint.manifest import directory_name, list_steps
from megacpt.checkpoint.save import prune, tensors_of
from megacpt.checkpoint.save import save as write_checkpoint
from megacpt.config.decisions import AverageDecision
from megacpt.config.resolve import ResolvedStage
from megacpt.config.run_layout import AVERAGES, snapshot_folder
from megacpt.config.sections.stage import Average
from megacpt.config.timeline import Event, last_step
from megacpt.errors import NumbersError, SaveError
from megacpt.parallel.sharded import local_part
from megacpt.survive.health import check_finite
from megacpt.survive.run_directory import plain_numbers
from megacpt.train.saving import is_saved, save_checkpoint
from megacpt.train.session import Session


def save(session: Session, event: Event) -> None:
    """Saves what is due. In a streak of skipped updates the weights may be what is wrong: they are saved once an update is made again."""
    recipe, clock = session.plan.recipe, session.clock
    last = event.step == last_step(recipe, clock)
    if session.state.skipped_in_row and not last:
        session.retry_at = event.step + 1
        return
    ends_stage = event.step == clock.stage_numbers(event.stage)[-1]
    required = event.step == clock.num_steps
    save_checkpoint(session, session.state_after(event), wait=last or ends_stage, required=required)


def snapshots_of(session: Session, stage: ResolvedStage) -> Path:
    return snapshot_folder(session.directory.path, stage.name)


def average_rules(stage: ResolvedStage) -> Average:
    """Of a stage that has an average: the timeline has its events for no other."""
    assert stage.recipe.average is not None
    return stage.recipe.average


def snapshot(session: Session, event: Event) -> None:
    """Keeps the weights for the stage's average."""
    if session.state.skipped_in_row:  # what is wrong may be the weights: no part of an average
        log.warn(f"no snapshot of step {event.step}: its update was skipped")
        return
    folder, saver, kept = snapshots_of(session, session.stage), session.saver, average_rules(session.stage).last
    with session.slow("save"):
        saver.wait()  # its thread talks on the group that is used here
        check_finite(session.optimizer, event.step)
        tensors, state = tensors_of(session.optimizer.parameters, None), session.state_after(event)

        def prune_snapshots() -> list[int]:
            return prune(folder, kept, None)

        try:
            write_checkpoint(
                folder, tensors, state, session.directory.facts, saver.group, saver.how, prune_snapshots, saver.fence
            )
        except SaveError as error:  # one snapshot less in the average
            session.directory.event("save_failed", event.step, state.tokens, error=str(error))
            log.warn(str(error))


def average(session: Session, event: Event) -> None:
    """Makes the average of the stage's snapshots beside its last weights, measures both and marks the better one. Training goes on from
    the last."""
    stage, parameters = session.stage, session.optimizer.parameters
    folder, rules = snapshots_of(session, stage), average_rules(stage)
    steps = [step for step in list_steps(folder) if step <= event.step][-rules.last :]
    if not steps:
        log.warn(f"{folder}: holds no snapshot of stage {stage.name}; nothing is averaged")
        return
    last = {name: local_part(p).detach().clone() for name, p in parameters.items()}
    losses = {"last": rounded_losses(session)}
    write_average(session, event, [folder / directory_name(step) for step in steps], steps)
    losses["average"] = rounded_losses(session)
    for name, parameter in parameters.items():
        local_part(parameter).detach().copy_(last[name])
    means = {which: sum(values.values()) / max(1, len(values)) for which, values in losses.items()}
    known = {which: mean for which, mean in means.items() if math.isfinite(mean)}
    better = min(known, key=known.__getitem__) if known and any(losses.values()) else "unknown"
    found = AverageDecision(stage=stage.name, step=event.step, steps=steps, losses=plain_numbers(losses), better=better)
    session.record_decision(found, event.step)
    log.info(f"average of steps {steps}: mean loss {means['average']:.4f}, last {means['last']:.4f}; better: {better}")


def write_average(session: Session, event: Event, folders: list[Path], steps: list[int]) -> None:
    """Fills the model with the average of snapshots and keeps it in the run directory."""
    saver, tensors = session.saver, tensors_of(session.optimizer.parameters, None)
    with session.slow("save"):
        saver.wait()  # its thread talks on the group that is used here
        weights = average_weights(average_rules(session.stage).decay, len(steps))
        average_into(tensors["model"], folders, weights)
        check_finite(session.optimizer, event.step)
        facts = session.directory.facts | {"average_of": steps, "weights": weights}
        output, state = session.directory.path / AVERAGES, session.state_after(event)
        write_checkpoint(output, tensors, state, facts, saver.group, saver.how, fence=saver.fence)


def rounded_losses(session: Session) -> dict[str, float]:
    if not session.plan.recipe.validation:
        return {}
    return {name: round(loss.mean, 4) for name, loss in session.measure(session.validation_sets()).items()}


def finish(session: Session, event: Event) -> None:
    """Looks back at the run's end, and saves what has been decided since the last save; also the imported model of stop_at_step = 0.

    Raises:
        NumbersError: if the run ends and made no update.
    """
    if event.step == session.clock.num_steps:
        if session.optimizer.num_updates == 0:
            raise NumbersError(
                f"all {event.step} updates of the run were skipped: it has changed nothing. Look at the data that events.jsonl names, "
                "at the learning rate and at the model's config.json, and begin a new run."
            )
        if skipped := session.state.skipped_in_row:
            log.warn(f"the last {skipped} updates of the run were skipped: evaluate the model before it is used")
    if not is_saved(session):
        save_checkpoint(session, session.state)
