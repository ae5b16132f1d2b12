"""Saving: Distributed Checkpoint into .tmp-step-…, manifest last, one rename, then retention."""

import os
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from megacpt.checkpoint.manifest import State, directory_name, list_steps, sync_directory, write_manifest


def tensors_of(parameters: dict, optimizer) -> dict[str, Any]:
    """What is stored: parameters under their Hugging Face names, moments beside them."""
    tree: dict[str, Any] = {"model": {name: parameter.detach() for name, parameter in parameters.items()}}
    if optimizer is not None:
        tree["optim"] = {"exp_avg": optimizer.exp_avg, "exp_avg_sq": optimizer.exp_avg_sq}
    return tree


def save(checkpoints: Path, tensors: dict[str, Any], state: State, facts: dict[str, Any]) -> float:
    """Publishes a checkpoint; all ranks call it. Returns the seconds it took."""
    begin = time.monotonic()
    partial = begin_save(checkpoints, state.step)
    write_tensors(partial, tensors)
    dist.barrier()
    if dist.get_rank() == 0:
        publish(checkpoints, partial, state, facts)
    dist.barrier()
    return time.monotonic() - begin


def begin_save(checkpoints: Path, step: int, group: dist.ProcessGroup | None = None) -> Path:
    """An empty folder to write into, on all ranks."""
    partial = checkpoints / f".tmp-{directory_name(step)}"
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier(group)
    return partial


def write_tensors(partial: Path, tensors: dict[str, Any], group: dist.ProcessGroup | None = None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = dcp.FileSystemWriter(partial, sync_files=False, overwrite=True)
        dcp.save(tensors, storage_writer=writer, process_group=group)


def publish(checkpoints: Path, partial: Path, state: State, facts: dict[str, Any]) -> None:
    """Manifest, then one rename. On rank 0, when all have written."""
    final = checkpoints / directory_name(state.step)
    write_manifest(partial, state, facts)
    old = checkpoints / f".tmp-old-{final.name}"
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():  # the same step again, with more decided: never half removed under its name
        os.rename(final, old)
    os.rename(partial, final)
    sync_directory(checkpoints)
    shutil.rmtree(old, ignore_errors=True)


def prune(checkpoints: Path, keep_last: int, keep_every_steps: int | None) -> list[int]:
    """Removes what retention does not keep, oldest first, after a newer one was published. Returns the steps removed."""
    steps = list_steps(checkpoints)
    keep = set(steps[-keep_last:]) | {s for s in steps if keep_every_steps and s and s % keep_every_steps == 0}
    removed = [step for step in steps if step not in keep]
    for step in removed:
        directory = checkpoints / directory_name(step)
        doomed = checkpoints / f".tmp-removed-{directory.name}"
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(directory, doomed)  # never half a checkpoint under its name
        shutil.rmtree(doomed)
    return removed
