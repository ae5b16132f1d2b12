"""Show the exact global batch of a step, with what the run has decided so far."""

import sys
from argparse import ArgumentParser, Namespace
from typing import TYPE_CHECKING

from megacpt.verbs.common import add_recipe, load, require_no_problems

if TYPE_CHECKING:
    from megacpt.data.loader import Batch


def add_arguments(parser: ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--step", type=int, required=True, help="step number, from 1")
    parser.add_argument(
        "--decode", action="store_true", help="print the text of every document in the batch, with weights"
    )
    parser.add_argument("--output", metavar="FILE.npz", help="write the arrays")


def run(options: Namespace) -> None:
    from megacpt.plan.inspect import documents_of, inspect_step, save_batch, show_document

    recipe = load(options)
    require_no_problems(recipe, options.recipe, 1)
    found = inspect_step(recipe, options.step)
    step, batch = found.step, found.batch
    counts = {name: batch.domain.count(name) for name in recipe.stages[step.stage].mixture}
    print(
        f"step {step.number}, stage {recipe.stages[step.stage].name}: {step.rows} rows of {step.seq_len}, tokens "
        f"{step.tokens_before:,} to {step.tokens_after:,}, {len(batch.document_starts)} documents, "
        f"{(batch.labels >= 0).sum():,} labels{_weighing(batch)}, rows by domain {counts}"
    )
    if options.decode:
        from megacpt.data.tokenizer import Tokenizer

        tokenizer = Tokenizer(recipe.model.tokenizer_path)
        for row, (pick, documents) in enumerate(zip(found.picks, documents_of(batch), strict=True)):
            print(f"--- row {row}: domain {pick.domain}, epoch {pick.epoch}, packed row {pick.row}")
            for document in documents:
                print(show_document(document, tokenizer.decode, sys.stdout.isatty()))
    if options.output:
        save_batch(batch, options.output)
        print(f"written {options.output}")


def _weighing(batch: "Batch") -> str:
    """What the labels weigh, if not all alike."""
    if batch.weights is None:
        return ""
    weights = batch.weights[batch.labels >= 0]
    return f" ({(weights > 0).sum():,} with a weight above 0, {weights.sum(dtype='float64'):.6g} in all)"
