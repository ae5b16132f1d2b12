"""A model from a Hugging Face directory or a run, for the verbs that only run it: score and evaluate."""

import math
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megacpt.checkpoint.export import find_checkpoint, run_config
from megacpt.checkpoint.load import load
from megacpt.checkpoint.manifest import read_manifest
from megacpt.checkpoint.save import tensors_of
from megacpt.config.layout import resolve_layout, token_unit
from megacpt.config.model import shape_problems
from megacpt.config.recipe import Recipe
from megacpt.config.run_layout import HUGGING_FACE, RECIPE
from megacpt.config.stage import Parallel
from megacpt.data.loader import open_domains, pad_token
from megacpt.errors import ConfigError
from megacpt.evaluate.gates import Examiner
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
    directory, stage = None, None
    if (path / HUGGING_FACE).is_dir():
        directory, _ = find_checkpoint(path, step)
        stage = read_manifest(directory).state.stage
        config, _ = run_config(path, stage)
    else:
        config = read_config(path)
    problems = []
    try:
        layout = resolve_layout(parallel, world_size)
        plan = plan_pipeline(config.num_hidden_layers, parallel)
    except ValueError as error:
        problems.append(f"parallel: {error}")
    options = ModelOptions(run_vocab_multiple(path) if directory else 128, overlap=parallel.overlap)
    problems += shape_problems(config, parallel, options.vocab_multiple)
    if problems:
        raise ConfigError(problems, "the layout")
    mesh, compute = build_mesh(layout, device), compute_dtype(dtype, device)
    model = build_model(config, mesh, compute, options, plan, sharding_of(parallel))
    if directory:
        load(directory, tensors_of(dict(model.named_parameters()), None))
    else:
        load_pretrained(model, config, path)
    return model


def run_vocab_multiple(run_directory: Path) -> int:
    from megacpt.config.load import load_recipe

    return load_recipe(str(run_directory / RECIPE)).model.vocab_multiple


def evaluate(source: str, recipe: Recipe, dtype: str | None, step: int | None = None) -> dict[str, Any]:
    """{domain: {"loss", "perplexity"}} of a model on the recipe's held-out documents, in rows of its last stage; and under "gates" what
    each gate of the recipe measures: needle recall, accuracies, losses. Nothing is compared with a start."""
    model = open_model(source, dtype, recipe.parallel, step)
    stage, layout = recipe.stages[-1], model.mesh.layout
    domains = open_domains(recipe, list(recipe.data))
    pad = pad_token(domains, model.config.eos_token_id)
    results: dict[str, Any] = {}
    if recipe.validation:
        sets = ValidationSets(recipe, stage.seq_len, domains)
        micro = recipe.parallel_of(stage).micro_batch_tokens
        rows = rows_at_once(micro, stage.seq_len, token_unit(layout.tensor, layout.context))
        losses = validate(model, sets, rows, pad)
        perplexity = lambda loss: math.exp(loss) if loss < 700 else math.inf  # float64 ends there
        results = {name: {"loss": loss.mean, "perplexity": perplexity(loss.mean)} for name, loss in losses.items()}
    if recipe.gates:
        asked = stage.model_copy(update={"gates": list(recipe.gates)})
        outcomes = Examiner(recipe, domains, pad).ask(model, asked, None)
        results["gates"] = {outcome.gate: outcome.numbers for outcome in outcomes}
    return results
