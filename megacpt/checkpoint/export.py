"""A checkpoint of any layout to a Hugging Face directory, in one process, a shard of the output at a time."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from megacpt.checkpoint.average import average_weights
from megacpt.checkpoint.load import StoredModel
from megacpt.checkpoint.manifest import directory_name, latest_intact_checkpoint, list_steps, read_manifest
from megacpt.config.plan_file import load_plan
from megacpt.config.resolve import RunPlan
from megacpt.config.run_layout import AVERAGES, CHECKPOINTS, DTYPES, HUGGING_FACE
from megacpt.data.tokenizer import VOCABULARIES, Tokenizer
from megacpt.errors import CheckpointError, ConfigError
from megacpt.files import JsonError, read_object
from megacpt.model.hf import DTYPES as TYPES
from megacpt.model.hf import write_pretrained


def find_checkpoint(run_directory: Path, step: int | None, folder: str = CHECKPOINTS) -> tuple[Path, int]:
    """(folder, step) of a sound checkpoint: the newest, or the one that was asked for."""
    checkpoints = run_directory / folder
    if step is not None:
        if step not in list_steps(checkpoints):
            have = ", ".join(map(str, list_steps(checkpoints))) or "none"
            raise ConfigError([f"{checkpoints}: no checkpoint of step {step}. There are: {have}."], "the arguments")
        directory = checkpoints / directory_name(step)
        read_manifest(directory)
        return directory, step
    found = latest_intact_checkpoint(checkpoints)
    if found is None:
        raise ConfigError([f"{checkpoints}: no checkpoint there."], "the arguments")
    return found.directory, found.state.step


def export(
    run_directory: Path, output: Path, step: int | None = None, dtype: str | None = None, average: bool = False
) -> int:
    """Writes the weights of a checkpoint as a complete Hugging Face directory. Returns the step.

    Args:
        dtype: of all tensors; default is what each had when it was imported.
        average: of the averages that stages made, the newest or that of `step`, in place of the checkpoints.
    """
    directory, step = find_checkpoint(run_directory, step, AVERAGES if average else CHECKPOINTS)
    _write(run_directory, [directory], [1.0], output, dtype)
    return step


def export_average(
    run_directory: Path, output: Path, steps: list[int] | None, last: int | None, decay: str, dtype: str | None = None
) -> list[int]:
    """Writes the weighted mean of some checkpoints as a Hugging Face directory. Returns their steps.

    Args:
        steps: those, or None for the `last` newest.
        decay: "mean", or the decay of the learning rate that the weights stand for (`checkpoint/average.py`).
    """
    have = list_steps(run_directory / CHECKPOINTS)
    asked, problems = (len(steps), []) if steps is not None else (last or 0, [])
    if asked < 2:
        problems.append(f"{asked} checkpoints: an average needs at least two.")
    if repeated := sorted(step for step, count in Counter(steps or ()).items() if count > 1):
        problems.append(f"step {', '.join(map(str, repeated))}: is given more than once. Give each step once.")
    if missing := sorted(set(steps or ()) - set(have)):
        problems.append(f"step {', '.join(map(str, missing))}: there is no such checkpoint.")
    if steps is None and asked > len(have):
        problems.append(f"the last {asked} checkpoints: there are only {len(have)}.")
    if problems:
        there = ", ".join(map(str, have)) or "none"
        raise ConfigError([*problems, f"{run_directory / CHECKPOINTS} holds the steps: {there}."], "the arguments")
    wanted = sorted(steps) if steps is not None else have[-asked:]
    directories = [find_checkpoint(run_directory, step)[0] for step in wanted]
    _write(run_directory, directories, average_weights(decay, len(wanted)), output, dtype)
    return wanted


def _write(run_directory: Path, directories: list[Path], weights: list[float], output: Path, dtype: str | None) -> None:
    plan = load_plan(run_directory)
    stage, side = plan.stage(read_manifest(directories[-1]).state.stage), run_directory / HUGGING_FACE
    config = stage.model
    stored = [StoredModel(each) for each in directories]
    shapes = config.shapes()
    dtypes = dict.fromkeys(shapes, dtype) if dtype else _stored_dtypes(side / DTYPES, shapes)

    def read(name: str) -> Tensor:
        part = stored[0].read(name)[: shapes[name][0]]
        if len(stored) == 1:
            return part
        total = part.double() * weights[0]
        for model, weight in zip(stored[1:], weights[1:], strict=True):
            part = model.read(name)[: shapes[name][0]]
            total.add_(part.double(), alpha=weight)
        return total.to(part.dtype)

    write_pretrained(output, config, side, read, dtypes, stage.longest, tokens=_tokens_of(plan, side))


def _stored_dtypes(path: Path, names: Iterable[str]) -> dict[str, str]:
    """The type that each tensor had when it was imported.

    Raises:
        CheckpointError: if the file does not say it.
    """
    try:
        found = read_object(path)
    except (OSError, JsonError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}. Give --dtype.") from None
    if wrong := [name for name in names if found.get(name) not in list(TYPES)]:
        raise CheckpointError(f"{path}: says {found.get(wrong[0])!r} for {wrong[0]}, which is no type. Give --dtype.")
    return {name: found[name] for name in names}


def _tokens_of(plan: RunPlan, side: Path) -> dict[str, int]:
    """EOS and BOS of a tokenizer that was given beside the model; nothing for the model's own, whose configuration knows better."""
    has_one = any((side / name).is_file() for name in VOCABULARIES)
    if not has_one or not plan.recipe.model.tokenizer:
        return {}
    tokenizer = Tokenizer(side)
    ids = {"eos_token_id": tokenizer.eos_id, "bos_token_id": tokenizer.bos_id}
    return {key: i for key, i in ids.items() if i is not None}
