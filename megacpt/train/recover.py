"""What follows from updates that were skipped: they enter no statistics, and after several in a row the run goes back to the checkpoint
before them and leaves their data out (PaLM, arXiv 2204.02311, section 5.1: the same batches from another state do not spike)."""

import torch.distributed as dist

from megacpt import log
from megacpt.checkpoint.manifest import amend, directory_name, list_steps, read_manifest, verify
from megacpt.checkpoint.save import remove, together
from megacpt.config.clock import Step
from megacpt.errors import CheckpointError, NumbersError
from megacpt.train.health import remember
from megacpt.train.job import Run, told_of_saves


class Rollback(Exception):
    """The run goes on from a checkpoint of its own that knows which data it leaves out."""


def judged(run: Run, step: Step, loss: float, norm: float, skipped: bool) -> str | None:
    """Takes notice of a step whose update was made or skipped, on all ranks alike. Returns why it was skipped.

    Raises:
        Rollback: after `health.rollback_after` of them in a row.
        NumbersError: if there is nowhere to go back to, or it was done too often.
    """
    rules = run.recipe.health
    if not skipped:
        run.skipped_in_row = 0
        remember(run.accepted, loss, norm, rules)
        return None
    run.optimizer.num_updates -= 1
    run.skipped_in_row += 1
    why = "spike" if abs(loss) < float("inf") and abs(norm) < float("inf") else "not finite"  # false for nan
    rows = [step.first_sequence, step.first_sequence + step.rows]
    run.directory.event(
        "skipped", step.number, step.tokens_after, why=why, loss=repr(loss), grad_norm=repr(norm), sequences=rows
    )
    log.warn(f"step {step.number}: the update was skipped ({why}): loss {loss:.4g}, gradient norm {norm:.4g}")
    return why


def go_back(run: Run, step: Step, why: str) -> None:
    """To the newest checkpoint from before the updates that were skipped in a row, of which `step` is the last."""
    rules, number, stage = run.recipe.health, step.number, run.recipe.stages[step.stage]
    first_bad, checkpoints = number - run.skipped_in_row + 1, run.directory.checkpoints
    run.saver.wait()
    told_of_saves(run, number, agreed=True)
    told = f"{run.skipped_in_row} updates in a row, steps {first_bad} to {number}, were skipped ({why})"
    done = sum(decision["kind"] == "skip" for decision in run.decisions)
    if done >= rules.max_rollbacks:
        raise NumbersError(
            f"{told}, and the run has gone back {done} times already (health.max_rollbacks = {rules.max_rollbacks}). Look at the data that "
            f"events.jsonl names, and at the learning rate; then raise health.max_rollbacks."
        )
    target = _target(run, first_bad)
    same = target >= run.clock.stage_numbers(step.stage)[0]
    sequence = run.clock.step(target + 1).first_sequence if same else 0
    decision = {
        "kind": "skip",
        "stage": stage.name,
        "step": number,
        "sequence": sequence,
        "count": step.first_sequence + step.rows - sequence,
        "why": why,
    }
    with together(run.saver.group):
        if dist.get_rank() == 0:
            run.directory.fence()
            directory = checkpoints / directory_name(target)
            state = read_manifest(directory).state
            amend(directory, type(state)(**vars(state) | {"decisions": [*state.decisions, decision]}))
            for newer in list_steps(checkpoints):
                if newer > target:
                    remove(checkpoints, newer)
    left_out = {key: decision[key] for key in ("stage", "sequence", "count", "why")}
    run.directory.event("rollback", number, step.tokens_after, to_step=target, **left_out)
    log.warn(f"{told}: back to step {target}, without {decision['count']} sequences from {sequence} on")
    raise Rollback


def _target(run: Run, first_bad: int) -> int:
    """The step to go back to, found by rank 0."""
    found = [0]
    with together(run.saver.group):
        if dist.get_rank() == 0:
            for step in reversed(list_steps(run.directory.checkpoints)):
                try:
                    if step < first_bad and verify(run.directory.checkpoints / directory_name(step)):
                        found = [step + 1]
                        break
                except CheckpointError as error:
                    log.warn(f"skipped a damaged checkpoint: {error}")
    dist.broadcast_object_list(found, src=0, group=run.saver.group)
    if not found[0]:
        raise NumbersError(
            f"{run.skipped_in_row} updates in a row, from step {first_bad} on, were skipped, and there is no checkpoint from before. Look "
            "at the data and the learning rate, or save more often (checkpoint.every_steps)."
        )
    return found[0] - 1
