"""Anneal from a checkpoint with and without candidate data, and compare."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from megacpt.errors import ConfigError
from megacpt.verbs.common import add_recipe, load


def add_arguments(parser: ArgumentParser) -> None:
    add_recipe(parser, "model.pretrained is the checkpoint's export, the last stage's mixture the default mix")
    add = parser.add_argument
    add("--candidates", required=True, metavar="A,B", help="domains of [data] that are not in the default mix")
    add("--tokens", required=True, help="length of each annealing, for example 40B")
    add("--directory", required=True, metavar="DIR", help="recipes and runs go there; a second call goes on")
    add("--share", type=float, default=0.3, help="of the candidate (default: 0.3)")
    add("--launch", metavar="COMMAND", help='what starts megacpt, for example "torchrun --nproc-per-node 8 -m megacpt"')


def run(options: Namespace) -> None:
    from megacpt.config.quantity import parse_tokens
    from megacpt.plan.assess import assess, table

    recipe = load(options)
    try:
        tokens = parse_tokens(options.tokens)
    except ValueError as error:
        raise ConfigError([f"--tokens {options.tokens}: {error}."], "the arguments") from None
    if not 0 < options.share < 1:
        raise ConfigError([f"--share {options.share}: between 0 and 1."], "the arguments")
    candidates = [name for name in options.candidates.split(",") if name]
    print("\n".join(table(assess(recipe, candidates, options.share, tokens, Path(options.directory), options.launch))))
