"""The command line: the table of verbs, exit codes, and how an error is told. What a verb does stands in verbs/NAME.py."""

import argparse
import errno
import os
import signal
import sys
from collections.abc import Sequence

from megacpt import __version__, verbs
from megacpt.errors import ConfigError, MegacptError, SaveError
from megacpt.files import DISK_ERRORS, FORBIDDEN, PATH_ERRORS, describe_os_error
from megacpt.log import printable, say
from megacpt.verbs import (
    assess,
    average,
    check,
    checkpoint,
    doctor,
    evaluate,
    export,
    index,
    inspect,
    prepare,
    score,
    supervise,
    topics,
    train,
    vocab,
)

VERBS = (
    (prepare, topics, vocab)  # data
    + (check, index, inspect, train, supervise, checkpoint, assess, doctor)  # what a recipe describes
    + (score, evaluate, export, average)  # what comes of it
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a verb and leaves with its exit code: 0 done, 2 arguments or recipe, 3 stopped where the end was required, 75 may be tried
    again, 76 damaged data or checkpoint."""
    try:
        code = run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
        sys.exit(code)
    except MegacptError as error:
        say(f"megacpt: {printable(str(error))}")
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno == errno.EPIPE or (error.errno == errno.EIO and _terminal_is_gone()):
            os._exit(128 + signal.SIGPIPE)  # as of any program that such an end stops: its work may not be done
        if error.errno not in DISK_ERRORS | PATH_ERRORS:
            raise
        say(f"megacpt: {printable(describe_os_error(error))}")
        sys.exit(SaveError.exit_code if error.errno in DISK_ERRORS - FORBIDDEN else ConfigError.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _terminal_is_gone() -> bool:
    """Whether what cannot be written to is our terminal, and no disk."""
    try:
        os.write(1, b"\n")
    except OSError:
        return True
    return False


def run(arguments: Sequence[str]) -> int:
    """Runs a verb. Returns its exit code."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not options.takes_overrides:
        parser.error(f"unknown arguments for {options.verb}: {' '.join(rest)}")
    options.overrides = rest
    return options.call(options) or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megacpt",
        description="Continual pre-training of Llama, Qwen2, Qwen3 and Mistral models: text in, Hugging Face checkpoint out.",
    )
    parser.add_argument("--version", action="version", version=f"megacpt {__version__}")
    table = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        name = verb.__name__.removeprefix(f"{verbs.__name__}.")
        one = table.add_parser(name, help=verb.__doc__, description=verb.__doc__, allow_abbrev=False)
        one.set_defaults(call=verb.run, takes_overrides=False)
        verb.add_arguments(one)
    return parser
