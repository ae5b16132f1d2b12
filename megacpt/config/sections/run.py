"""[run]: what a run is called, where it writes, how it starts."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from megacpt.config.base import FilePath, Name, NotNegativeInt, OnResume, Section
from megacpt.errors import Problem

if TYPE_CHECKING:
    from megacpt.config.recipe import Recipe


class Run(Section, heading="[run]", resume="free"):
    """What the run is called, where it writes and how it starts."""

    name: Name
    """Name of the run, of letters, digits, dots, underscores and hyphens. It names the run directory, `runs/NAME`, unless
    `run.directory` is set."""
    directory: FilePath | None = None
    """Directory that receives everything the run writes, relative to the working directory. By default it is `runs/NAME`."""
    start: Literal["auto", "scratch", "pretrained", "resume"] = "auto"
    """How the run begins. `auto` resumes if the run directory holds an intact checkpoint and otherwise starts as `[model]` says;
    `scratch` and `pretrained` insist on a new run, `resume` on an old one."""
    seed: Annotated[int, OnResume("frozen")] = Field(1, ge=0, lt=2**32)
    """Seed of the data order and of the weights of a model trained from scratch. Change it to repeat a run with other data order."""
    stop_at_step: NotNegativeInt | None = None
    """Step after which the run saves a checkpoint and leaves, as after a stop request. 0 imports the model, saves it and leaves. By
    default the run goes on to its last step."""


def problems(recipe: "Recipe", world_size: int) -> list[Problem]:
    run, pretrained = recipe.run, recipe.model.pretrained
    if run.start == "pretrained" and not pretrained:
        return [
            Problem("run.start", run.start, "needs model.pretrained.", "Give the Hugging Face directory to start from.")
        ]
    if run.start == "scratch" and pretrained:
        return [Problem("run.start", run.start, f'model.pretrained = "{pretrained}" would be ignored.', "Remove one.")]
    return []
