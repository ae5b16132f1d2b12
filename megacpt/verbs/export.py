"""Write a checkpoint as a complete Hugging Face directory."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from megacpt.verbs.common import add_stored_dtype


def add_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("run", metavar="RUN_DIR")
    add("--output", required=True, metavar="DIR")
    add("--step", type=int, help="default: the newest sound checkpoint")
    add_stored_dtype(parser)
    add("--average", action="store_true", help="the average that a stage made, in place of a checkpoint")


def run(options: Namespace) -> None:
    from megacpt.checkpoint.export import export

    step = export(Path(options.run), Path(options.output), options.step, options.dtype, options.average)
    print(f"{options.output}: the model of {options.run} at step {step}")
