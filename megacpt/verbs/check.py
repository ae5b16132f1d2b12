"""Validate a recipe and print the resolved run."""

import json
import math
import os
from argparse import ArgumentParser, Namespace

from megacpt.config.merge import layouts_of
from megacpt.errors import ConfigError, Problem
from megacpt.files import write_atomically
from megacpt.verbs.common import add_recipe, load

MOST_RANKS = 10_000_000


def add_arguments(parser: ArgumentParser) -> None:
    add_recipe(parser)
    add = parser.add_argument
    add("--world-size", type=int, help="processes (default: the product of the recipe's degrees)")
    add("--no-files", action="store_true", help="do not read model files and data")
    add(
        "--device-memory",
        type=float,
        default=79.1,
        metavar="GIB",
        help="of one card, which every stage must fit (default: 79.1, an 80 GB card; an H200 has 139.8)",
    )
    add("--json", action="store_true", help="print problems, warnings and facts as one JSON object instead of text")
    add("--timeline", action="store_true", help="print what happens after which step")
    add("--schedule-picture", metavar="FILE.svg", help="draw the pipeline's timeline of the largest step")


def _argument_problems(options: Namespace) -> list[Problem]:
    found: list[Problem] = []
    if not 0 < options.device_memory < math.inf:
        text = "is no memory that a card could have."
        found.append(Problem("--device-memory", options.device_memory, text, "Give a number of GiB, for example 79.1."))
    if options.world_size is not None and not 1 <= options.world_size <= MOST_RANKS:
        text = "is no number of processes."
        found.append(Problem("--world-size", options.world_size, text, f"Give one from 1 to {MOST_RANKS}."))
    return found


def run(options: Namespace) -> int:
    from megacpt.config.layout import least_world_size
    from megacpt.plan.check import check, schedule_svg
    from megacpt.plan.describe import describe

    if wrong := _argument_problems(options):
        raise ConfigError(wrong, "the arguments")
    recipe = load(options)
    launched = int(os.environ.get("WORLD_SIZE", "0"))
    world_size = options.world_size or launched or least_world_size(layouts_of(recipe).values())
    report = check(recipe, world_size, not options.no_files, options.device_memory)
    if options.json:
        print(json.dumps(report.as_json(), indent=1))
        return ConfigError.exit_code if report.problems else 0
    if report.problems:
        raise ConfigError(report.problems, f"{options.recipe} (world size {world_size})")
    assert report.facts is not None, "there are no problems"
    print("\n".join([*describe(report.facts), *(f"warning: {warning}" for warning in report.warnings)]))
    if options.timeline:
        from megacpt.config.clock import Clock
        from megacpt.config.timeline import folded, timeline

        print("\n".join(folded(timeline(recipe, Clock(recipe)), recipe)))
    if options.schedule_picture:
        write_atomically(options.schedule_picture, schedule_svg(recipe, world_size, files=not options.no_files))
        print(f"written {options.schedule_picture}")
    return 0
