"""How a run begins: from scratch, from a pretrained model, or from its newest checkpoint that is whole; never guessed beyond what the
recipe says, and the same on all ranks.

    choose_start -> resolve_run -> agree -> keep_base -> build -> fill -> announce
"""

import gc
import hashlib
import json
import os
import platform
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megacpt_kernels.device import profile_of

from megacpt import log
from megacpt.checkpoint.load import load_training
from megacpt.checkpoint.manifest import RunState, latest_intact_checkpoint
from megacpt.config.clock import Clock
from megacpt.config.load import load_recipe, plain
from megacpt.config.model import with_rope
from megacpt.config.plan_file import base_of, read_plan, save_plan
from megacpt.config.recipe import Recipe
from megacpt.config.resolve import RunPlan, resolve
from megacpt.config.resume import changes_on_resume
from megacpt.config.run_layout import DTYPES, HUGGING_FACE, PROFILE, RECIPE, TENSORBOARD
from megacpt.config.sections.model import Model
from megacpt.config.timeline import timeline
from megacpt.data.loader import open_domains, pad_token
from megacpt.errors import CheckpointError, ConfigError, DataError
from megacpt.family.read import read_config, what_matters
from megacpt.files import write_atomically
from megacpt.model.base_files import (
    NO_IDS,
    digests,
    sampled_digest,
    share_of_digests,
    side_files,
    weight_files,
)
from megacpt.model.build import chosen_kernels
from megacpt.model.decoder import Decoder
from megacpt.model.hf import copy_side_files, initialize, load_pretrained, pretrained_dtypes
from megacpt.optim.adamw import AdamW
from megacpt.parallel.consensus import agree, ask_rank_0, gather
from megacpt.parallel.finite import not_finite
from megacpt.parallel.mesh import picture
from megacpt.survive.health import Stragglers, named_tensors
from megacpt.survive.run_directory import RunDirectory
from megacpt.train.build import build, held_exactly, set_up_stage
from megacpt.train.metrics import StepMetrics, TensorBoard, event_file, peak_flops
from megacpt.train.profile import Profiler
from megacpt.train.session import Session
from megacpt.train.step import compute_dtype
from megacpt.train.stop import StopRequest

Mode = Literal["scratch", "pretrained", "resume"]


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        path, state: the checkpoint that is resumed.
        complaints: what is wrong with newer ones.
    """

    mode: Mode
    path: Path | None = None
    state: RunState | None = None
    complaints: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        return self.state.step if self.state else 0


def open_session(
    recipe: Recipe, directory: RunDirectory, device: torch.device, stop: StopRequest, again: bool
) -> Session:
    """Everything that a run needs, with weights and moments as they stand. Collective.

    Args:
        again: the run goes back to a checkpoint of its own, whatever `run.start` says.
    """
    compute = compute_dtype(recipe.precision.compute, device)
    kernels = chosen_kernels(recipe.kernels, device, compute)
    torch.use_deterministic_algorithms(recipe.kernels.deterministic)
    domains = open_domains(recipe, list(recipe.data))
    fingerprints = {name: domain.fingerprint() for name, domain in domains.items()}
    damaged: set[int] = set()
    while True:
        start = choose_start(recipe, directory, damaged, again)
        plan, changes = resolve_run(recipe, directory, start, fingerprints)
        state = start.state or RunState(0, 0, 0, recipe.stages[0].name, fingerprints=fingerprints)
        clock = Clock(recipe, state.decisions.extensions())
        following = next(timeline(recipe, clock, state.position), None)
        stage = plan.stages[following.stage if following else -1]
        keep_base(plan, directory, start.mode, compute)
        model = optimizer = None
        try:
            exact = frozenset() if start.mode == "scratch" else held_exactly(plan, start.path, compute)
            model, optimizer = build(plan, stage, compute, device, exact)
            fill(plan, directory, model, optimizer, start)
            break
        except CheckpointError as error:  # on all ranks, whoever read what is damaged
            if not start.state:
                raise
            log.warn(f"skipped a damaged checkpoint: {error}")
            damaged.add(start.step)
            del model, optimizer
            gc.collect()
    set_up_stage(model, optimizer, stage)
    facts = facts_of(plan, start, model, kernels)
    announce(plan, directory, start, clock, facts, changes, sorted(damaged))
    board = None
    if recipe.log.tensorboard and directory.write:
        journal = directory.journal(f"{TENSORBOARD}/{event_file()}")
        board = TensorBoard(journal, plan.world_size, start.step + 1 if start.step else None)
    return Session(
        plan=plan,
        state=state,
        directory=directory,
        stop=stop,
        domains=domains,
        base=directory.path / HUGGING_FACE,
        pad_id=pad_token(domains, plan.model.eos_token_id),
        model=model,
        optimizer=optimizer,
        stage=stage,
        metrics=StepMetrics(plan.model, plan.world_size, facts["peak_flops"]),
        board=board,
        profiler=Profiler(recipe.profile, directory.path / PROFILE, dist.get_rank()),
        stragglers=Stragglers(device),
        saved=start.state,
    )


def choose_start(recipe: Recipe, directory: RunDirectory, damaged: set[int], again: bool) -> Start:
    """scratch, pretrained or resume; never guessed beyond what `run.start` says."""
    found, asked = latest_intact_checkpoint(directory.checkpoints, damaged), recipe.run.start
    if again and found:
        asked = "resume"
    if asked == "resume" and not found:
        raise ConfigError([f'run.start = "resume": {directory.checkpoints} holds no checkpoint.'])
    if asked in ("scratch", "pretrained") and found:
        raise ConfigError(
            [
                f'run.start = "{asked}": {directory.checkpoints} holds checkpoints, which would be lost. '
                'Take start = "auto" to go on, or another run.name.'
            ]
        )
    if not found:
        return Start(asked if asked != "auto" else "pretrained" if recipe.model.pretrained else "scratch")
    for complaint in found.complaints if not damaged else ():
        log.warn(f"skipped a damaged checkpoint: {complaint}")
    return Start("resume", found.directory, found.state, found.complaints)


def resolve_run(
    recipe: Recipe, directory: RunDirectory, start: Start, fingerprints: dict[str, str]
) -> tuple[RunPlan, list[str]]:
    """The plan of the run that begins, on which all ranks agree, and what differs from the run that is resumed. Collective.

    Raises:
        ConfigError: naming each fact on which ranks differ, and what a resume may not change. DataError: for other data.
    """
    config, small = base_of(recipe), digests(base_files(recipe.model))
    weights = weight_files(recipe.model) if start.mode == "pretrained" else []
    agree(
        {
            "recipe": json.dumps(plain(recipe), sort_keys=True),
            "checkpoint": f"{start.mode} {start.step}",
            **{f"data of {name}": digest for name, digest in fingerprints.items()},
            **{f"{key} of config.json": json.dumps(value) for key, value in what_matters(config).items()},
        }
    )
    base_facts = {name: digest for name, digest in small.items() if name not in NO_IDS}
    base_facts.pop("config.json", None)  # compared field by field
    agree(base_facts if small else None)
    first_of_node = int(os.environ.get("LOCAL_RANK", "0")) == 0
    agree({"weights of the base model": sampled_digest(weights)} if weights and first_of_node else None)
    before = ask_rank_0(lambda: kept_before(directory, small))
    whole: dict[str, str] = {}
    for part in gather(share_of_digests(weights, dist.get_rank(), dist.get_world_size())):
        whole |= part
    plan = resolve(recipe, config, dist.get_world_size(), small or before.files, whole or before.weights)
    changes = check_resume(plan, directory, start.state, fingerprints) if start.state else []
    if start.state or ask_rank_0(directory.has_rows):
        ask_rank_0(lambda: check_base(plan, directory, before, bool(small)))
    agree({"plan": plan.digest})
    return plan, changes


@dataclass(frozen=True)
class Kept:
    """What a run directory says of the base that it began with: SHA-256 by file name."""

    files: dict[str, str]
    weights: dict[str, str]


def base_files(model: Model) -> dict[str, Path]:
    tokenizer = model.tokenizer or model.pretrained
    return side_files(model.pretrained, tokenizer) if tokenizer else {}


def kept_before(directory: RunDirectory, now: Collection[str]) -> Kept:
    """From plan.json; of a run that has none, from its copies.

    Args:
        now: the base's files.
    """
    content = read_plan(directory.path)
    if content is not None:
        return Kept(content["files"], content["weights"])
    side = directory.path / HUGGING_FACE
    copies = {path.name: path for path in side.iterdir() if path.name in now} if side.is_dir() else {}
    return Kept(digests(copies), {})


def check_resume(plan: RunPlan, directory: RunDirectory, state: RunState, fingerprints: dict[str, str]) -> list[str]:
    """Differences that a resume may have. Data or steps that differ are errors."""
    for name, digest in state.fingerprints.items():
        if name in fingerprints and fingerprints[name] != digest:
            raise DataError(
                f"domain {name}: the prepared data differs from that at step {state.step} (fingerprint {fingerprints[name][:12]}, "
                f"was {digest[:12]}). Restore the data, or start a new run under another run.name."
            )
    clock = Clock(plan.recipe, state.decisions.extensions())
    changes = changes_on_resume(load_recipe(str(directory.path / RECIPE)), plan.recipe, state.stage)
    if state.step > clock.num_steps or clock.tokens_at(state.step) != state.tokens:
        raise ConfigError(
            [
                f"the checkpoint stands at step {state.step}, {state.tokens} tokens; with this recipe that step is not there or "
                "ends elsewhere. A stage cannot be made shorter than what it has consumed."
            ]
        )
    return changes


def check_base(plan: RunPlan, directory: RunDirectory, before: Kept, present: bool) -> None:
    """The base is the one that the run began with.

    Args:
        present: whether the base is there, and not only the run's copy of it.
    Raises:
        ConfigError: with every field, file and both values.
    """
    copy, problems = directory.path / HUGGING_FACE / "config.json", []
    if copy.exists():
        was = what_matters(with_rope(read_config(copy), plan.recipe.model.rope))
        now = what_matters(plan.model)
        keys = [key for key in now | was if now.get(key) != was.get(key)]
        problems += [f"{key} = {now.get(key)}: the run began with {was.get(key)}." for key in keys]
    for what, new, old in (("tokenizer", plan.files, before.files), ("weights", plan.weights, before.weights)):
        names = sorted(name for name in {*new, *old} if name not in (*NO_IDS, "config.json")) if present and old else []
        for name in names:
            if new.get(name) != old.get(name):
                known = [digest[:12] if digest else "nothing" for digest in (new.get(name), old.get(name))]
                problems.append(f"{name} of the {what}: its SHA-256 is {known[0]}, the run began with {known[1]}.")
    if problems:
        problems.append(
            f"Put back the config.json and the tokenizer of which {copy.parent} holds copies, and the weights, or begin a new "
            "run under another run.name."
        )
        raise ConfigError(problems, "the base model")


def keep_base(plan: RunPlan, directory: RunDirectory, mode: Mode, compute: torch.dtype) -> None:
    """Writes plan.json and the run's own copy of the base's small files, before anything is trained. Collective; rank 0 writes."""

    def keep() -> None:
        side, model = directory.path / HUGGING_FACE, plan.recipe.model
        side.mkdir(parents=True, exist_ok=True)
        if mode != "resume":
            copy_side_files(model.pretrained, model.tokenizer_path, side)
            if mode == "pretrained":
                assert model.pretrained is not None, "choose_start has found it"
                dtypes = pretrained_dtypes(plan.base, model.pretrained)
            else:
                name = "bfloat16" if compute == torch.bfloat16 else "float32"
                dtypes = dict.fromkeys(plan.base.shapes(), name)
            write_atomically(side / DTYPES, json.dumps(dtypes))
        if mode != "resume" or not (side / "config.json").exists():
            write_atomically(side / "config.json", json.dumps(plan.base.raw, indent=2) + "\n")
        save_plan(plan, directory.path)

    ask_rank_0(keep)


def fill(plan: RunPlan, directory: RunDirectory, model: Decoder, optimizer: AdamW, start: Start) -> None:
    """Weights and moments. Collective."""
    if start.state:
        assert start.path is not None, "a state comes from a checkpoint"
        load_training(start.path, optimizer, start.state.num_updates, start.state.missed)
        if names := not_finite(named_tensors(optimizer)):
            raise CheckpointError(f"{start.path}: {len(names)} tensors hold inf or nan, {names[0]} among them.")
    elif start.mode == "pretrained":
        assert plan.recipe.model.pretrained is not None, "choose_start has found it"
        load_pretrained(model, plan.model, plan.recipe.model.pretrained)
    else:
        initialize(model, plan.model, plan.recipe.run.seed)


def facts_of(plan: RunPlan, start: Start, model: Decoder, kernels: dict[str, str]) -> dict[str, Any]:
    """What run.json and the manifests say of this start."""
    device = profile_of(model.mesh.device)
    peak, source = peak_flops(device, plan.recipe.log.peak_tflops)
    return {
        "start": start.mode,
        "started_at_step": start.step,
        "layout": str(model.mesh.layout),
        "world_size": plan.world_size,
        "compute": str(model.compute).removeprefix("torch."),
        "device": device.name or f"CPU ({torch.get_num_threads()} threads)",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "plan": plan.digest,
        "recipe": hashlib.sha256(json.dumps(plain(plan.recipe), sort_keys=True).encode()).hexdigest(),
        "kernels": kernels,
        "peak_flops": peak,
        "peak_flops_source": source,
    }


def announce(
    plan: RunPlan,
    directory: RunDirectory,
    start: Start,
    clock: Clock,
    facts: dict[str, Any],
    changes: list[str],
    damaged: list[int],
) -> None:
    """Begins the run's records, and says on the console what begins."""
    directory.cut_metrics(start.step)
    directory.begin(plan.recipe, facts)
    directory.event("start", start.step, clock.tokens_at(start.step), mode=start.mode, changes=changes)
    for step in damaged:
        directory.event("damaged", step, clock.tokens_at(step))
    for change in changes:
        log.info(f"changed since the run was started: {change}")
    where, count = f" from step {start.step}" if start.step else "", log.short_number(plan.model.num_parameters())
    log.info(
        f"{directory.path}: {start.mode}{where}, {facts['layout']}, {facts['compute']} on {facts['device']}, {count} parameters, "
        f"{clock.num_steps} steps, {log.short_number(clock.num_tokens)} tokens"
    )
    if plan.world_size > 1:
        log.info(picture(plan.stages[clock.step(min(clock.num_steps, start.step + 1)).stage].layout(plan.world_size)))
    log.info("kernels: " + ", ".join(f"{what} {name}" for what, name in facts["kernels"].items()))
    peak, source = facts["peak_flops"], facts["peak_flops_source"]
    log.info(f"MFU refers to {peak / 1e12:.4g} TFLOP/s a device ({source})" if peak else f"no MFU: peak {source}")
