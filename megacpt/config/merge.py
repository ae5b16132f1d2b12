"""A stage's own keys over those of the section that they stand for. Nothing else merges them (resolve.py)."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from megacpt.config.recipe import Recipe
    from megacpt.config.sections.objective import Objective
    from megacpt.config.sections.optimizer import LearningRate
    from megacpt.config.sections.parallel import Parallel
    from megacpt.config.sections.stage import Stage

Reduction = Literal["step", "micro_batch"]


@dataclass(frozen=True)
class Schedule:
    """A learning rate, over the length of the run or of its stage."""

    lr: "LearningRate"
    over_run: bool


def parallel_in(recipe: "Recipe", stage: "Stage") -> "Parallel":
    """[parallel] with the stage's own keys over it, and one row a micro-batch where neither says how many tokens."""
    own = stage.parallel.model_dump(exclude_none=True)
    merged = type(recipe.parallel).model_validate({**recipe.parallel.model_dump(), **own})
    return merged if merged.micro_batch_tokens else merged.model_copy(update={"micro_batch_tokens": stage.seq_len})


def schedule_in(recipe: "Recipe", stage: "Stage") -> Schedule:
    """The run's learning rate, or the stage's own."""
    lr = recipe.optimizer.lr or stage.lr
    assert lr is not None, "a recipe has one schedule, or one a stage"
    return Schedule(lr, recipe.optimizer.lr is not None)


def objective_in(recipe: "Recipe", stage: "Stage") -> "Objective":
    """What a stage minimises: its own objective, or the run's."""
    return stage.objective or recipe.objective


def layout_keys(parallel: "Parallel") -> "Parallel":
    """Without what may change while a model stays built as it is."""
    return parallel.model_copy(update={"micro_batch_tokens": None, "activation_checkpointing": "none"})


def layouts_of(recipe: "Recipe") -> "dict[str, Parallel]":
    """The different layouts of the stages in order, by the key that names each."""
    found: dict[str, Parallel] = {}
    for stage in recipe.stages:
        layout = layout_keys(parallel_in(recipe, stage))
        if layout not in found.values():
            own = layout != layout_keys(recipe.parallel)
            found[f"stages.{stage.name}.parallel" if own else "parallel"] = layout
    return found


def reduction_under(recipe: "Recipe", parallel: "Parallel") -> Reduction:
    """When gradients are reduced under a layout. auto: once a step under pipeline, where weights stay gathered."""
    if recipe.precision.reduce != "auto":
        return recipe.precision.reduce
    return "step" if parallel.pipeline > 1 else "micro_batch"
