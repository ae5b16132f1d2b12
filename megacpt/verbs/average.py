"""Write the mean of some checkpoints as a Hugging Face directory."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from megacpt.errors import ConfigError
from megacpt.verbs.common import add_stored_dtype


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN_DIR")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--steps", metavar="A,B,C", help="these checkpoints")
    which.add_argument("--last", type=int, metavar="K", help="the K newest")
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument(
        "--decay",
        choices=["mean", "linear", "cosine", "1-sqrt"],
        default="mean",
        help="equal weights, or those that stand for a decay of the learning rate over the checkpoints (default: mean)",
    )
    add_stored_dtype(parser)


def run(options: Namespace) -> None:
    from megacpt.checkpoint.export import export_average

    try:
        steps = None if options.steps is None else [int(step) for step in options.steps.split(",")]
    except ValueError:
        raise ConfigError(
            [f"--steps {options.steps}: write step numbers, for example 100,200,300."], "the arguments"
        ) from None
    taken = export_average(
        Path(options.run),
        Path(options.output),
        steps=steps,
        last=options.last,
        decay=options.decay,
        dtype=options.dtype,
    )
    print(f"{options.output}: the average ({options.decay}) of steps {', '.join(map(str, taken))} of {options.run}")
