"""Going back over updates that were skipped: after several in a row the run returns to the checkpoint before them and leaves their data out
(PaLM, arXiv 2204.02311, section 5.1: the same batches from another state do not spike)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist

from megacpt import log
from megacpt.checkpoint.manifest import RunState, directory_name, list_steps, read_manifest, rewrite_state, verify
from megacpt.checkpoint.save import all_ranks_or_none, remove_checkpoint
from megacpt.config.decisions import Decisions, Skip
from megacpt.errors import CheckpointError, NumbersError

ENOUGH = 2
"""Rollbacks to the same weights that brought no update, after which they are held to be what is wrong."""


class Rollback(Exception):
    """The run goes on from a checkpoint of its own that knows which data it leaves out."""


@dataclass(frozen=True)
class Streak:
    """Updates that were skipped in a row.

    Attributes:
        first, last: steps. num_updates: that were made before them.
    """

    first: int
    last: int
    why: str
    num_updates: int

    def __str__(self) -> str:
        count = self.last - self.first + 1
        return f"{count} updates in a row, steps {self.first} to {self.last}, were skipped ({self.why})"


def check_rollbacks(decisions: Decisions, streak: Streak, most: int) -> None:
    """Raises NumbersError if the run has gone back too often."""
    done = len(decisions.of(Skip))
    if done >= most:
        raise NumbersError(
            f"{streak}, and the run has gone back {done} times already (health.max_rollbacks = {most}). Look at the data that "
            "events.jsonl names, and at the learning rate; then raise health.max_rollbacks."
        )


def find_target(checkpoints: Path, decisions: Decisions, streak: Streak, group: dist.ProcessGroup | None) -> int:
    """The step to go back to, found by rank 0: the newest from before the streak; an older one if that did not help. Collective.

    Raises:
        NumbersError: if nothing was saved before the streak.
    """
    found = [0]
    with all_ranks_or_none(group):
        if dist.get_rank() == 0:
            for step in reversed(list_steps(checkpoints)):
                if step >= streak.first:
                    continue
                try:
                    state = verify(checkpoints / directory_name(step))
                except CheckpointError as error:
                    log.warn(f"skipped a damaged checkpoint: {error}")
                    continue
                found = [found[0] or step + 1]
                if not _is_tried(state, decisions, streak):
                    found = [step + 1]
                    break
    dist.broadcast_object_list(found, src=0, group=group)
    if found[0]:
        return found[0] - 1
    have = list_steps(checkpoints)
    reason = (
        f"{', '.join(map(str, have))} were saved in the streak: remove them" if have else "nothing was saved before it"
    )
    raise NumbersError(
        f"{streak.last - streak.first + 1} updates in a row, from step {streak.first} on, were skipped, and there is no checkpoint from "
        f"before ({reason}). The run would begin anew: look first at the data that events.jsonl names, the learning rate, its warm-up and "
        "the model's config.json."
    )


def _is_tried(state: RunState, decisions: Decisions, streak: Streak) -> bool:
    """Whether the run has gone back to these weights already, as often as is enough, and no update was made from them."""
    back = [skip for skip in decisions.of(Skip) if skip.to_step == state.step]
    return len(back) >= ENOUGH and state.num_updates == streak.num_updates


def left_out_since(decisions: Decisions, stage: str, target: int, sequence: int) -> int:
    """Sequences that rollbacks to steps after `target` left out: its own decisions do not know of them."""
    skips = [skip for skip in decisions.of(Skip, stage) if skip.sequence >= sequence]
    return sum(skip.count for skip in skips if skip.to_step > target)


def rewind(
    checkpoints: Path,
    snapshots: Path,
    target: int,
    decision: Skip,
    fence: Callable[[], None],
    group: dist.ProcessGroup | None,
) -> None:
    """Makes a checkpoint the newest, and lets it know what is left out behind it. Collective; rank 0 writes."""
    with all_ranks_or_none(group):
        if dist.get_rank() == 0:
            fence()
            directory = checkpoints / directory_name(target)
            state = read_manifest(directory).state
            rewrite_state(directory, replace(state, decisions=state.decisions.plus(decision)))
            for folder in (checkpoints, *snapshots.glob("*/")):
                for newer in list_steps(folder):
                    if newer > target:
                        remove_checkpoint(folder, newer)
