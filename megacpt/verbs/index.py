"""Build the packing indices of a recipe before the GPUs start."""

import os
from argparse import ArgumentParser, Namespace

from megacpt.verbs.common import add_recipe, load


def add_arguments(parser: ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--workers", type=int, default=0, help="processes (default: one a core)")


def run(options: Namespace) -> None:
    from megacpt.data.indices import build_indices

    for built in build_indices(load(options), options.workers or os.cpu_count() or 1):
        print(
            f"{built.domain} seq_len {built.seq_len}{' held out' if built.holdout else ''}: {built.num_rows:,} rows, "
            f"{built.num_pieces:,} documents or parts of documents"
        )
