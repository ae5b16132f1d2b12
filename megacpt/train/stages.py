"""What a stage decides: weights of its mixture while it runs, gates at its end, an average of its weights."""

import math
from pathlib import Path

from megacpt import log
from megacpt.checkpoint.average import average_weights, averaged
from megacpt.checkpoint.manifest import directory_name, list_steps
from megacpt.checkpoint.save import prune, save, tensors_of
from megacpt.config.clock import Step
from megacpt.config.decisions import adjusted, baseline_of, groups_of, weight_changes
from megacpt.config.run_layout import AVERAGES, gate_picture, snapshot_folder
from megacpt.errors import GateError, SaveError
from megacpt.evaluate.gates import Examiner
from megacpt.evaluate.needle import heat_map
from megacpt.evaluate.validation import ValidationSets
from megacpt.files import disk_told
from megacpt.survive.health import check_finite
from megacpt.train.job import Run, measure, saved, slow_phase, state_of


def take_baseline(run: Run, index: int) -> None:
    """Before the first step: what recovery and forgetting will be compared with."""
    if not run.recipe.gates or baseline_of(run.decisions):
        return
    with slow_phase(run, "evaluate"):
        baseline = Examiner(run.recipe, run.domains, run.pad_id).baseline(run.model, run.recipe.stages[index])
    if baseline:
        run.decide(baseline, 0)


def mixture_is_due(run: Run, step: Step) -> bool:
    """Whether an interval of the online mixture ends in this step, after its start."""
    rules, stage = run.recipe.mixture.online, run.recipe.stages[step.stage]
    if rules is None or not groups_of(run.recipe, stage):
        return False
    first = run.clock.stage_first_token[step.stage]
    before, after = step.tokens_before - first, step.tokens_after - first
    if step.tokens_after == run.clock.stage_first_token[step.stage + 1]:
        return False  # nothing of the stage is left to mix
    return after >= rules.start_tokens and (
        before // rules.every_tokens != after // rules.every_tokens or before < rules.start_tokens <= after
    )


def adjust_mixture(run: Run, step: Step) -> None:
    """Measures the domains of the groups and decides the weights from the next step on. The first measurement of a stage only
    stands for the next to compare with."""
    recipe, stage = run.recipe, run.recipe.stages[step.stage]
    names = [n for group in groups_of(recipe, stage) for n in group if recipe.data[n].holdout_documents]
    losses = measure(run, ValidationSets(recipe, stage.seq_len, run.domains, names), stage)
    finite = {name: loss for name, loss in losses.items() if math.isfinite(loss.mean)}  # else nothing is measured of it
    now = {name: (round(loss.mean, 4), round(loss.error, 6)) for name, loss in finite.items()}
    earlier = [d for d in run.decisions if d["kind"] == "mixture" and d["stage"] == stage.name]
    current = weight_changes(stage, run.decisions)[-1][1]
    weights = {}
    if earlier:
        before = {name: tuple(pair) for name, pair in earlier[-1]["losses"].items()}
        weights = adjusted(stage.mixture, current, groups_of(recipe, stage), before, now, recipe.mixture.online)
        total = sum(weights.values())
        log.info("mixture  " + "  ".join(f"{name} {weight / total:.4f}" for name, weight in weights.items()))
        if run.board:
            run.board.mixture({name: weight / total for name, weight in weights.items()}, step.number)
    sequence = step.first_sequence + step.rows
    decision = {"kind": "mixture", "stage": stage.name, "sequence": sequence, "losses": now, "weights": weights}
    run.decide(decision, step.number)


def pass_gates(run: Run, index: int, number: int) -> bool:
    """Asks the gates of a stage that has ended. True to go on, False if the stage became longer.

    Raises:
        GateError: if a gate is not passed and the recipe says stop, or no extension is left. The state has been saved.
    """
    recipe, stage = run.recipe, run.recipe.stages[index]
    if not stage.gates or any(
        d["kind"] == "gates" and d["step"] == number and d["action"] != "stop" for d in run.decisions
    ):
        return True
    with slow_phase(run, "evaluate"):
        outcomes = Examiner(recipe, run.domains, run.pad_id).ask(run.model, stage, baseline_of(run.decisions))
    failed = [outcome for outcome in outcomes if not outcome.passed]
    rule, extended = (
        stage.on_fail,
        sum(d["by_tokens"] for d in run.decisions if d["kind"] == "extend" and d["stage"] == stage.name),
    )
    action = rule.action if failed else "pass"
    if action == "extend" and extended + rule.tokens > rule.limit:
        action = "stop"
    for outcome in outcomes:
        if outcome.grid is not None:
            _draw(run, f"{stage.name}-{outcome.gate}", heat_map(outcome.grid), number)
        words = "passed" if outcome.passed else "; ".join(outcome.complaints)
        log.info(f"gate {outcome.gate} of stage {stage.name}: {words}")
    results = [outcome.plain() for outcome in outcomes]
    run.decide(
        {
            "kind": "gates",
            "stage": stage.name,
            "step": number,
            "passed": not failed,
            "action": action,
            "results": results,
        },
        number,
    )
    if action == "extend":
        run.decide({"kind": "extend", "stage": stage.name, "step": number, "by_tokens": rule.tokens}, number)
        log.info(
            f"stage {stage.name} goes on for {rule.tokens} tokens ({extended + rule.tokens} of at most {rule.limit})"
        )
        return False
    if action == "stop":
        saved(run, number)
        lines = [f"{outcome.gate}: {complaint}" for outcome in failed for complaint in outcome.complaints]
        raise GateError(stage.name, number, lines)
    if failed:
        log.warn(f"stage {stage.name} goes on although {len(failed)} of its gates were not passed")
    return True


def _draw(run: Run, name: str, picture, number: int) -> None:
    if run.directory.write:
        from PIL import Image

        file = gate_picture(run.directory.path, name, number)
        try:
            file.parent.mkdir(exist_ok=True)
            Image.fromarray(picture).save(file)
        except OSError as error:  # the numbers stand in the decision
            log.warn(disk_told(error, file))
    if run.board:
        run.board.picture(f"gates/{name}", picture, number)


def snapshots_of(run: Run, index: int) -> Path:
    return snapshot_folder(run.directory.path, run.recipe.stages[index].name)


def snapshot(run: Run, step: Step) -> None:
    """Keeps the weights where an interval of the stage's average ends, and at its end."""
    stage = run.recipe.stages[step.stage]
    if not stage.average:
        return
    first, every = run.clock.stage_first_token[step.stage], stage.average.every_tokens
    before, after = step.tokens_before - first, step.tokens_after - first
    if before // every == after // every and step.tokens_after != run.clock.stage_first_token[step.stage + 1]:
        return
    if run.skipped_in_row:  # what is wrong may be the weights: no part of an average
        log.warn(f"no snapshot of step {step.number}: its update was skipped")
        return
    folder = snapshots_of(run, step.stage)
    with slow_phase(run, "save"):
        run.saver.wait()  # its thread talks on the group that is used here
        check_finite(run.optimizer, step.number)
        tensors, keep = tensors_of(run.optimizer.parameters, None), lambda: prune(folder, stage.average.last, None)
        try:
            saver, state = run.saver, state_of(run, step.number)
            save(folder, tensors, state, run.facts, saver.group, saver.how, keep, saver.fence)
        except SaveError as error:  # one snapshot less in the average
            run.directory.event("save_failed", step.number, step.tokens_after, error=str(error))
            log.warn(str(error))


def average_stage(run: Run, index: int, number: int) -> None:
    """At a stage's end: the average of its snapshots beside the last weights, both validated, the better one marked. Training goes
    on from the last."""
    stage = run.recipe.stages[index]
    if not stage.average or any(d["kind"] == "average" and d["step"] == number for d in run.decisions):
        return
    folder = snapshots_of(run, index)
    steps = [step for step in list_steps(folder) if step <= number][-stage.average.last :]
    if not steps:
        log.warn(f"{folder}: holds no snapshot of stage {stage.name}; nothing is averaged")
        return
    parameters = run.optimizer.parameters
    tensors = tensors_of(parameters, None)
    last = {name: p._local_tensor.detach().clone() for name, p in parameters.items()}
    losses = {"last": _losses(run, index)}
    with slow_phase(run, "save"):
        run.saver.wait()  # its thread talks on the group that is used here
        weights = average_weights(stage.average.decay, len(steps))
        averaged(tensors["model"], [folder / directory_name(step) for step in steps], weights)
        check_finite(run.optimizer, number)
        output = run.directory.path / AVERAGES
        facts = run.facts | {"average_of": steps, "weights": weights}
        save(output, tensors, state_of(run, number), facts, run.saver.group, run.saver.how, fence=run.saver.fence)
    losses["average"] = _losses(run, index)
    for name, parameter in parameters.items():
        parameter._local_tensor.detach().copy_(last[name])
    means = {which: sum(values.values()) / max(1, len(values)) for which, values in losses.items()}
    known = {which: mean for which, mean in means.items() if math.isfinite(mean)}
    better = min(known, key=known.get) if known and any(losses.values()) else "unknown"
    run.decide(
        {"kind": "average", "stage": stage.name, "step": number, "steps": steps, "losses": losses, "better": better},
        number,
    )
    log.info(f"average of steps {steps}: mean loss {means['average']:.4f}, last {means['last']:.4f}; better: {better}")


def _losses(run: Run, index: int) -> dict[str, float]:
    stage = run.recipe.stages[index]
    if not run.recipe.validation:
        return {}
    found = measure(run, ValidationSets(run.recipe, stage.seq_len, run.domains), stage)
    return {name: round(loss.mean, 4) for name, loss in found.items()}
