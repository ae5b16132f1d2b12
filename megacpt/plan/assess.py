"""Is a data set worth it? Annealing tells (Llama 3, arXiv 2407.21783, section 3.1.3): from a checkpoint the rate goes linearly to 0,
once on the default mix, once with 30 % of each candidate and 70 % of it; what that does to the validation losses is the verdict. Writes
the recipes, runs each as a process of its own (again where one was interrupted), reads their events. Imports no torch."""

import math
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from megacpt.config.load import save_recipe
from megacpt.config.merge import schedule_in
from megacpt.config.recipe import Recipe
from megacpt.config.run_layout import EVENTS, STATUS
from megacpt.config.sections.optimizer import LearningRate
from megacpt.errors import ConfigError, DataError
from megacpt.files import JsonError, read_object, read_records

CONTROL = "default"


@dataclass(frozen=True)
class Trial:
    """One annealing: losses by domain before and after."""

    name: str
    before: dict[str, float]
    after: dict[str, float]


def trials_of(recipe: Recipe, candidates: list[str], share: float, tokens: int, directory: Path) -> dict[str, Recipe]:
    """The recipes of the control and of each candidate, by name.

    Raises:
        ConfigError: for a candidate that is no domain or in the default mix already, a recipe without validation or weights to start from.
    """
    stage, problems = recipe.stages[-1], []
    total = sum(stage.mixture.values())
    for name in candidates:
        if name not in recipe.data:
            problems.append(f"--candidates {name}: no such domain in [data].")
        elif stage.mixture.get(name, 0) > 0:
            problems.append(
                f"--candidates {name}: is in the mixture of stage {stage.name} already, which is the default mix."
            )
    if not recipe.validation:
        problems.append("the recipe has no [[validation]]: nothing would be compared.")
    if not recipe.model.pretrained:
        problems.append("model.pretrained: give the export of the checkpoint that is annealed from.")
    if problems:
        raise ConfigError(problems, "the assessment")
    rate = schedule_in(recipe, stage).lr
    falling = LearningRate(shape="linear", peak=rate.peak, min=0.0)
    trials = {}
    for name in (CONTROL, *candidates):
        mixture = {
            domain: weight / total * (1 if name == CONTROL else 1 - share) for domain, weight in stage.mixture.items()
        }
        if name != CONTROL:
            mixture[name] = share
        one = stage.model_copy(
            update={"name": "anneal", "tokens": tokens, "lr": falling, "mixture": mixture, "gates": [], "average": None,
                    "batch_tokens": ((0, stage.batch_tokens[-1][1]),)}
        )  # fmt: skip
        run = recipe.run.model_copy(update={"name": name, "directory": str(directory / name), "start": "auto"})
        optimizer = recipe.optimizer.model_copy(update={"lr": None})
        trials[name] = recipe.model_copy(update={"run": run, "stages": [one], "optimizer": optimizer, "gates": {}})
    return trials


def assess(
    recipe: Recipe, candidates: list[str], share: float, tokens: int, directory: Path, launch: str | None
) -> list[Trial]:
    """Runs every trial that is not finished and returns what they found.

    Args:
        launch: what starts training, for example "torchrun --nproc-per-node 8 -m megacpt"; default this Python alone.
    """
    try:
        launcher = shlex.split(launch) if launch else [sys.executable, "-m", "megacpt"]
    except ValueError as error:
        raise ConfigError([f"--launch {launch}: {error}."], "the arguments") from None
    directory.mkdir(parents=True, exist_ok=True)
    found = []
    for name, trial in trials_of(recipe, candidates, share, tokens, directory).items():
        path = directory / f"{name}.toml"
        save_recipe(trial, path)
        if _status(directory / name) != "finished":
            command = [*launcher, "train", str(path)]
            try:
                done = subprocess.run(command)
            except OSError as error:
                raise ConfigError(
                    [f"--launch {launch}: cannot be started ({error.strerror})."], "the arguments"
                ) from None
            if done.returncode or _status(directory / name) != "finished":
                raise ConfigError(
                    [f"{' '.join(command)}: ended with {done.returncode}; its output stands above."], "the assessment"
                )
        found.append(_trial(name, directory / name))
    return found


def _trial(name: str, run: Path) -> Trial:
    """What a finished run measured first and last.

    Raises:
        DataError: if its events do not say.
    """
    losses = []
    for record in read_records(run / EVENTS):
        row = record.row or {}
        if row.get("kind") == "validation" and isinstance(row.get("losses"), dict):
            losses.append({domain: math.nan if loss is None else loss for domain, loss in row["losses"].items()})
    if not losses or not all(type(loss) in (int, float) for each in (losses[0], losses[-1]) for loss in each.values()):
        raise DataError(f"{run / EVENTS}: holds no losses. Remove {run} and start again: this trial is then run again.")
    return Trial(name, losses[0], losses[-1])


def _status(run: Path) -> str | None:
    try:
        return read_object(run / STATUS).get("status")
    except (OSError, JsonError):
        return None


def table(trials: list[Trial]) -> list[str]:
    """Lines: the losses by domain, each candidate's difference from the control, and a verdict."""
    control, *others = trials
    head = [
        "domain",
        "before",
        f"after {CONTROL}",
        *(f"after {t.name}" for t in others),
        *(f"{t.name} - {CONTROL}" for t in others),
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for domain in control.after:
        cells = [domain, f"{control.before[domain]:.4f}", f"{control.after[domain]:.4f}"]
        cells += [f"{t.after[domain]:.4f}" for t in others]
        cells += [f"{t.after[domain] - control.after[domain]:+.4f}" for t in others]
        lines.append("| " + " | ".join(cells) + " |")
    for trial in others:
        changes = {domain: loss - control.after[domain] for domain, loss in trial.after.items()}
        better = sum(change < 0 for change in changes.values())
        mean = sum(changes.values()) / len(changes)
        word = "helps" if mean < 0 else "does not help"
        lines.append(
            f"{trial.name}: better in {better} of {len(changes)} domains, mean difference {mean:+.4f}: {word} on these losses"
        )
    return lines
