"""The run: start or resume, every step of the clock, validation, checkpoints, and what is written of it.

Which step comes next, its rows, its rate and its stage are functions of the step's number (config/clock.py); the loop
holds no schedule of its own. It begins at the step after the checkpoint's.
"""

import gc
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from megacpt import log
from megacpt.checkpoint.export import HUGGING_FACE
from megacpt.checkpoint.load import load
from megacpt.checkpoint.manifest import State, directory_name, newest_sound
from megacpt.checkpoint.save import tensors_of
from megacpt.config.clock import Clock, Step
from megacpt.config.decisions import extensions_of
from megacpt.config.layout import resolve_layout
from megacpt.config.load import load_recipe, plain
from megacpt.config.recipe import Recipe
from megacpt.config.stage import Stage
from megacpt.data.loader import StageData, StepData, domain_tokens, load_step, open_domains, pad_token, prefetch
from megacpt.errors import ConfigError, DataError, MegacptError
from megacpt.evaluate.validation import ValidationSets
from megacpt.model.build import build_model, chosen_kernels, sharding_of
from megacpt.model.config import LlamaConfig, config_of, config_of_stage, frozen_names
from megacpt.model.hf import copy_side_files, initialize, load_pretrained
from megacpt.model.llama import Llama, ModelOptions
from megacpt.model.stage import plan_stages
from megacpt.optim.adamw import AdamW
from megacpt.optim.schedule import rate_of_step
from megacpt.parallel.agreement import agree
from megacpt.parallel.mesh import (
    build_mesh,
    device_of_process,
    picture,
    restart_process_group,
    set_timeout,
    start_process_group,
)
from megacpt.train.job import Run, StopRequest, saved, told_of_saves, validated
from megacpt.train.metrics import Console, StepMetrics, TensorBoard, memory_gib, peak_flops
from megacpt.train.profile import Profiler
from megacpt.train.run_directory import RunDirectory, changes_on_resume
from megacpt.train.stages import adjust_mixture, average_stage, mixture_is_due, pass_gates, snapshot, take_baseline
from megacpt.train.step import Update, compute_dtype, train_step


def train(recipe: Recipe) -> str:
    """Runs a recipe to its end or to a stop request. Returns the status: finished or preempted."""
    device = device_of_process()
    start_process_group(device, recipe.health.start_timeout_seconds)
    directory = RunDirectory(recipe.directory, write=dist.get_rank() == 0)
    try:
        status = _train(recipe, directory, device)
    except BaseException as error:
        directory.status("failed", error.exit_code if isinstance(error, MegacptError) else 1)
        raise
    directory.status(status, 0)
    dist.destroy_process_group()
    return status


def _train(recipe: Recipe, directory: RunDirectory, device: torch.device) -> str:
    config = config_of(recipe.model)
    found = newest_sound(directory.checkpoints)
    mode = _start_mode(recipe, found is not None)
    decisions = list(found[1].decisions) if mode == "resume" else []
    clock = Clock(recipe, extensions_of(decisions))
    domains = open_domains(recipe, list(recipe.data))
    fingerprints = {name: domain.fingerprint() for name, domain in domains.items()}
    changes = _check_resume(recipe, clock, directory, found[1], fingerprints) if mode == "resume" else []
    agree(
        {
            "recipe": json.dumps(plain(recipe), sort_keys=True),
            "checkpoint": mode + str(found[1].step if found else 0),
            **{f"data of {name}": digest for name, digest in fingerprints.items()},
        }
    )
    compute = compute_dtype(recipe.precision.compute, device)
    kernels = chosen_kernels(recipe.kernels, device, compute)
    torch.use_deterministic_algorithms(recipe.kernels.deterministic)
    first = recipe.stages[clock.step(min(clock.num_steps, (found[1].step if mode == "resume" else 0) + 1)).stage]
    model, optimizer = _build(recipe, first, config, compute, device)
    layout = model.mesh.layout
    done = _load(recipe, directory, model, optimizer, config, compute, mode, found)
    peak, peak_source = peak_flops(device, recipe.log.peak_tflops)
    facts = {
        "start": mode,
        "started_at_step": done,
        "layout": str(layout),
        "world_size": layout.world_size,
        "compute": str(compute).removeprefix("torch."),
        "device": _device_name(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernels": kernels,
        "peak_flops": peak,
        "peak_flops_source": peak_source,
    }
    directory.cut_metrics(done)
    directory.begin(recipe, facts)
    directory.event("start", done, clock.tokens_at(done), mode=mode, changes=changes)
    log.info(
        f"{directory.path}: {mode}" + (f" from step {done}" if done else "") + f", {layout}, {facts['compute']} on "
        f"{facts['device']}, {log.short_number(config.num_parameters())} parameters, "
        f"{clock.num_steps} steps, {log.short_number(clock.num_tokens)} tokens"
    )
    if layout.world_size > 1:
        log.info(picture(layout))
    log.info("kernels: " + ", ".join(f"{what} {name}" for what, name in facts["kernels"].items()))
    log.info(
        f"MFU refers to {peak / 1e12:.4g} TFLOP/s a device ({peak_source})" if peak else f"no MFU: peak {peak_source}"
    )
    run = Run(
        recipe,
        model,
        optimizer,
        directory,
        fingerprints,
        facts,
        domains,
        pad_token(domains, config.eos_token_id),
        StopRequest(),
        decisions,
        recipe.health.start_timeout_seconds,
    )
    if mode == "resume":
        run.saved_at, run.saved_decisions = done, len(decisions)
    if recipe.log.tensorboard and directory.write:
        run.board = TensorBoard(directory.path / "tb", layout.world_size, done + 1 if done else None)
    gc.collect()
    gc.disable()  # a collection in one rank's step is a stall of all; it runs at intervals, on all at once
    try:
        return _stages(run, done)
    finally:
        gc.enable()
        if run.saver:
            run.saver.close()
        if run.board:
            run.board.close()


def _build(
    recipe: Recipe, stage: Stage, config: LlamaConfig, compute: torch.dtype, device: torch.device
) -> tuple[Llama, AdamW]:
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
    plan = plan_stages(config.num_hidden_layers, parallel)
    model = build_model(config, mesh, compute, options, plan, sharding_of(parallel))
    rounded = recipe.optimizer.state_dtype == "bfloat16" and compute != torch.float64
    state = torch.bfloat16 if rounded else None
    return model, AdamW(dict(model.named_parameters()), kernels.optimizer, state, recipe.run.seed)


def _relayout(run: Run, index: int, number: int) -> None:
    """The model under the layout of another stage, through a checkpoint of the step that is done."""
    stage, before = run.recipe.stages[index], run.model
    old, config, compute, device = before.mesh.layout, before.config, before.compute, before.mesh.device
    path, updates = run.directory.checkpoints / directory_name(number), run.optimizer.num_updates
    if not path.is_dir():
        saved(run, number)
    if run.saver:
        run.saver.wait()
        told_of_saves(run)
        run.saver.close()
    run.model = run.optimizer = before = None  # the old shards leave memory before the new ones come
    gc.collect()
    restart_process_group(device, index, run.recipe.health.start_timeout_seconds)
    run.timeout = run.recipe.health.start_timeout_seconds
    run.model, run.optimizer = _build(run.recipe, stage, config, compute, device)
    load(path, tensors_of(run.optimizer.parameters, run.optimizer))
    run.optimizer.num_updates = updates
    run.open_saver()
    run.facts["layout"] = str(run.model.mesh.layout)
    run.directory.event("layout", number, run.clock.tokens_at(number), before=str(old), after=run.facts["layout"])
    log.info(f"from stage {stage.name} on: {picture(run.model.mesh.layout)}")


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
    before = load_recipe(str(directory.path / "recipe.toml"))
    changes = changes_on_resume(before, recipe, state.stage)
    if state.step > clock.num_steps or clock.tokens_at(state.step) != state.tokens:
        raise ConfigError(
            [
                f"the checkpoint stands at step {state.step}, {state.tokens} tokens; with this recipe that step is not there or "
                "ends elsewhere. A stage cannot be made shorter than what it has consumed."
            ]
        )
    return changes


def _load(
    recipe: Recipe,
    directory: RunDirectory,
    model: Llama,
    optimizer: AdamW,
    config: LlamaConfig,
    compute: torch.dtype,
    mode: str,
    found: tuple[Path, State, list[str]] | None,
) -> int:
    """Fills weights and moments. Returns the step that is done."""
    if mode == "resume":
        path, state, complaints = found
        for complaint in complaints:
            log.warn(f"skipped a damaged checkpoint: {complaint}")
        load(path, tensors_of(optimizer.parameters, optimizer))
        optimizer.num_updates = state.num_updates
        return state.step
    if mode == "pretrained":
        dtypes = load_pretrained(model, config, recipe.model.pretrained)
    else:
        initialize(model, config, recipe.run.seed)
        name = "bfloat16" if compute == torch.bfloat16 else "float32"
        dtypes = dict.fromkeys(config.shapes(), name)
    if directory.write:
        side = directory.path / HUGGING_FACE
        copy_side_files(recipe.model.tokenizer or recipe.model.pretrained, side)
        if recipe.model.pretrained and recipe.model.tokenizer:
            copy_side_files(recipe.model.pretrained, side)
            copy_side_files(recipe.model.tokenizer, side)
        (side / "config.json").write_text(json.dumps(config.raw, indent=2) + "\n", encoding="utf-8")
        (side / "dtypes.json").write_text(json.dumps(dtypes))
    return 0


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"


def _stages(run: Run, done: int) -> str:
    """Every stage from the step after `done` on. A stage that does not pass its gates may become longer and is run on."""
    recipe = run.recipe
    layout = recipe.layout_of(recipe.stages[run.clock.step(min(run.clock.num_steps, done + 1)).stage])
    profiler = Profiler(recipe.profile, run.directory.path / "profile", dist.get_rank())
    number, index, entered = done, 0, -1
    stage, sets = recipe.stages[0], None
    try:
        while index < len(recipe.stages):
            stage, last = recipe.stages[index], run.clock.stage_numbers(index)[-1]
            stop_at = min(
                run.clock.num_steps, run.clock.num_steps if recipe.run.stop_at_step is None else recipe.run.stop_at_step
            )
            if last < number or (number == last and index + 1 < len(recipe.stages) and _is_settled(run, index, number)):
                index += 1
                continue
            if number >= stop_at and not (number == last or number == done == 0):
                break
            if recipe.layout_of(stage) != layout and entered != index:
                _relayout(run, index, number)
                layout = recipe.layout_of(stage)
                run.saved_at = number
            if entered != index:
                _enter_stage(run, index)
                sets = ValidationSets(recipe, stage.seq_len, run.domains) if recipe.validation else None
                entered = index
            if number == 0:
                take_baseline(run, index)
                if sets:
                    validated(run, sets, 0, stage)
            if number < min(last, stop_at):
                number = _steps(run, index, number, min(last, stop_at), sets, profiler)
                if run.stopping:  # what all ranks agreed, not what this one has heard
                    tokens = run.clock.tokens_at(number)
                    run.directory.event("stopped", number, tokens, signal=run.stop.signal)
                    return "preempted"
            if number == last:
                average_stage(run, index, number)
                if not pass_gates(run, index, number):
                    continue
            if number >= stop_at and stop_at < run.clock.num_steps:
                break
            index += 1
    finally:
        profiler.close()
    if sets and run.validated_at != number and number == run.clock.num_steps:
        validated(run, sets, number, stage)
    if run.saved_at != number or run.saved_decisions != len(run.decisions):  # also stop_at_step = 0: the imported model
        saved(run, number)
    return "finished" if number == run.clock.num_steps else "preempted"


def _is_settled(run: Run, index: int, number: int) -> bool:
    """Whether a stage that ended with the checkpoint has nothing left to ask."""
    stage = run.recipe.stages[index]
    asked = any(d["kind"] == "gates" and d["step"] == number and d["action"] != "stop" for d in run.decisions)
    return asked or not stage.gates


def _steps(run: Run, index: int, done: int, until: int, sets: ValidationSets | None, profiler: Profiler) -> int:
    """The steps of one stage from `done` + 1 to `until`, or to where a stop was asked. Returns the last one's number."""
    recipe, stage = run.recipe, run.recipe.stages[index]
    layout, mesh = recipe.layout_of(stage), run.model.mesh
    metrics = StepMetrics(run.model.config, mesh.layout.world_size, run.facts["peak_flops"])
    frozen = frozenset(frozen_names(stage.freeze, run.model.config))
    console, first = Console(run.clock, recipe.log.every_steps), done + 1
    waiting = _rows(run, index, first, until)
    for number in range(first, until + 1):
        step = run.clock.step(number)
        profiler.before(number)
        begin = time.monotonic()
        batch = next(waiting)
        data_seconds = time.monotonic() - begin
        lr = rate_of_step(recipe, run.clock, step)
        update = _update_of(recipe, step, lr, frozen)
        loss, norm = train_step(
            run.model, run.optimizer, batch.micro_batches, batch.num_labels, recipe.reduction(layout), update
        )
        loss, norm = loss.item(), norm.item()  # the step's one wait for the device
        if number == first:
            run.timeout = recipe.health.step_timeout_seconds
            set_timeout(run.timeout)
        row = metrics.row(
            step,
            stage.name,
            loss,
            norm,
            lr,
            batch.num_pairs,
            domain_tokens(recipe, run.clock, run.orders, number),
            time.monotonic() - begin,
            data_seconds,
            memory_gib(mesh.device),
        )
        profiler.after(number)
        run.directory.metrics(row)
        if run.board:
            run.board.step(row)
        if line := console.line(row):
            log.info(line)
        if number % 100 == 0:
            gc.collect()
        if sets and _due(recipe, step):
            validated(run, sets, number, stage)
        if mixture_is_due(run, step):
            adjust_mixture(run, step)
            waiting.close()
            waiting = _rows(run, index, number + 1, until)
        snapshot(run, step)
        run.stopping, failed = run.asked()
        if failed:
            run.saver.raise_error()
        told_of_saves(run)
        last = number == until or run.stopping
        if number % recipe.checkpoint.every_steps == 0 or run.stopping or (last and number in _final(run, stage)):
            saved(run, number, wait=last)
        if run.stopping:
            return number
    return until


def _final(run: Run, stage: Stage) -> tuple[int, ...]:
    """Steps that are saved in any case: the last one, of the run or of this start. Where gates or an average follow, they come first."""
    if stage.gates or stage.average:
        return ()
    return run.clock.num_steps, run.recipe.run.stop_at_step or run.clock.num_steps


def _rows(run: Run, index: int, first: int, until: int) -> Iterator[StepData]:
    """The rows of steps `first` to `until` for this rank, a few steps ahead."""
    recipe, stage, clock, mesh = run.recipe, run.recipe.stages[index], run.clock, run.model.mesh
    data = StageData(recipe, stage, run.orders[index], run.domains, run.pad_id, run.model.config.vocab_size)
    rows = recipe.parallel_of(stage).micro_batch_tokens // stage.seq_len

    def make(number: int) -> StepData:
        step = clock.step(number)
        return load_step(data, step.first_sequence, step.rows, mesh.layout.data, mesh.data_rank, rows)

    return prefetch(make, range(first, until + 1))


def _update_of(recipe: Recipe, step: Step, lr: float, frozen: frozenset[str]) -> Update:
    stage, optimizer = recipe.stages[step.stage], recipe.optimizer
    either = lambda ours, general: general if ours is None else ours
    return Update(
        lr,
        either(stage.betas, optimizer.betas),
        optimizer.eps,
        either(stage.weight_decay, optimizer.weight_decay),
        either(stage.clip_norm, optimizer.clip_norm),
        frozen,
    )


def _enter_stage(run: Run, index: int) -> None:
    """Rotary embedding and checkpointing of a stage; changes of the rotary embedding hold on through later stages."""
    config = config_of_stage(config_of(run.recipe.model), run.recipe.stages, index)
    run.model.set_rope(config.rope)
    run.model.set_activation_checkpointing(run.recipe.parallel_of(run.recipe.stages[index]).activation_checkpointing)
    first = run.clock.stage_first_token[index]
    run.directory.event(
        "stage",
        run.clock.stage_numbers(index)[0] - 1,
        first,
        stage=run.recipe.stages[index].name,
        rope={"theta": config.rope.theta, "type": config.rope.type, **config.rope.fields},
    )


def _due(recipe: Recipe, step: Step) -> bool:
    """Whether a validation interval ends in this step."""
    intervals = [v.every_tokens for v in recipe.validation if v.every_tokens]
    return any(step.tokens_before // n != step.tokens_after // n for n in intervals)
