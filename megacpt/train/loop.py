"""A run from its start to its end: who owns its directory, which ranks belong to it, and what becomes of an error. What happens in
between is a list of events (train/drive.py).
"""

import errno
import gc
import os
from pathlib import Path

import torch
import torch.distributed as dist

from megacpt import heartbeat
from megacpt.checkpoint.save import recover_interrupted_saves
from megacpt.config.recipe import Recipe
from megacpt.errors import ConfigError, LeaseError, MegacptError, SaveError
from megacpt.files import DISK_ERRORS, describe_os_error
from megacpt.parallel.mesh import device_of_process, restart_process_group, share, start_process_group
from megacpt.survive import watchdog
from megacpt.survive.lease import Keeper, agents, attempt_name
from megacpt.survive.recover import Rollback
from megacpt.survive.run_directory import RunDirectory
from megacpt.train.drive import drive
from megacpt.train.session import set_phase_timeout
from megacpt.train.start import open_session
from megacpt.train.stop import StopRequest


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
        watch.join(share("attempt", attempt_name()))
        directory = RunDirectory(recipe.directory, dist.get_rank() == 0, watch.attempt)
        _own(directory)
        keeper.lease = directory.lease
        try:
            status = _train(recipe, directory, device, stop)
        except BaseException as error:
            directory.record_failure(error)
            raise
        directory.status(status, 0, signal=stop.signal or ("on another rank" if stop.agreed else None))
        dist.destroy_process_group()
    except BaseException as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            error = SaveError(describe_os_error(error))
        watch.report_failure(error)
        raise error
    finally:
        keeper.close()
        stop.close()
        if directory:
            directory.close()
    watch.report_done()
    return status


def _own(directory: RunDirectory) -> None:
    """Makes this job the owner of the run's folder, without what a kill left. All ranks raise what is wrong with it."""
    kind, text = "", ""
    try:
        if directory.write:
            directory.make()
            recover_interrupted_saves(directory.checkpoints)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            kind, text = "full", describe_os_error(error, directory.path)
        else:
            why = f"cannot be written ({error.strerror or error}). Choose another, or make it writable."
            kind, text = "config", f"run.directory: {directory.path} {why}"
    except ConfigError as error:
        kind, text = "config", "\n".join(map(str, error.problems))
    except LeaseError as error:
        kind, text = "lease", str(error)
    kind, _, text = share("directory", f"{kind}:{text}").partition(":")
    if kind == "config":
        raise ConfigError(text.split("\n"))
    if kind:
        raise {"lease": LeaseError, "full": SaveError}[kind](text)


def _train(recipe: Recipe, directory: RunDirectory, device: torch.device, stop: StopRequest) -> str:
    rollbacks = 0
    while True:
        set_phase_timeout(recipe.health, "start")
        session = open_session(recipe, directory, device, stop, again=rollbacks > 0)
        gc.collect()
        gc.disable()  # a collection in one rank's step is a stall of all; it runs at intervals, on all at once
        try:
            status = drive(session)
        except Rollback:
            status, rollbacks = None, rollbacks + 1
        except MegacptError:  # of all ranks alike, or this process ends and takes the others with it
            session.saver.wait()
            raise
        finally:
            gc.enable()
            session.drop_rows()
            session.profiler.close()
        session.saver.close()
        if status:
            return status
        del session
        gc.collect()
        restart_process_group(device, f"rollback{rollbacks}", recipe.health.start_timeout_seconds)
