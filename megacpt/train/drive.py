"""The run, event by event. Which comes next follows from the plan, the decisions and the position (config/timeline.py); nothing is decided
here."""

from collections.abc import Callable

from megacpt.config.timeline import Event, Kind
from megacpt.train.handlers.gates import run_gates
from megacpt.train.handlers.measure import baseline, reweight, run_validation
from megacpt.train.handlers.stages import enter
from megacpt.train.handlers.steps import checksum, train
from megacpt.train.handlers.weights import average, finish, save, snapshot
from megacpt.train.saving import save_checkpoint
from megacpt.train.session import Session

HANDLERS: dict[Kind, Callable[[Session, Event], None]] = {
    "enter": enter,
    "baseline": baseline,
    "train": train,
    "checksum": checksum,
    "validate": run_validation,
    "reweight": reweight,
    "snapshot": snapshot,
    "save": save,
    "average": average,
    "gates": run_gates,
    "finish": finish,
}


def drive(session: Session) -> str:
    """Handles every event behind the session's position. Returns how it ended: finished, or preempted where that was asked.

    Raises:
        Rollback: the run goes on from an earlier checkpoint, in a new session.
    """
    while event := session.next_event():
        HANDLERS[event.kind](session, event)
        session.state = session.state_after(event)
        if session.stop.agreed:
            save_checkpoint(session, session.state)
            session.directory.event("stopped", event.step, session.state.tokens, signal=session.stop.signal)
            return "preempted"
    return "finished" if session.state.step == session.clock.num_steps else "preempted"
