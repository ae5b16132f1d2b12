"""Versions, devices, backends, NCCL, disk; under torchrun, the speed of every parallel axis."""

from argparse import ArgumentParser, Namespace

from megacpt.log import is_rank0
from megacpt.verbs.common import launched_size

AXES = ("tensor", "context", "pipeline", "data_replicate")


def add_arguments(parser: ArgumentParser) -> None:
    for axis in AXES:
        flag = f"--{axis.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=1, metavar="N", help="degree of the layout whose axes are timed")
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="ranks of the run that is meant (default: those that are here)"
    )


def run(options: Namespace) -> None:
    from megacpt.doctor import axes, report

    size = launched_size()
    if is_rank0():
        print("\n".join(report(options.world_size or size)))
    if size > 1:
        from megacpt.config.sections.parallel import Parallel

        lines = axes(Parallel(**{axis: getattr(options, axis) for axis in AXES}))
        if is_rank0():
            print("\n".join(lines))
