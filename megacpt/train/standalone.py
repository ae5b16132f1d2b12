"""A model from a Hugging Face directory or a run, for the verbs that only run it: score and evaluate."""

import math
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megacpt.checkpoint.export import find_checkpoint
from megacpt.checkpoint.load import load
from megacpt.checkpoint.manifest import read_manifest
from megacpt.checkpoint.save import tensors_of
from megacpt.config.layout import resolve_layout
from megacpt.config.merge import parallel_in
from megacpt.config.model import shape_problems
from megacpt.config.plan_file import load_plan
from megacpt.config.recipe import Recipe
from megacpt.config.run_layout import HUGGING_FACE
from megacpt.config.sections.parallel import Parallel
from megacpt.data.loader import open_domains, pad_token
from megacpt.errors import ConfigError, Problem
from megacpt.evaluate.gates import GateRunner
from megacpt.evaluate.validation import ValidationSets, rows_at_once, validate
from megacpt.family.read import read_config
from megacpt.model.build import build_model, sharding_of
from megacpt.model.decoder import Decoder, ModelOptions
from megacpt.model.hf import load_pretrained
from megacpt.model.split import plan_pipeline
from megacpt.parallel.mesh import build_mesh, device_of_process, start_process_group
from megacpt.train.step import compute_dtype


def open_model(source: str, dtype: str | None, parallel: Parallel, step: int | None = None) -> Decoder:
    """The model of a Hugging Face directory, or of a checkpoint when `source` is a run directory, under any layout."""
    device = device_of_process()
    start_process_group(device)
    path, world_size = Path(source), dist.get_world_size()
    directory, vocab_multiple = None, 128
    if is_run(path):
        plan, (directory, _) = load_plan(path), find_checkpoint(path, step)
        config, vocab_multiple = (
            plan.stage(read_manifest(directory).state.stage).model,
            plan.recipe.model.vocab_multiple,
        )
    else:
        config = read_config(path)
    options = ModelOptions(vocab_multiple, overlap=parallel.overlap)
    misfits = shape_problems(config, parallel, options.vocab_multiple)
    try:
        layout = resolve_layout(parallel, world_size)
        pipeline = plan_pipeline(config.num_hidden_layers, parallel)
    except ValueError as error:
        raise ConfigError([f"parallel: {error}", *misfits], "the layout") from None
    if misfits:
        raise ConfigError(misfits, "the layout")
    mesh, compute = build_mesh(layout, device), compute_dtype(dtype, device)
    model = build_model(config, mesh, compute, options, pipeline, sharding_of(parallel))
    if directory:
        load(directory, tensors_of(dict(model.named_parameters()), None))
    else:
        load_pretrained(model, config, path)
    return model


def is_run(path: Path) -> bool:
    """Whether a folder is a run directory, and not a Hugging Face directory."""
    return (path / HUGGING_FACE).is_dir()


def evaluate(source: str, recipe: Recipe, dtype: str | None, step: int | None = None) -> dict[str, Any]:
    """{domain: {"loss", "perplexity"}} of a model on the recipe's held-out documents, in rows of its last stage; and under "gates" what
    each gate of the recipe measures: needle recall, accuracies, losses. Nothing is compared with a start."""
    model = open_model(source, dtype, recipe.parallel, step)
    stage = recipe.stages[-1]
    micro = parallel_in(recipe, stage).tokens_at_once
    domains = open_domains(recipe, list(recipe.data))
    pad = pad_token(domains, model.config.eos_token_id)
    results: dict[str, Any] = {}
    if recipe.validation:
        sets = ValidationSets(recipe, stage.seq_len, domains)
        rows = rows_at_once(micro, stage.seq_len, model.mesh.layout)
        losses = validate(model, sets, rows, pad)
        results = {name: {"loss": loss.mean, "perplexity": _perplexity(loss.mean)} for name, loss in losses.items()}
    if recipe.gates:
        asked = stage.model_copy(update={"gates": list(recipe.gates)})
        path = Path(source)
        tokenizer = path / HUGGING_FACE if is_run(path) else recipe.model.tokenizer or recipe.model.pretrained
        if tokenizer is None:
            text = "is missing, and gates read text with it."
            raise ConfigError([Problem("model.tokenizer", None, text, "Give a tokenizer directory.")])
        outcomes = GateRunner(recipe, domains, pad, tokenizer, micro).evaluate(model, asked, None)
        results["gates"] = {outcome.gate: outcome.numbers for outcome in outcomes}
    return results


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf  # float64 ends there
