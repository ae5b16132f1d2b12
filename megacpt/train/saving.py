"""Checkpoints of a running session: made, and what has become of them."""

from megacpt import log
from megacpt.checkpoint.manifest import RunState
from megacpt.checkpoint.save import tensors_of
from megacpt.errors import SaveError
from megacpt.survive.health import check_finite, check_replicas
from megacpt.train.metrics import resident_gib
from megacpt.train.session import Session

RETRY_STEPS = 10
"""After a save that failed, the next is tried so many steps later, or at the next interval."""


def save_checkpoint(session: Session, state: RunState, *, wait: bool = True, required: bool = True) -> None:
    """Saves weights, moments and a state. Collective.

    Args:
        wait: until it is published, with `checkpoint.asynchronous` too.
        required: the run cannot go on without it.
    Raises:
        ReplicaError, NumbersError: if ranks hold different weights, or some that are not finite; nothing is saved then.
        SaveError: with `required`, if it was not saved. Without, training goes on and tries again later.
    """
    tensors, folder = tensors_of(session.optimizer.parameters, session.optimizer), session.directory.checkpoints
    asynchronous = session.plan.recipe.checkpoint.asynchronous
    with session.slow("save"):
        check_finite(session.optimizer, state.step)
        check_replicas(session.optimizer, session.model, state.step)
        if asynchronous:
            stall = session.saver.start(folder, tensors, state, session.directory.facts)
            log.info(f"saving step {state.step} in the background ({stall:.2f} s to copy)")
            if wait:
                session.saver.wait()
        else:
            session.saver.now(folder, tensors, state, session.directory.facts)
    session.saved, session.retry_at = state, None
    report_finished_saves(session, state.step, agreed=wait or not asynchronous, required=required)


def is_saved(session: Session) -> bool:
    """Whether weights and decisions of now are in a checkpoint."""
    saved, now = session.saved, session.state
    return saved is not None and (saved.step, saved.decisions) == (now.step, now.decisions)


def report_finished_saves(session: Session, step: int, agreed: bool, required: bool = False) -> None:
    """Writes down what has become of saves.

    Args:
        step: the one that is done.
        agreed: all ranks call it, knowing that a save has ended. Without, this rank keeps a failure to itself.
        required: raise what went wrong.
    """
    saver, directory = session.saver, session.directory
    if saver.failed and not agreed:
        return
    while saver.outcomes:
        outcome = saver.outcomes.pop(0)
        state = outcome.state
        if outcome.error is None:
            host = round(resident_gib(), 3)
            seconds = round(outcome.seconds, 3)
            directory.event("saved", state.step, state.tokens, seconds=seconds, removed=outcome.removed, host_gib=host)
            folder = f"{directory.checkpoints.name}/step-{state.step:08d}"
            log.info(f"saved {folder} in {outcome.seconds:.1f} s, {host:.2f} GiB of host memory")
            continue
        directory.event("save_failed", state.step, state.tokens, error=str(outcome.error))
        if required or not isinstance(outcome.error, SaveError):
            raise outcome.error
        session.saved = None
        session.retry_at = step + min(RETRY_STEPS, session.plan.recipe.checkpoint.every_steps)
        log.warn(f"{outcome.error} Training goes on; tried again after step {session.retry_at}.")
