"""What several verbs share: the recipe with its overrides, and --dtype."""

import os
import sys
import time
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from megacpt.errors import ConfigError

if TYPE_CHECKING:
    from megacpt.config.recipe import Recipe

OVERRIDES = "Any key of the recipe can be set with --section.key=value, a stage's with --stages.NAME.key=value."


def add_recipe(parser: ArgumentParser, text: str | None = None) -> None:
    """The recipe; its keys may then follow as arguments, which `load` reads."""
    parser.add_argument("recipe", help=text)
    parser.set_defaults(takes_overrides=True)
    parser.description = f"{parser.description} {OVERRIDES}"


def add_dtype(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float32", "float64"],
        help="type of the computation (default: bfloat16 on a GPU, float32 on a CPU)",
    )


def add_stored_dtype(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32", "float64"],
        help="type of all tensors in the output (default: what each had when it was imported)",
    )


def load(options: Namespace) -> "Recipe":
    """The recipe of a verb, with its overrides.

    Raises:
        ConfigError: with all problems.
    """
    from megacpt.config.load import load_recipe

    return load_recipe(options.recipe, options.overrides)


def require_no_problems(recipe: "Recipe", path: str, world_size: int) -> None:
    """Checks a recipe before it is used; rank 0 prints the warnings.

    Args:
        path: of the recipe's file, for the error.
    Raises:
        ConfigError: with all problems.
    """
    from megacpt.log import is_rank0, warn
    from megacpt.plan.check import check

    report = check(recipe, world_size)
    if report.problems and not is_rank0():  # every rank finds the same; rank 0 says it
        time.sleep(10)  # torchrun ends all when the first leaves, and rank 0 may not have said it yet
        sys.exit(ConfigError.exit_code)
    if report.problems:
        raise ConfigError(report.problems, f"{path} (world size {world_size})")
    for warning in report.warnings:
        warn(str(warning))


def launched_size() -> int:
    """Ranks of this launch; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))
