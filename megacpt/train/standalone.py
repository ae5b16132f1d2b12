"""A model from a Hugging Face directory or a run, for the verbs that only run it: score and evaluate."""

from pathlib import Path

import torch
import torch.distributed as dist

from megacpt.checkpoint.export import HUGGING_FACE, find_checkpoint, run_config
from megacpt.checkpoint.load import load
from megacpt.checkpoint.manifest import verify
from megacpt.checkpoint.save import tensors_of
from megacpt.config.layout import Layout
from megacpt.config.recipe import Recipe
from megacpt.data.loader import open_domains, pad_token
from megacpt.evaluate.validation import ValidationSets, validate
from megacpt.model.build import build_model
from megacpt.model.config import read_config
from megacpt.model.hf import load_pretrained
from megacpt.model.llama import Llama, ModelOptions
from megacpt.parallel.mesh import build_mesh, device_of_process, start_process_group
from megacpt.train.step import compute_dtype


def open_model(source: str, dtype: str | None, step: int | None = None) -> Llama:
    """The model of a Hugging Face directory, or of a checkpoint when `source` is a run directory."""
    device = device_of_process()
    start_process_group(device)
    mesh = build_mesh(Layout(data_shard=dist.get_world_size()), device)
    compute, path = compute_dtype(dtype, device), Path(source)
    if not (path / HUGGING_FACE).is_dir():
        config = read_config(path)
        model = build_model(config, mesh, compute, ModelOptions())
        load_pretrained(model, config, path)
        return model
    directory, _ = find_checkpoint(path, step)
    config, _ = run_config(path, verify(directory).stage)
    model = build_model(config, mesh, compute, ModelOptions(run_vocab_multiple(path)))
    load(directory, tensors_of(dict(model.named_parameters()), None))
    return model


def run_vocab_multiple(run_directory: Path) -> int:
    from megacpt.config.load import load_recipe

    return load_recipe(str(run_directory / "recipe.toml")).model.vocab_multiple


def evaluate(source: str, recipe: Recipe, dtype: str | None, step: int | None = None) -> dict[str, dict[str, float]]:
    """{domain: {"loss", "perplexity"}} of a model on the recipe's held-out documents, in rows of its last stage."""
    model = open_model(source, dtype, step)
    stage = recipe.stages[-1]
    domains = open_domains(recipe, sorted({name for v in recipe.validation for name in v.domains}))
    sets = ValidationSets(recipe, stage.seq_len, domains)
    rows = recipe.parallel_of(stage).micro_batch_tokens // stage.seq_len
    losses = validate(model, sets, rows, pad_token(domains, model.config.eos_token_id))
    return {name: {"loss": loss, "perplexity": float(torch.tensor(loss).exp())} for name, loss in losses.items()}
