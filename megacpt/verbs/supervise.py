"""Run a training command again and again until its run is finished: megacpt supervise -- bash launch/torchrun.sh RECIPE"""

import argparse
from argparse import ArgumentParser, Namespace

from megacpt.errors import ConfigError


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--max-restarts", type=int, default=10, metavar="N", help="attempts in a row without a new checkpoint")
    add("--backoff", type=float, default=5.0, metavar="SECONDS", help="pause before the first of them")
    add("--min-nodes", type=int, default=1, metavar="N", help="on Slurm: go on with as few as this")
    add("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")


def run(options: Namespace) -> int:
    from megacpt.survive.supervise import Options, supervise

    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if options.max_restarts < 0 or not 0 <= options.backoff <= 86400 or options.min_nodes < 1:
        raise ConfigError(
            ["--max-restarts: not negative; --backoff: from 0 to 86400 seconds; --min-nodes: at least 1."],
            "the arguments",
        )
    return supervise(command, Options(options.max_restarts, options.backoff, options.min_nodes))
