"""The run: every step of the clock, validation, checkpoints, and what is written of it.

Which step comes next, its rows, its rate and its stage are functions of the step's number (config/clock.py); the loop
holds no schedule of its own. It begins at the step after the checkpoint's.
"""

import errno
import gc
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from megacpt import heartbeat, log
from megacpt.checkpoint.load import load
from megacpt.checkpoint.manifest import directory_name
from megacpt.checkpoint.save import recover_interrupted_saves, tensors_of
from megacpt.config.clock import Step
from megacpt.config.model import config_in_stage, frozen_names
from megacpt.config.recipe import Recipe
from megacpt.config.run_layout import PROFILE
from megacpt.config.stage import Stage
from megacpt.data.loader import StageData, StepData, domain_tokens, load_step, prefetch
from megacpt.errors import ConfigError, LeaseError, MegacptError, NumbersError, SaveError
from megacpt.evaluate.validation import ValidationSets
from megacpt.files import DISK_ERRORS, disk_told
from megacpt.model.inputs import step_to_host
from megacpt.optim.schedule import rate_of_step
from megacpt.parallel.mesh import device_of_process, picture, restart_process_group, share, start_process_group
from megacpt.survive import watchdog
from megacpt.survive.health import Stragglers, check_finite, check_replicas, limits
from megacpt.survive.lease import Keeper, agents, attempt_name
from megacpt.survive.run_directory import RunDirectory
from megacpt.train.job import Run, StopRequest, allowed, saved, told_of_saves, validated
from megacpt.train.metrics import Console, StepMetrics, memory_gib
from megacpt.train.profile import Profiler
from megacpt.train.recover import Rollback, go_back, judged
from megacpt.train.stages import adjust_mixture, average_stage, mixture_is_due, pass_gates, snapshot, take_baseline
from megacpt.train.start import build, open_run
from megacpt.train.step import Update, train_step


def train(recipe: Recipe) -> str:
    """Runs a recipe to its end or to a stop request. Returns the status: finished or preempted."""
    device = device_of_process()
    if armed := os.environ.get("MEGACPT_FAULT"):  # by a test
        from megacpt import faults

        faults.arm(armed)
    watch = watchdog.start(Path(recipe.directory), recipe.health.watchdog)
    heartbeat.set_deadline("start", recipe.health.start_timeout_seconds)
    stop, directory = StopRequest(), None
    keeper = Keeper(stop.ask, [] if recipe.health.watchdog else agents())
    try:
        start_process_group(device, recipe.health.start_timeout_seconds)
        watch.joined(share("attempt", attempt_name()))
        directory = RunDirectory(recipe.directory, dist.get_rank() == 0, watch.attempt)
        _own(directory)
        keeper.lease = directory.lease
        try:
            status = _train(recipe, directory, device, stop)
        except BaseException as error:
            directory.failed(error)
            raise
        directory.status(status, 0, signal=stop.signal or ("on another rank" if stop.agreed else None))
        dist.destroy_process_group()
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            error = SaveError(disk_told(error))
        watch.failed(error)
        raise error
    finally:
        keeper.close()
        stop.close()
        if directory:
            directory.close()
    watch.done()
    return status


def _own(directory: RunDirectory) -> None:
    """Makes this job the owner of the run's folder, without what a kill left. All ranks raise what is wrong with it."""
    kind, told = "", ""
    try:
        if directory.write:
            directory.make()
            recover_interrupted_saves(directory.checkpoints)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            kind, told = "full", disk_told(error, directory.path)
        else:
            why = f"cannot be written ({error.strerror or error}). Choose another, or make it writable."
            kind, told = "config", f"run.directory: {directory.path} {why}"
    except ConfigError as error:
        kind, told = "config", "\n".join(error.problems)
    except LeaseError as error:
        kind, told = "lease", str(error)
    kind, _, told = share("directory", f"{kind}:{told}").partition(":")
    if kind == "config":
        raise ConfigError(told.split("\n"))
    if kind:
        raise {"lease": LeaseError, "full": SaveError}[kind](told)


def _train(recipe: Recipe, directory: RunDirectory, device: torch.device, stop: StopRequest) -> str:
    rollbacks = 0
    while True:
        allowed(recipe, "start")
        run = open_run(recipe, directory, device, stop, again=rollbacks > 0)
        gc.collect()
        gc.disable()  # a collection in one rank's step is a stall of all; it runs at intervals, on all at once
        try:
            status = _stages(run)
        except Rollback:
            status, rollbacks = None, rollbacks + 1
        except MegacptError:  # of all ranks alike, or this process ends and takes the others with it
            run.saver.wait()
            raise
        finally:
            gc.enable()
        run.saver.close()
        if status:
            return status
        del run
        gc.collect()
        restart_process_group(device, f"rollback{rollbacks}", recipe.health.start_timeout_seconds)


def _relayout(run: Run, index: int, number: int) -> None:
    """The model under the layout of another stage, through a checkpoint of the step that is done."""
    stage, before = run.recipe.stages[index], run.model
    old, config, compute, device = before.mesh.layout, before.config, before.compute, before.mesh.device
    path, counts = run.directory.checkpoints / directory_name(number), (run.optimizer.num_updates, run.optimizer.missed)
    run.saver.wait()
    told_of_saves(run, number, agreed=True)
    if run.saved_at != number:
        saved(run, number)
    run.saver.close()
    run.model = run.optimizer = before = None  # the old shards leave memory before the new ones come
    gc.collect()
    run.phase = "start"
    restart_process_group(device, f"layout{index}", run.recipe.health.start_timeout_seconds)
    allowed(run.recipe, run.phase)
    run.model, run.optimizer = build(run.recipe, stage, config, compute, device)
    load(path, tensors_of(run.optimizer.parameters, run.optimizer))
    run.optimizer.restore(*counts)
    run.open_saver()
    run.facts["layout"] = str(run.model.mesh.layout)
    run.directory.event("layout", number, run.clock.tokens_at(number), before=str(old), after=run.facts["layout"])
    log.info(f"from stage {stage.name} on: {picture(run.model.mesh.layout)}")


def _stages(run: Run) -> str:
    """Every stage from the step after the checkpoint's on. A stage that does not pass its gates may become longer and is run on."""
    recipe, done = run.recipe, run.began_at
    layout = recipe.layout_of(recipe.stages[run.clock.step(min(run.clock.num_steps, done + 1)).stage])
    profiler = Profiler(recipe.profile, run.directory.path / PROFILE, dist.get_rank())
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
    if number == run.clock.num_steps:
        _look_back(run)
    if sets and run.validated_at != number and number == run.clock.num_steps:
        validated(run, sets, number, stage)
    if run.saved_at != number or run.saved_decisions != len(run.decisions):  # also stop_at_step = 0: the imported model
        saved(run, number)
    return "finished" if number == run.clock.num_steps else "preempted"


def _look_back(run: Run) -> None:
    """At the run's end: were updates made?

    Raises:
        NumbersError: if none was.
    """
    if run.optimizer.num_updates == 0:
        raise NumbersError(
            f"all {run.clock.num_steps} updates of the run were skipped: it has changed nothing. Look at the data that events.jsonl names, "
            "at the learning rate and at the model's config.json, and begin a new run."
        )
    if run.skipped_in_row:
        log.warn(f"the last {run.skipped_in_row} updates of the run were skipped: evaluate the model before it is used")


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
    slow = Stragglers(mesh.device)
    for number in range(first, until + 1):
        heartbeat.reach("step.begin", number)
        step = run.clock.step(number)
        profiler.before(number)
        begin = time.monotonic()
        batch = next(waiting)
        data_seconds = time.monotonic() - begin
        lr = rate_of_step(recipe, run.clock, step)
        if number == run.clock.stage_numbers(index)[0]:
            run.accepted.clear()  # another stage, other losses
        update = _update_of(recipe, step, lr, frozen, limits(run.accepted, recipe.health))
        asks = (run.stop.signal is not None, run.saver.failed, run.directory.lost)
        reduction = recipe.reduction(layout)
        measured = train_step(run.model, run.optimizer, batch.micro_batches, batch.counts, reduction, update, asks)
        loss, norm, skipped, stop, failed, lost = measured.tolist()  # the step's one wait for the device
        if lost:
            raise LeaseError(
                f"{run.directory.path}: another job owns the run directory by now. Nothing more is written there."
            )
        seconds = time.monotonic() - begin
        if number == first:
            run.phase = "step"
            allowed(recipe, run.phase)
        why = judged(run, step, loss, norm, skipped > 0)
        slow.add(seconds, data_seconds)
        row = metrics.row(
            step,
            stage.name,
            loss,
            norm,
            lr,
            batch.num_pairs,
            domain_tokens(recipe, run.clock, run.orders, number),
            seconds,
            data_seconds,
            memory_gib(mesh.device),
            why,
            run.directory.effective(0.0 if why else seconds),
        )
        if number % recipe.health.straggler_every_steps == 0:
            row |= slow.gather()
        profiler.after(number)
        run.directory.metrics(row)
        if run.board:
            run.board.step(row)
        if line := console.line(row):
            log.info(line)
        if log.lost and not run.console_lost:
            run.console_lost = True
            run.directory.event("console_lost", number, step.tokens_after, error=log.lost)
        if why and run.skipped_in_row >= recipe.health.rollback_after:
            go_back(run, step, why)
        if number % 100 == 0:
            gc.collect()
        if number % recipe.health.checksum_every_steps == 0:
            check_finite(run.optimizer, number)
            check_replicas(run.optimizer, run.model, number)
        if sets and _due(recipe, step):
            validated(run, sets, number, stage)
        if mixture_is_due(run, step):
            adjust_mixture(run, step)
            waiting.close()
            waiting = _rows(run, index, number + 1, until)
        snapshot(run, step)
        run.stopping = run.stop.agreed = stop > 0
        if failed:
            run.saver.wait()
        told_of_saves(run, number, agreed=failed > 0)
        last = number == until or run.stopping
        due = number % recipe.checkpoint.every_steps == 0 or number == run.retry_at
        if due and run.skipped_in_row:  # what is wrong may be the weights: it is saved once an update is made again
            due, run.retry_at = False, number + 1
        if due or run.stopping or (last and number in _final(run, stage)):
            saved(run, number, wait=last, must=run.stopping or number == run.clock.num_steps)
        heartbeat.reach("step.end")
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
        loaded = load_step(data, step.first_sequence, step.rows, mesh.layout.data, mesh.data_rank, rows)
        return step_to_host(loaded, mesh)

    return prefetch(make, range(first, until + 1))


def _update_of(recipe: Recipe, step: Step, lr: float, frozen: frozenset[str], most: tuple[float, float]) -> Update:
    stage, optimizer = recipe.stages[step.stage], recipe.optimizer
    either = lambda ours, general: general if ours is None else ours
    return Update(
        lr,
        either(stage.betas, optimizer.betas),
        optimizer.eps,
        either(stage.weight_decay, optimizer.weight_decay),
        either(stage.clip_norm, optimizer.clip_norm),
        frozen,
        *most,
    )


def _enter_stage(run: Run, index: int) -> None:
    """Rotary embedding and checkpointing of a stage; changes of the rotary embedding hold on through later stages."""
    config = config_in_stage(run.model.config, run.recipe.stages, index)
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
