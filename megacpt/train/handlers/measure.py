"""Measuring the model: before the first step, for validation, and for the weights of a mixture."""

import math

from megacpt import log
from megacpt.config.decisions import MixtureChange, groups_of, reweighted
from megacpt.config.timeline import Event
from megacpt.evaluate.validation import ValidationSets
from megacpt.train.handlers.gates import gate_runner
from megacpt.train.session import Session


def baseline(session: Session, event: Event) -> None:
    """Measures what recovery and forgetting will be compared with."""
    if session.state.decisions.baseline():
        return
    with session.slow("evaluate"):
        found = gate_runner(session).baseline(session.model)
    if found:
        session.record_decision(found, event.step)


def run_validation(session: Session, event: Event) -> None:
    """Measures the held-out documents of every domain and writes their losses down."""
    losses = {name: loss.mean for name, loss in session.measure(session.validation_sets()).items()}
    session.directory.event("validation", event.step, session.clock.tokens_at(event.step), losses=losses)
    if session.board:
        session.board.validation(losses, event.step)
    log.info("validation  " + "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))


def reweight(session: Session, event: Event) -> None:
    """Measures the domains of the groups and decides the weights from the next step on. The first measurement of a stage only
    stands for the next to compare with."""
    recipe, stage, decisions = session.plan.recipe, session.stage.recipe, session.state.decisions
    groups = groups_of(recipe, stage)
    names = [name for group in groups for name in group if recipe.data[name].holdout_documents]
    losses = session.measure(ValidationSets(recipe, stage.seq_len, session.domains, names))
    finite = {name: loss for name, loss in losses.items() if math.isfinite(loss.mean)}  # else nothing is measured of it
    now = {name: (round(loss.mean, 4), round(loss.error, 6)) for name, loss in finite.items()}
    rules = recipe.mixture.online
    assert rules is not None, "the timeline has this event only with them"
    earlier, weights = decisions.of(MixtureChange, stage.name), {}
    if earlier:
        current, before = decisions.weights(stage)[-1][1], earlier[-1].losses
        weights = reweighted(stage.mixture, current, groups, before, now, rules)
        shares = {name: weight / sum(weights.values()) for name, weight in weights.items()}
        log.info("mixture  " + "  ".join(f"{name} {share:.4f}" for name, share in shares.items()))
        if session.board:
            session.board.mixture(shares, event.step)
    step = session.clock.step(event.step)
    sequence = step.first_sequence + step.rows
    change = MixtureChange(stage=stage.name, sequence=sequence, losses=now, weights=weights)
    session.record_decision(change, event.step)
