"""The run: start or resume, every step of the clock, validation, checkpoints, and what is written of it.

Which step comes next, its rows, its rate and its stage are functions of the step's number (config/clock.py); the loop
holds no schedule of its own. It begins at the step after the checkpoint's.
"""

import gc
import json
import os
import platform
import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megacpt import log
from megacpt.checkpoint.export import HUGGING_FACE
from megacpt.checkpoint.load import load
from megacpt.checkpoint.manifest import State, directory_name, newest_sound
from megacpt.checkpoint.save import prune, save, tensors_of
from megacpt.config.clock import Clock, Step
from megacpt.config.layout import resolve_layout
from megacpt.config.load import load_recipe, plain
from megacpt.config.recipe import Recipe, Stage
from megacpt.data.loader import StageData, domain_tokens, load_step, mixtures, open_domains, pad_token, prefetch
from megacpt.errors import ConfigError, DataError, MegacptError
from megacpt.evaluate.validation import ValidationSets, validate
from megacpt.model.build import build_model, chosen_kernels, sharding_of
from megacpt.model.config import LlamaConfig, change_rope, config_of
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
from megacpt.train.metrics import Console, StepMetrics, TensorBoard, memory_gib, peak_flops
from megacpt.train.profile import Profiler
from megacpt.train.run_directory import RunDirectory, changes_on_resume
from megacpt.train.step import Update, compute_dtype, train_step


@dataclass
class Run:
    """Everything a step needs."""

    recipe: Recipe
    clock: Clock
    model: Llama
    optimizer: AdamW
    directory: RunDirectory
    fingerprints: dict[str, str]
    facts: dict
    pad_id: int
    stop: "StopRequest"
    board: TensorBoard | None = None
    validated_at: int = -1
    timeout: float = 0.0


class StopRequest:
    """SIGTERM, SIGUSR1 or SIGINT ask for a checkpoint at the next step boundary; a second one leaves at once."""

    def __init__(self) -> None:
        self.signal: str | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame) -> None:
        if self.signal:
            os._exit(75)
        self.signal = signal.Signals(number).name
        log.info(f"{self.signal}: saving after this step; once more to leave at once.")

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked. Collective."""
        if dist.get_world_size() == 1:
            return self.signal is not None
        flag = torch.tensor(float(self.signal is not None), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


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
    clock = Clock(recipe)
    config = config_of(recipe.model)
    found = newest_sound(directory.checkpoints)
    mode = _start_mode(recipe, found is not None)
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
        clock,
        model,
        optimizer,
        directory,
        fingerprints,
        facts,
        pad_token(domains, config.eos_token_id),
        StopRequest(),
        timeout=recipe.health.start_timeout_seconds,
    )
    if recipe.log.tensorboard and directory.write:
        run.board = TensorBoard(directory.path / "tb", layout.world_size, done + 1 if done else None)
    try:
        return _steps(run, domains, done)
    finally:
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
    state = torch.bfloat16 if recipe.optimizer.state_dtype == "bfloat16" else None
    return model, AdamW(dict(model.named_parameters()), kernels.optimizer, state, recipe.run.seed)


def _relayout(run: Run, index: int, number: int) -> None:
    """The model under the layout of another stage, through a checkpoint of the step that is done."""
    stage, before = run.recipe.stages[index], run.model
    old, config, compute, device = before.mesh.layout, before.config, before.compute, before.mesh.device
    path, updates = run.directory.checkpoints / directory_name(number), run.optimizer.num_updates
    if not path.is_dir():
        _save(run, number)
    run.model = run.optimizer = before = None  # the old shards leave memory before the new ones come
    gc.collect()
    restart_process_group(device, index, run.recipe.health.start_timeout_seconds)
    run.timeout = run.recipe.health.start_timeout_seconds
    run.model, run.optimizer = _build(run.recipe, stage, config, compute, device)
    load(path, tensors_of(run.optimizer.parameters, run.optimizer))
    run.optimizer.num_updates = updates
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


def _steps(run: Run, domains: dict, done: int) -> str:
    recipe, clock = run.recipe, run.clock
    orders = mixtures(recipe, clock)
    profiler = Profiler(recipe.profile, run.directory.path / "profile", dist.get_rank())
    metrics = StepMetrics(run.model.config, run.model.mesh.layout.world_size, run.facts["peak_flops"])
    console = Console(clock, recipe.log.every_steps)
    stop_at = min(clock.num_steps, recipe.run.stop_at_step if recipe.run.stop_at_step is not None else clock.num_steps)
    saved = done if run.facts["start"] == "resume" else None
    layout = recipe.layout_of(recipe.stages[clock.step(min(clock.num_steps, done + 1)).stage])
    gc.collect()
    gc.disable()  # a collection in one rank's step is a stall of all; it runs at intervals, on all at once
    try:
        for index, stage in enumerate(recipe.stages):
            numbers = [n for n in _stage_numbers(clock, index) if done < n <= stop_at]
            if numbers and recipe.layout_of(stage) != layout:
                model = mesh = None  # so that the old shards can go
                _relayout(run, index, numbers[0] - 1)
                layout, saved = recipe.layout_of(stage), numbers[0] - 1
            model, mesh = run.model, run.model.mesh
            if numbers or (done == 0 and index == 0):
                _enter_stage(run, index)
                sets = ValidationSets(recipe, stage.seq_len, domains) if recipe.validation else None
            if done == 0 and index == 0 and sets:
                _validate(run, sets, 0, stage)
            if not numbers:
                continue
            data = StageData(recipe, stage, orders[index], domains, run.pad_id, model.config.vocab_size)
            rows_per_micro_batch = recipe.parallel_of(stage).micro_batch_tokens // stage.seq_len

            def make(number: int, data=data, rows=rows_per_micro_batch, mesh=mesh):
                step = clock.step(number)
                return load_step(data, step.first_sequence, step.rows, mesh.layout.data, mesh.data_rank, rows)

            waiting = prefetch(make, range(numbers[0], numbers[-1] + 1))
            for number in numbers:
                step = clock.step(number)
                profiler.before(number)
                begin = time.monotonic()
                batch = next(waiting)
                data_seconds = time.monotonic() - begin
                lr = rate_of_step(recipe, clock, step)
                reduce = recipe.reduction(layout)
                loss, norm = train_step(
                    model, run.optimizer, batch.micro_batches, batch.num_labels, reduce, _update_of(recipe, step, lr)
                )
                loss, norm = loss.item(), norm.item()  # the step's one wait for the device
                if number == numbers[0]:
                    run.timeout = recipe.health.step_timeout_seconds
                    set_timeout(run.timeout)
                row = metrics.row(
                    step,
                    stage.name,
                    loss,
                    norm,
                    lr,
                    batch.num_pairs,
                    domain_tokens(recipe, clock, orders, number),
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
                    _validate(run, sets, number, stage)
                stopping = run.stop.agreed(mesh.device)
                if number % recipe.checkpoint.every_steps == 0 or number == stop_at or stopping:
                    _save(run, number)
                    saved = number
                if stopping:
                    run.directory.event("stopped", number, step.tokens_after, signal=run.stop.signal)
                    return "preempted"
            if sets and run.validated_at != numbers[-1] and numbers[-1] == clock.num_steps:
                _validate(run, sets, numbers[-1], stage)
    finally:
        gc.enable()
        profiler.close()
    if saved is None:  # stop_at_step = 0: the imported model, as a checkpoint
        _save(run, done)
    return "finished" if stop_at == clock.num_steps else "preempted"


def _stage_numbers(clock: Clock, index: int) -> range:
    first = 1 + sum(clock.stage_steps(i) for i in range(index))
    return range(first, first + clock.stage_steps(index))


def _update_of(recipe: Recipe, step: Step, lr: float) -> Update:
    stage, optimizer = recipe.stages[step.stage], recipe.optimizer
    either = lambda ours, general: general if ours is None else ours
    return Update(
        lr,
        either(stage.betas, optimizer.betas),
        optimizer.eps,
        either(stage.weight_decay, optimizer.weight_decay),
        either(stage.clip_norm, optimizer.clip_norm),
    )


def _enter_stage(run: Run, index: int) -> None:
    """Rotary embedding and checkpointing of a stage; changes of the rotary embedding hold on through later stages."""
    config = config_of(run.recipe.model)
    for stage in run.recipe.stages[: index + 1]:
        config = change_rope(config, stage.rope)
    run.model.set_rope(config.rope)
    run.model.set_activation_checkpointing(run.recipe.parallel_of(run.recipe.stages[index]).activation_checkpointing)
    first = run.clock.stage_first_token[index]
    run.directory.event(
        "stage",
        _stage_numbers(run.clock, index)[0] - 1,
        first,
        stage=run.recipe.stages[index].name,
        rope={"theta": config.rope.theta, "type": config.rope.type, **config.rope.fields},
    )


def _due(recipe: Recipe, step: Step) -> bool:
    """Whether a validation interval ends in this step."""
    intervals = [v.every_tokens for v in recipe.validation if v.every_tokens]
    return any(step.tokens_before // n != step.tokens_after // n for n in intervals)


def _validate(run: Run, sets: ValidationSets, number: int, stage) -> None:
    rows = run.recipe.parallel_of(stage).micro_batch_tokens // stage.seq_len
    with _slow_phase(run):
        losses = validate(run.model, sets, rows, run.pad_id)
    run.validated_at = number
    run.directory.event("validation", number, run.clock.tokens_at(number), losses=losses)
    if run.board:
        run.board.validation(losses, number)
    log.info("validation  " + "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))


@contextmanager
def _slow_phase(run: Run):
    """Ranks may wait long for each other: while rank 0 writes, or one reads slowly."""
    set_timeout(run.recipe.health.save_timeout_seconds)
    try:
        yield
    finally:
        set_timeout(run.timeout)


def _save(run: Run, number: int) -> None:
    stage = run.recipe.stages[run.clock.step(max(1, number)).stage]
    state = State(number, run.clock.tokens_at(number), run.optimizer.num_updates, stage.name, [], run.fingerprints)
    with _slow_phase(run):
        seconds = save(run.directory.checkpoints, tensors_of(run.optimizer.parameters, run.optimizer), state, run.facts)
        if dist.get_rank() == 0:
            keep = run.recipe.checkpoint
            removed = prune(run.directory.checkpoints, keep.keep_last, keep.keep_every_steps)
            run.directory.event("saved", number, state.tokens, seconds=round(seconds, 3), removed=removed)
        dist.barrier()  # the others wait for rank 0 here, not in the next step
    log.info(f"saved {Path(run.directory.checkpoints).name}/step-{number:08d} in {seconds:.1f} s")
