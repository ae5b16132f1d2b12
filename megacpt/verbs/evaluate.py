"""Validation loss by domain, needle, multiple choice of a model or run."""

import json
from argparse import ArgumentParser, Namespace

from megacpt.errors import ConfigError
from megacpt.files import write_atomically
from megacpt.log import is_rank0
from megacpt.verbs.common import add_dtype, add_recipe, load


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL_DIR|RUN_DIR")
    add_recipe(parser)
    parser.add_argument("--step", type=int, help="checkpoint of a run (default: the newest)")
    parser.add_argument("--output", metavar="FILE.json")
    add_dtype(parser)


def run(options: Namespace) -> None:
    recipe = load(options)
    if not recipe.validation and not recipe.gates:
        raise ConfigError([f"{options.recipe}: has no [[validation]] and no [gates]."], "the arguments")
    from megacpt.survive.run_directory import plain_numbers
    from megacpt.train.standalone import evaluate

    results = evaluate(options.model, recipe, options.dtype, options.step)
    if not is_rank0():
        return
    for name, result in results.items():
        if name != "gates":
            print(f"{name}: loss {result['loss']:.4f}, perplexity {result['perplexity']:.2f}")
    for gate, numbers in results.get("gates", {}).items():
        print(f"gate {gate}: {json.dumps(numbers)}")
    if options.output:
        write_atomically(options.output, json.dumps(plain_numbers(results), indent=1) + "\n")
