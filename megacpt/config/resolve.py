"""A recipe, its base model's config.json and a number of ranks, resolved once. The only place where a stage, the section it stands in and
the checkpoint's own values are merged: whatever runs, checks, evaluates or exports reads a RunPlan. Pure; imports no torch.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from megacpt.config.layout import Layout, resolve_layout
from megacpt.config.load import plain
from megacpt.config.merge import (
    Reduction,
    Schedule,
    layout_keys,
    layouts_of,
    objective_in,
    parallel_in,
    reduction_under,
    schedule_in,
)
from megacpt.config.model import config_in_stage, frozen_names, with_rope
from megacpt.config.recipe import Recipe
from megacpt.config.sections.objective import Objective
from megacpt.config.sections.parallel import Parallel
from megacpt.config.sections.stage import Stage
from megacpt.config.trainable import Trainable, trainable_in
from megacpt.errors import ConfigError, Problem
from megacpt.family.base import ModelConfig


@dataclass(frozen=True)
class ResolvedStage:
    """A stage with all that is in force while it runs.

    Attributes:
        recipe: as the recipe has it: its length, rows, batches, mixture, gates, average.
        parallel: [parallel] with the stage's own keys over it; `micro_batch_tokens` is a number.
        reduction: when gradients are reduced.
        model: the model with the rotary embedding of this stage; changes hold on through later stages.
        schedule: of the learning rate. objective: what is minimised.
        frozen: names of the parameters that are not trained; trainable: of those that are, and of those that have been.
        longest: tokens of the longest rows trained up to and in this stage.
    """

    index: int
    recipe: Stage
    parallel: Parallel
    reduction: Reduction
    model: ModelConfig
    schedule: Schedule
    objective: Objective
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    clip_norm: float | None
    frozen: tuple[str, ...]
    trainable: Trainable
    longest: int

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def seq_len(self) -> int:
        return self.recipe.seq_len

    @property
    def micro_batch_tokens(self) -> int:
        return self.parallel.tokens_at_once

    @property
    def micro_batch_rows(self) -> int:
        return self.micro_batch_tokens // self.seq_len

    @property
    def build(self) -> Parallel:
        """What a model is built for: the same for two stages that need no other model between them."""
        return layout_keys(self.parallel)

    def layout(self, world_size: int) -> Layout:
        """Degrees of the axes.

        Raises:
            ValueError: with the arithmetic, if they do not multiply to the world size.
        """
        return resolve_layout(self.parallel, world_size)


@dataclass(frozen=True)
class RunPlan:
    """A run, resolved.

    Attributes:
        model: the base model with [model]'s own change of the rotary embedding.
        base: the base model as its config.json says it.
        world_size: ranks.
        files: SHA-256 of the base's small files by name; weights: of its weight files. Filled where a run begins.
    """

    recipe: Recipe
    base: ModelConfig
    model: ModelConfig
    stages: tuple[ResolvedStage, ...]
    world_size: int
    files: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)

    def stage(self, name: str) -> ResolvedStage:
        return next(stage for stage in self.stages if stage.name == name)

    @cached_property
    def layouts(self) -> dict[str, Parallel]:
        """The different layouts in order, by the key of the recipe that names each."""
        return layouts_of(self.recipe)

    @cached_property
    def plain(self) -> dict[str, Any]:
        """As plan.json holds it: what it was resolved from, and, to be read, what came of it."""
        return {
            "world_size": self.world_size,
            "config": self.base.raw,
            "files": dict(sorted(self.files.items())),
            "weights": dict(sorted(self.weights.items())),
            "recipe": plain(self.recipe),
            "stages": [_plain_stage(stage, self.world_size) for stage in self.stages],
        }

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all of it."""
        return hashlib.sha256(json.dumps(self.plain, sort_keys=True).encode()).hexdigest()


def resolve(
    recipe: Recipe,
    base: ModelConfig,
    world_size: int,
    files: Mapping[str, str] | None = None,
    weights: Mapping[str, str] | None = None,
) -> RunPlan:
    """The plan of a run.

    Args:
        base: the base model's config.json, read.
    Raises:
        ConfigError: for rotary embeddings, windows and patterns of parameters that the model does not have, all at once.
    """
    problems: list[Problem] = []
    model = with_rope(base, recipe.model.rope)
    configs, frozen = [], []
    for index, stage in enumerate(recipe.stages):
        where = f"stages.{stage.name}"
        configs.append(_collect(problems, where, config_in_stage, model, recipe.stages, index))
        frozen.append(_collect(problems, where, frozen_names, stage.freeze, model))
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)), "the recipe")
    stages = [_resolve_stage(recipe, i, config, frozen) for i, config in enumerate(configs)]
    return RunPlan(recipe, base, model, tuple(stages), world_size, files or {}, weights or {})


def _collect(problems: list[Problem], where: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns; if it raises a ConfigError, its problems join the others, with their place."""
    try:
        return function(*arguments)
    except ConfigError as error:
        problems.extend(problem.inside(where) for problem in error.problems)
        return None


def _resolve_stage(recipe: Recipe, index: int, model: ModelConfig, frozen: Sequence[Sequence[str]]) -> ResolvedStage:
    stage, optimizer = recipe.stages[index], recipe.optimizer
    parallel = parallel_in(recipe, stage)
    return ResolvedStage(
        index,
        stage,
        parallel,
        reduction_under(recipe, parallel),
        model,
        schedule_in(recipe, stage),
        objective_in(recipe, stage),
        optimizer.betas if stage.betas is None else stage.betas,
        optimizer.eps,
        optimizer.weight_decay if stage.weight_decay is None else stage.weight_decay,
        optimizer.clip_norm if stage.clip_norm is None else stage.clip_norm,
        tuple(frozen[index]),
        trainable_in(model, frozen, index),
        max(each.seq_len for each in recipe.stages[: index + 1]),
    )


def _plain_stage(stage: ResolvedStage, world_size: int) -> dict[str, Any]:
    """What is in force in a stage, for people and for comparison."""
    rope = stage.model.rope
    return {
        "name": stage.name,
        "layout": str(stage.layout(world_size)),
        "parallel": {key: value for key, value in stage.parallel.model_dump().items() if value is not None},
        "reduction": stage.reduction,
        "rope": {"theta": rope.theta, "type": rope.type, **rope.fields},
        "lr": {key: value for key, value in stage.schedule.lr.model_dump().items() if value is not None},
        "lr_over": "run" if stage.schedule.over_run else "stage",
        "objective": stage.objective.model_dump(),
        "betas": list(stage.betas),
        "eps": stage.eps,
        "weight_decay": stage.weight_decay,
        "clip_norm": stage.clip_norm,
        "frozen": list(stage.frozen),
        "longest_row": stage.longest,
    }
