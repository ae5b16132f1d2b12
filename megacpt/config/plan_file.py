"""plan.json of a run directory: the RunPlan as it was resolved, with what it was resolved from. Imports no torch."""

from pathlib import Path
from typing import Any

from megacpt.config.load import load_recipe, recipe_from
from megacpt.config.model import load_base_config
from megacpt.config.recipe import Recipe
from megacpt.config.resolve import RunPlan, parallel_in, resolve
from megacpt.config.run_layout import HUGGING_FACE, PLAN, RECIPE, STATUS
from megacpt.errors import CheckpointError
from megacpt.family.base import ModelConfig
from megacpt.family.read import parse_config, read_config
from megacpt.files import JsonError, read_object, sealed, unsealed, write_atomically

FORMAT = 1
MOST_BYTES = 1 << 28
"""Of plan.json: it names every frozen parameter of every stage."""


def save_plan(plan: RunPlan, run_directory: Path) -> None:
    """Writes plan.json, where it says something new."""
    path = run_directory / PLAN
    text = sealed({"format": FORMAT, "digest": plan.digest, **plan.plain})
    if not path.is_file() or path.read_bytes() != text.encode():  # a resume needs no room for it
        write_atomically(path, text)


def read_plan(run_directory: Path) -> dict[str, Any] | None:
    """plan.json as it stands; None for a run of a version that wrote none.

    Raises:
        CheckpointError: if it is damaged, or of a version that is not known here.
    """
    path = run_directory / PLAN
    try:
        content = unsealed(read_object(path, MOST_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is damaged ({error}). Remove it: the next start writes it anew.") from None
    if content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {content.get('format')!r}; this version reads {FORMAT}.")
    return content


def base_of(recipe: Recipe) -> ModelConfig:
    """The base model's config.json, as a recipe names it; once its run has begun the run's own copy does too, should the base be gone.

    Raises:
        ConfigError: if there is neither, or the model is not trained here.
    """
    given, copy = recipe.model.pretrained or recipe.model.config, Path(recipe.directory) / HUGGING_FACE / "config.json"
    if given and not Path(given).exists() and copy.is_file():
        return read_config(copy)
    return load_base_config(recipe.model)


def load_plan(run_directory: Path) -> RunPlan:
    """The plan of a run, of this version or an earlier one.

    Raises:
        CheckpointError: if plan.json is damaged. ConfigError: if there is no recipe, or no model.
    """
    content = read_plan(run_directory)
    if content is None:  # of an earlier version
        recipe = load_recipe(str(run_directory / RECIPE))
        return resolve(recipe, read_config(run_directory / HUGGING_FACE), _world_size(run_directory, recipe))
    try:
        recipe, base = (
            recipe_from(content["recipe"], str(run_directory / PLAN)),
            parse_config(content["config"], str(run_directory / PLAN)),
        )
        return resolve(recipe, base, content["world_size"], content["files"], content["weights"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{run_directory / PLAN}: lacks {error}.") from None


def _world_size(run_directory: Path, recipe: Recipe) -> int:
    """What run.json says; the product of the first stage's degrees where it says nothing."""
    try:
        size = read_object(run_directory / STATUS).get("world_size")
        if isinstance(size, int) and size > 0:
            return size
    except (OSError, JsonError):
        pass
    parallel = parallel_in(recipe, recipe.stages[0])
    return parallel.tensor * parallel.context * parallel.pipeline * parallel.data_replicate * (parallel.data_shard or 1)
