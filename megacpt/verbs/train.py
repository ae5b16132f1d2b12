"""Train; resumes by itself when the run directory holds a checkpoint."""

import signal
from argparse import ArgumentParser, Namespace
from pathlib import Path

from megacpt.errors import UNFINISHED, ConfigError
from megacpt.log import info
from megacpt.verbs.common import add_dtype, add_recipe, launched_size, load, require_no_problems


def add_arguments(parser: ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument(
        "--require",
        choices=["finished"],
        help="leave with 3 where a run that is stopped before its end leaves with 0: what comes next needs the end",
    )
    add_dtype(parser)


def run(options: Namespace) -> int:
    from megacpt.survive.watchdog import tell_supervisor

    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the terminal is closed, and the run goes on
    if options.dtype:
        options.overrides.append(f"--precision.compute={options.dtype}")
    recipe = load(options)
    try:
        require_no_problems(recipe, options.recipe, launched_size())
    except ConfigError as error:
        tell_supervisor(Path(recipe.directory), error)
        raise
    from megacpt.train.loop import train  # torch comes in here: what is wrong with the recipe was said before

    status = train(recipe)
    if status == "finished":
        info(
            f"finished: {recipe.directory}. Export: megacpt export {recipe.directory} --output {recipe.directory}/export"
        )
        return 0
    info(f"{status}: {recipe.directory} is saved and not finished. The same command goes on from there.")
    return UNFINISHED if options.require else 0
