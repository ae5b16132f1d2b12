"""How a run begins: from scratch, from a pretrained model, or from its newest checkpoint that is whole; never guessed beyond what the
recipe says, and the same on all ranks."""

import gc
import hashlib
import json
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megacpt import log
from megacpt.checkpoint.load import load
from megacpt.checkpoint.manifest import State, newest_sound
from megacpt.checkpoint.save import tensors_of
from megacpt.config.clock import Clock
from megacpt.config.decisions import Decision, extensions_of
from megacpt.config.layout import resolve_layout
from megacpt.config.load import load_recipe, plain
from megacpt.config.model import load_model_config, with_rope
from megacpt.config.recipe import Recipe
from megacpt.config.run_layout import DTYPES, HUGGING_FACE, RECIPE, TENSORBOARD
from megacpt.config.stage import Stage
from megacpt.data.loader import open_domains, pad_token
from megacpt.errors import CheckpointError, ConfigError, DataError
from megacpt.family.base import ModelConfig
from megacpt.family.read import read_config, what_matters
from megacpt.files import write_atomically
from megacpt.model.build import build_model, chosen_kernels, sharding_of
from megacpt.model.decoder import Decoder, ModelOptions
from megacpt.model.hf import copy_side_files, initialize, load_pretrained
from megacpt.model.split import plan_pipeline
from megacpt.optim.adamw import AdamW
from megacpt.parallel.consensus import agree
from megacpt.parallel.finite import not_finite
from megacpt.parallel.mesh import build_mesh, picture
from megacpt.survive.health import named_tensors
from megacpt.survive.run_directory import RunDirectory, changes_on_resume
from megacpt.train.job import Run, StopRequest
from megacpt.train.metrics import TensorBoard, event_file, peak_flops
from megacpt.train.step import compute_dtype


@dataclass(frozen=True)
class Start:
    """Attributes:
    mode: scratch, pretrained or resume.
    path, state: the checkpoint that is resumed.
    """

    mode: str
    path: Path | None = None
    state: State | None = None

    @property
    def step(self) -> int:
        return self.state.step if self.state else 0

    @property
    def decisions(self) -> list[Decision]:
        return list(self.state.decisions) if self.state else []


def open_run(recipe: Recipe, directory: RunDirectory, device: torch.device, stop: StopRequest, again: bool) -> Run:
    """Everything that a run needs, with weights and moments as they stand. Collective.

    Args:
        again: the run goes back to a checkpoint of its own, whatever `run.start` says.
    """
    config = load_model_config(recipe.model)
    domains = open_domains(recipe, list(recipe.data))
    fingerprints = {name: domain.fingerprint() for name, domain in domains.items()}
    compute = compute_dtype(recipe.precision.compute, device)
    kernels = chosen_kernels(recipe.kernels, device, compute)
    torch.use_deterministic_algorithms(recipe.kernels.deterministic)
    damaged: set[int] = set()
    while True:
        start = _find_start(recipe, directory, damaged, again)
        clock = Clock(recipe, extensions_of(start.decisions))
        changes = _check_resume(recipe, clock, directory, start.state, fingerprints) if start.state else []
        agree(
            {
                "recipe": json.dumps(plain(recipe), sort_keys=True),
                "checkpoint": f"{start.mode} {start.step}",
                **{f"data of {name}": digest for name, digest in fingerprints.items()},
                **{f"{key} of config.json": json.dumps(value) for key, value in what_matters(config).items()},
            }
        )
        if start.state:
            _check_config(recipe, directory, config)
        first = recipe.stages[clock.step(min(clock.num_steps, start.step + 1)).stage]
        model, optimizer = build(recipe, first, config, compute, device)
        try:
            _fill(recipe, directory, model, optimizer, config, compute, start)
            break
        except CheckpointError as error:  # on all ranks, whoever read what is damaged
            if not start.state:
                raise
            log.warn(f"skipped a damaged checkpoint: {error}")
            damaged.add(start.step)
            model = optimizer = None
            gc.collect()
    layout = model.mesh.layout
    peak, peak_source = peak_flops(device, recipe.log.peak_tflops)
    facts = {
        "start": start.mode,
        "started_at_step": start.step,
        "layout": str(layout),
        "world_size": layout.world_size,
        "compute": str(compute).removeprefix("torch."),
        "device": _device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "recipe": hashlib.sha256(json.dumps(plain(recipe), sort_keys=True).encode()).hexdigest(),
        "kernels": kernels,
        "peak_flops": peak,
        "peak_flops_source": peak_source,
    }
    directory.cut_metrics(start.step)
    directory.begin(recipe, facts)
    directory.event("start", start.step, clock.tokens_at(start.step), mode=start.mode, changes=changes)
    for step in sorted(damaged):
        directory.event("damaged", step, clock.tokens_at(step))
    for change in changes:
        log.info(f"changed since the run was started: {change}")
    log.info(
        f"{directory.path}: {start.mode}" + (f" from step {start.step}" if start.step else "") + f", {layout}, "
        f"{facts['compute']} on {facts['device']}, {log.short_number(config.num_parameters())} parameters, "
        f"{clock.num_steps} steps, {log.short_number(clock.num_tokens)} tokens"
    )
    if layout.world_size > 1:
        log.info(picture(layout))
    log.info("kernels: " + ", ".join(f"{what} {name}" for what, name in kernels.items()))
    log.info(
        f"MFU refers to {peak / 1e12:.4g} TFLOP/s a device ({peak_source})" if peak else f"no MFU: peak {peak_source}"
    )
    pad = pad_token(domains, config.eos_token_id)
    run = Run(recipe, model, optimizer, directory, fingerprints, facts, domains, pad, stop, start.decisions, start.step)
    if start.state:
        run.saved_at, run.saved_decisions = start.step, len(start.decisions)
        run.accepted = [tuple(pair) for pair in start.state.accepted]
        run.skipped_in_row = start.state.skipped_in_row
    if recipe.log.tensorboard and directory.write:
        journal = directory.journal(f"{TENSORBOARD}/{event_file()}")
        run.board = TensorBoard(journal, layout.world_size, start.step + 1 if start.step else None)
    return run


def _find_start(recipe: Recipe, directory: RunDirectory, damaged: set[int], again: bool) -> Start:
    found = newest_sound(directory.checkpoints, damaged)
    mode = "resume" if again and found else _start_mode(recipe, found is not None)
    if mode != "resume":
        return Start(mode)
    for complaint in found[2] if not damaged else ():
        log.warn(f"skipped a damaged checkpoint: {complaint}")
    return Start(mode, *found[:2])


def build(
    recipe: Recipe, stage: Stage, config: ModelConfig, compute: torch.dtype, device: torch.device
) -> tuple[Decoder, AdamW]:
    """Model and optimizer for a stage's layout, without values."""
    parallel = recipe.layout_of(stage)
    mesh = build_mesh(resolve_layout(parallel, dist.get_world_size()), device)
    kernels = recipe.kernels
    options = ModelOptions(
        recipe.model.vocab_multiple,
        kernels.attention,
        kernels.deterministic,
        parallel.overlap,
        kernels.operations,
        kernels.compile,
    )
    plan = plan_pipeline(config.num_hidden_layers, parallel)
    model = build_model(config, mesh, compute, options, plan, sharding_of(parallel))
    rounded = recipe.optimizer.state_dtype == "bfloat16" and compute != torch.float64
    state = torch.bfloat16 if rounded else None
    decayed = [p.name for p in config.parameters if p.decay]
    return model, AdamW(dict(model.named_parameters()), kernels.optimizer, state, recipe.run.seed, decayed)


def _start_mode(recipe: Recipe, has_checkpoint: bool) -> str:
    """scratch, pretrained or resume; never guessed beyond what `run.start` says."""
    asked = recipe.run.start
    if asked == "resume" and not has_checkpoint:
        raise ConfigError([f'run.start = "resume": {recipe.directory}/checkpoints holds no checkpoint.'])
    if asked in ("scratch", "pretrained") and has_checkpoint:
        raise ConfigError(
            [
                f'run.start = "{asked}": {recipe.directory}/checkpoints holds checkpoints, which would be lost. '
                'Take start = "auto" to go on, or another run.name.'
            ]
        )
    if asked != "auto":
        return asked
    return "resume" if has_checkpoint else "pretrained" if recipe.model.pretrained else "scratch"


def _check_resume(
    recipe: Recipe, clock: Clock, directory: RunDirectory, state: State, fingerprints: dict[str, str]
) -> list[str]:
    """Differences that a resume may have. Data or steps that differ are errors."""
    for name, digest in state.fingerprints.items():
        if name in fingerprints and fingerprints[name] != digest:
            raise DataError(
                f"domain {name}: the prepared data differs from that at step {state.step} (fingerprint {fingerprints[name][:12]}, "
                f"was {digest[:12]}). Restore the data, or start a new run under another run.name."
            )
    before = load_recipe(str(directory.path / RECIPE))
    changes = changes_on_resume(before, recipe, state.stage)
    if state.step > clock.num_steps or clock.tokens_at(state.step) != state.tokens:
        raise ConfigError(
            [
                f"the checkpoint stands at step {state.step}, {state.tokens} tokens; with this recipe that step is not there or "
                "ends elsewhere. A stage cannot be made shorter than what it has consumed."
            ]
        )
    return changes


def _check_config(recipe: Recipe, directory: RunDirectory, config: ModelConfig) -> None:
    """The model's config.json is the one that the run began with, of which its folder holds a copy. A run that has none gets one now.
    Collective: rank 0 looks.

    Raises:
        ConfigError: with every difference that matters.
    """
    problems: list[list[str]] = [[]]
    if directory.write:
        copy = directory.path / HUGGING_FACE / "config.json"
        try:
            if copy.exists():
                before = what_matters(with_rope(read_config(copy), recipe.model.rope))
                now = what_matters(config)
                keys = [key for key in now | before if now.get(key) != before.get(key)]
                problems = [[f"{key} = {now.get(key)}: the run began with {before.get(key)}." for key in keys]]
                if keys:
                    problems[0].append(
                        f"Put back the config.json that {copy} is a copy of, or begin a new run under another run.name."
                    )
            else:
                _keep_config(copy, config)
        except ConfigError as error:
            problems = [error.problems]
        except OSError as error:
            problems = [[f"{copy}: {error.strerror or error}"]]
    dist.broadcast_object_list(problems, src=0)
    if problems[0]:
        raise ConfigError(problems[0], "config.json of the model")


def _keep_config(copy: Path, config: ModelConfig) -> None:
    """The copy from which a run is resumed and exported."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(copy, json.dumps(config.raw, indent=2) + "\n")


def _fill(
    recipe: Recipe,
    directory: RunDirectory,
    model: Decoder,
    optimizer: AdamW,
    config: ModelConfig,
    compute: torch.dtype,
    start: Start,
) -> None:
    """Weights and moments."""
    if start.state:
        load(start.path, tensors_of(optimizer.parameters, optimizer))
        if names := not_finite(named_tensors(optimizer)):
            raise CheckpointError(f"{start.path}: {len(names)} tensors hold inf or nan, {names[0]} among them.")
        optimizer.restore(start.state.num_updates, start.state.missed)
        return
    if start.mode == "pretrained":
        dtypes = load_pretrained(model, config, recipe.model.pretrained)
    else:
        initialize(model, config, recipe.run.seed)
        name = "bfloat16" if compute == torch.bfloat16 else "float32"
        dtypes = dict.fromkeys(config.shapes(), name)
    if directory.write:
        side = directory.path / HUGGING_FACE
        copy_side_files(recipe.model.pretrained, recipe.model.tokenizer or recipe.model.pretrained, side)
        _keep_config(side / "config.json", config)
        write_atomically(side / DTYPES, json.dumps(dtypes))


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"
