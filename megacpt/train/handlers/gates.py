"""Gates at a stage's end: go on, go on with a warning, make the stage longer, or stop."""

import numpy as np

from megacpt import log
from megacpt.config.decisions import Extension, GateAction, GateDecision
from megacpt.config.resolve import ResolvedStage
from megacpt.config.run_layout import gate_picture
from megacpt.config.timeline import Event
from megacpt.errors import GateError
from megacpt.evaluate.gates import GateRunner, Outcome
from megacpt.evaluate.needle import heat_map
from megacpt.files import describe_os_error
from megacpt.survive.run_directory import plain_numbers
from megacpt.train.saving import save_checkpoint
from megacpt.train.session import Session


def gate_runner(session: Session) -> GateRunner:
    micro = session.stage.micro_batch_tokens
    return GateRunner(session.plan.recipe, session.domains, session.pad_id, session.base, micro)


def run_gates(session: Session, event: Event) -> None:
    """Asks the gates of a stage that has ended, and decides what follows.

    Raises:
        GateError: if a gate is not passed and the recipe says stop, or no extension is left. The state has been saved.
    """
    stage, decisions, before = session.stage, session.state.decisions, session.state
    with session.slow("evaluate"):
        outcomes = gate_runner(session).evaluate(session.model, stage.recipe, decisions.baseline())
    failed = [outcome for outcome in outcomes if not outcome.passed]
    show_outcomes(session, stage, outcomes, event.step)
    action, rule = action_after(stage, decisions.extension(stage.name), failed), stage.recipe.on_fail
    results = [plain_numbers(outcome.plain()) for outcome in outcomes]
    decision = GateDecision(stage=stage.name, step=event.step, passed=not failed, action=action, results=results)
    session.record_decision(decision, event.step)
    if action == "extend":
        assert rule.tokens is not None, "on_fail says extend, and by how much"
        session.record_decision(Extension(stage=stage.name, step=event.step, by_tokens=rule.tokens), event.step)
        total = session.state.decisions.extension(stage.name)
        log.info(f"stage {stage.name} goes on for {rule.tokens} tokens ({total} of at most {rule.limit})")
    elif action == "stop":
        assert session.state.position == before.position  # so that a resume asks again
        save_checkpoint(session, session.state)
        lines = [f"{outcome.gate}: {complaint}" for outcome in failed for complaint in outcome.complaints]
        raise GateError(stage.name, event.step, lines)
    elif failed:
        log.warn(f"stage {stage.name} goes on although {len(failed)} of its gates were not passed")


def action_after(stage: ResolvedStage, extended: int, failed: list[Outcome]) -> GateAction:
    """What follows: the recipe's `on_fail`, or stop where the stage cannot become longer.

    Args:
        extended: tokens by which it is longer already.
    """
    rule = stage.recipe.on_fail
    if not failed:
        return "pass"
    if rule.action == "extend":
        assert rule.tokens is not None and rule.limit is not None, "on_fail says extend, by how much and how far"
        return "stop" if extended + rule.tokens > rule.limit else "extend"
    return rule.action


def show_outcomes(session: Session, stage: ResolvedStage, outcomes: list[Outcome], step: int) -> None:
    for outcome in outcomes:
        if outcome.grid is not None:
            draw(session, f"{stage.name}-{outcome.gate}", heat_map(outcome.grid), step)
        words = "passed" if outcome.passed else "; ".join(outcome.complaints)
        log.info(f"gate {outcome.gate} of stage {stage.name}: {words}")


def draw(session: Session, name: str, picture: np.ndarray, step: int) -> None:
    """Keeps a picture in the run directory and in TensorBoard."""
    if session.directory.write:
        from PIL import Image

        file = gate_picture(session.directory.path, name, step)
        try:
            file.parent.mkdir(exist_ok=True)
            Image.fromarray(picture).save(file)
        except OSError as error:  # the numbers stand in the decision
            log.warn(describe_os_error(error, file))
    if session.board:
        session.board.picture(f"gates/{name}", picture, step)
