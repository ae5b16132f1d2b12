"""[profile]: traces of some steps."""

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from megacpt.config.base import NotNegativeInt, PositiveInt, Section
from megacpt.errors import Problem

if TYPE_CHECKING:
    from megacpt.config.recipe import Recipe


class Profile(Section, heading="[profile]", resume="free"):
    """Traces of some steps, in `profile/` of the run directory."""

    steps: Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)] | None = None
    """First and last step of a Kineto trace. By default no step is traced."""
    ranks: list[NotNegativeInt] = [0]
    """Ranks that record a trace."""
    memory: bool = False
    """Record a CUDA memory snapshot over the traced steps as well."""


def problems(recipe: "Recipe", world_size: int) -> list[Problem]:
    steps = recipe.profile.steps
    if steps and steps[0] > steps[1]:
        return [Problem("profile.steps", list(steps), "the first is after the last.", "Exchange them.")]
    return []
