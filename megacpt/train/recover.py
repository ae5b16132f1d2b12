"""What follows from updates that were skipped: they enter no statistics, and after several in a row the run goes back to the checkpoint
before them and leaves their data out (PaLM, arXiv 2204.02311, section 5.1: the same batches from another state do not spike)."""

import torch.distributed as dist

from megacpt import log
from megacpt.checkpoint.manifest import State, amend, directory_name, list_steps, read_manifest, verify
from megacpt.checkpoint.save import remove, together
from megacpt.config.clock import Step
from megacpt.config.run_layout import SNAPSHOTS
from megacpt.errors import CheckpointError, NumbersError
from megacpt.survive.health import remember
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
    run.optimizer.take_back()
    run.skipped_in_row += 1
    why = "spike" if abs(loss) < float("inf") and abs(norm) < 3e38 else "not finite"  # false for nan; in fp32
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
        "to_step": target,
        "sequence": sequence,
        "count": step.first_sequence + step.rows - sequence + _left_out_since(run, stage.name, target, sequence),
        "why": why,
    }
    with together(run.saver.group):
        if dist.get_rank() == 0:
            run.directory.fence()
            directory = checkpoints / directory_name(target)
            state = read_manifest(directory).state
            amend(directory, type(state)(**vars(state) | {"decisions": [*state.decisions, decision]}))
            for folder in (checkpoints, *(run.directory.path / SNAPSHOTS).glob("*/")):
                for newer in list_steps(folder):
                    if newer > target:
                        remove(folder, newer)
    left_out = {key: decision[key] for key in ("stage", "sequence", "count", "why")}
    run.directory.event("rollback", number, step.tokens_after, to_step=target, **left_out)
    log.warn(f"{told}: back to step {target}, without {decision['count']} sequences from {sequence} on")
    raise Rollback


def _left_out_since(run: Run, stage: str, target: int, sequence: int) -> int:
    """Sequences that rollbacks to steps after `target` left out: its own decisions do not know of them."""
    skips = [d for d in run.decisions if d["kind"] == "skip" and d["stage"] == stage and d["sequence"] >= sequence]
    return sum(d["count"] for d in skips if d.get("to_step", 0) > target)


ENOUGH = 2
"""Rollbacks to the same weights that brought no update, after which they are held to be what is wrong."""


def _target(run: Run, first_bad: int) -> int:
    """The step to go back to, found by rank 0: the newest from before the streak; an older one if that did not help."""
    found = [0]
    with together(run.saver.group):
        if dist.get_rank() == 0:
            for step in reversed(list_steps(run.directory.checkpoints)):
                if step >= first_bad:
                    continue
                try:
                    state = verify(run.directory.checkpoints / directory_name(step))
                except CheckpointError as error:
                    log.warn(f"skipped a damaged checkpoint: {error}")
                    continue
                found = [found[0] or step + 1]
                if not _is_tried(run, state):
                    found = [step + 1]
                    break
    dist.broadcast_object_list(found, src=0, group=run.saver.group)
    if not found[0]:
        have = list_steps(run.directory.checkpoints)
        told = (
            f"{', '.join(map(str, have))} were saved in the streak: remove them"
            if have
            else "nothing was saved before it"
        )
        raise NumbersError(
            f"{run.skipped_in_row} updates in a row, from step {first_bad} on, were skipped, and there is no checkpoint from before "
            f"({told}). The run would begin anew: look first at the data that events.jsonl names, the learning rate, its warm-up and the "
            "model's config.json."
        )
    return found[0] - 1


def _is_tried(run: Run, state: State) -> bool:
    """Whether the run has gone back to these weights already, as often as is enough, and no update was made from them."""
    back = [d for d in run.decisions if d["kind"] == "skip" and d.get("to_step") == state.step]
    return len(back) >= ENOUGH and state.num_updates == run.optimizer.num_updates
