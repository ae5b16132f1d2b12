"""List the checkpoints of a run, or verify every byte of them."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from megacpt.config.run_layout import CHECKPOINTS
from megacpt.errors import CheckpointError, ConfigError


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("action", choices=["list", "verify"])
    parser.add_argument("run", metavar="RUN_DIR")


def run(options: Namespace) -> int:
    from megacpt.checkpoint.manifest import directory_name, list_steps, verify

    checkpoints, code = Path(options.run) / CHECKPOINTS, 0
    steps = list_steps(checkpoints)
    if not steps:
        raise ConfigError([f"{checkpoints}: no checkpoint there."], "the arguments")
    for step in steps:
        directory = checkpoints / directory_name(step)
        line = str(directory)
        if options.action == "verify":
            try:
                line += f": sound, {verify(directory).tokens:,} tokens"
            except CheckpointError as error:
                code, line = error.exit_code, f"{line}: DAMAGED: {error}"
        print(line)
    return code
