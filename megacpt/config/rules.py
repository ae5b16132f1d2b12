"""Rules across the keys of a recipe: what it alone can tell, without files. Each section has its own; rules that need the model's shape or
the data stand in plan/check.py."""

from megacpt.config.recipe import Recipe
from megacpt.config.sections import data, gates, mixture, model, optimizer, parallel, profile, run, stage, validation
from megacpt.errors import Problem


def problems_of(recipe: Recipe, world_size: int) -> list[Problem]:
    """All problems of the recipe for this many processes."""
    rooms = (run, model, parallel, optimizer, data, mixture, gates, validation, stage, profile)
    return [problem for room in rooms for problem in room.problems(recipe, world_size)]


def warnings_of(recipe: Recipe) -> list[Problem]:
    """What is legal and hardly meant."""
    return [problem for room in (gates, mixture, stage) for problem in room.warnings(recipe)]
