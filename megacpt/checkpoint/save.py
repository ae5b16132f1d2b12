"""Saving: Distributed Checkpoint into .tmp-step-…, every shard read back and compared, manifest last, one rename, then retention.

What fails on one rank fails on all, with the same message; what has been published before stays as it was.
"""

import os
import shutil
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

from megacpt import heartbeat, log
from megacpt.checkpoint.manifest import (
    MANIFEST,
    Items,
    RunState,
    check_items,
    directory_name,
    list_steps,
    read_manifest,
    write_manifest,
)
from megacpt.errors import CheckpointError, LeaseError, MegacptError, SaveError
from megacpt.files import DISK_ERRORS, describe_os_error, publish_folder, remove, restore_folders, sync_directory
from megacpt.optim.adamw import AdamW
from megacpt.parallel.sharded import copies, local_part


def tensors_of(parameters: Mapping[str, Tensor], optimizer: AdamW | None) -> dict[str, Any]:
    """What is stored: parameters under their Hugging Face names, moments beside them."""
    tree: dict[str, Any] = {"model": {name: parameter.detach() for name, parameter in parameters.items()}}
    if optimizer is not None:
        tree["optim"] = {"exp_avg": optimizer.exp_avg, "exp_avg_sq": optimizer.exp_avg_sq}
    return tree


def save(
    checkpoints: Path,
    tensors: dict[str, Any],
    state: RunState,
    facts: dict[str, Any],
    group: dist.ProcessGroup | None = None,
    how: str = "rename",
    prune: Callable[[], list[int]] = list,
    fence: Callable[[], None] = lambda: None,
) -> tuple[float, list[int]]:
    """Publishes a checkpoint; all ranks call it. Returns (the seconds it took, what `prune` removed).

    Args:
        group: for the ranks' agreement. how: "rename" or "manifest", `checkpoint.publish`.
        prune: rank 0 calls it when the new checkpoint is there.
        fence: raises on rank 0 if the run directory is another job's by now.
    Raises:
        SaveError: on all ranks, if anything went wrong on any. Nothing was published.
    """
    begin = time.monotonic()
    final = checkpoints / directory_name(state.step)
    partial = checkpoints / f".tmp-{final.name}" if how == "rename" else final
    removed: list[int] = []
    try:
        needed = sum(_gathered(_stored_bytes(tensors), group))
        with all_ranks_or_none(group):
            if dist.get_rank() == 0:
                fence()
                _prepare_folder(partial, needed)
            heartbeat.reach("save.staged", state.step)
        writer = CheckedWriter(partial)
        with (
            all_ranks_or_none(group),
            warnings.catch_warnings(),
        ):  # what fails inside, fails on all ranks: it has collectives
            warnings.simplefilter("ignore")
            dcp.save(tensors, storage_writer=writer, process_group=group)
        with all_ranks_or_none(group):
            heartbeat.reach("save.after_shards", state.step, lambda: partial)
            check_items(partial, writer.written)
        with all_ranks_or_none(group):
            if dist.get_rank() == 0:
                heartbeat.reach("save.before_manifest", state.step)
                fence()
                write_manifest(partial, state, facts, writer.items)
                heartbeat.reach("save.before_rename", state.step)
                if how == "rename":
                    fence()
                    publish_folder(partial, final)
                sync_directory(checkpoints)
                heartbeat.reach("save.after_rename", state.step)
    except FailedOnSomeRank as error:
        if dist.get_rank() == 0 and how == "rename" and _is_ours(fence):
            remove(partial)  # the room is needed
        raise SaveError(f"the checkpoint of step {state.step} was not saved: {error}") from None
    if dist.get_rank() == 0:
        try:
            heartbeat.reach("save.before_prune", state.step)
            fence()
            removed = prune()
        except (OSError, LeaseError) as error:  # there is a checkpoint too many
            log.warn(f"{checkpoints}: an old checkpoint could not be removed: {error}")
    return time.monotonic() - begin, removed


def _is_ours(fence: Callable[[], None]) -> bool:
    try:
        fence()
    except (OSError, LeaseError):
        return False
    return True


class FailedOnSomeRank(SaveError):
    """What went wrong, on which ranks: the same on all."""


@contextmanager
def all_ranks_or_none(group: dist.ProcessGroup | None) -> Iterator[None]:
    """A part of the work that succeeds or fails on all ranks. It holds no collective, or one rank would leave the others there."""
    problem = None
    try:
        yield
    except (
        dcp.api.CheckpointException
    ) as error:  # it is the same on all ranks, with a cause for each that failed: each tells its own
        mine = error.failures.get(dist.get_rank(group)) if error.failures else (error,)
        problem = _describe(mine[0]) if mine else None
    except Exception as error:
        problem = _describe(error)
    found = [f"rank {rank}: {text}" for rank, text in enumerate(_gathered(problem, group)) if text]
    if found:
        raise FailedOnSomeRank("; ".join(found[:4]) + (f"; {len(found) - 4} more" if len(found) > 4 else ""))


def _describe(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno in DISK_ERRORS and error.filename:
        return describe_os_error(error)
    return str(error) if isinstance(error, MegacptError) else f"{type(error).__name__}: {error}"


def _gathered(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, value, group=group)
    return everyone


def _stored_bytes(tree: dict[str, Any]) -> float:
    """This rank's share of what is stored: a part that n ranks hold counts 1 / n."""
    total = 0.0
    for value in tree.values():
        if isinstance(value, dict):
            total += _stored_bytes(value)
        elif isinstance(value, DTensor):
            total += local_part(value).nbytes / copies(value)
        else:
            total += value.nbytes
    return total


def _prepare_folder(partial: Path, needed: float) -> None:
    """An empty folder on a disk with room."""
    if (partial / MANIFEST).exists():  # published by its manifest: it is none any more from here on
        os.remove(partial / MANIFEST)
        sync_directory(partial)
    remove(partial)
    partial.mkdir(parents=True)
    free, wanted = shutil.disk_usage(partial).free, int(needed * 1.05) + (1 << 20)
    if free < wanted:
        raise CheckpointError(
            f"{partial.parent}: a checkpoint needs {wanted:,} bytes, free are {free:,}. Make room, or lower checkpoint.keep_last."
        )


@dataclass(frozen=True)
class _Checked(WriteResult):
    """What was written, with its checksum."""

    crc32: int = 0


class _Summed:
    """A file whose items, between two calls of tell, are summed up on their way. What the disk said is kept: torch's writer of archives
    makes another error of it."""

    def __init__(self, file):
        self.file, self.at, self.begin, self.crc, self.sums = file, 0, 0, 0, {}
        self.error: OSError | None = None

    def write(self, content) -> int:
        self.crc = zlib.crc32(content, self.crc)
        try:
            count = self.file.write(content)
        except OSError as error:
            self.error = error
            raise
        self.at += count
        return count

    def tell(self) -> int:
        if self.at > self.begin:
            self.sums[self.begin] = self.at - self.begin, self.crc
        self.begin, self.crc = self.at, 0
        return self.at

    def close(self) -> None:
        """Down to the disk, and out of the memory: what is compared next comes from the disk."""
        if not self.file.closed:
            self.file.flush()
            os.fsync(self.file.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self.file.close()

    def __getattr__(self, name: str):
        return getattr(self.file, name)


class _SummedFiles(dcp.filesystem.FileSystem):
    def __init__(self):
        self.opened: dict[str, _Summed] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:  # all of a file that torch uses
        with super().create_stream(path, mode) as file:
            stream = _Summed(file)
            self.opened[Path(path).name] = stream
            try:
                yield stream
                stream.close()
            except Exception as error:
                cause = stream.error or error
                if not isinstance(cause, OSError):
                    raise
                with suppress(OSError):  # what is still in its buffer finds no room either
                    file.close()
                raise CheckpointError(
                    f"{describe_os_error(cause, path)} {stream.at:,} bytes of it were written."
                ) from None


class CheckedWriter(dcp.FileSystemWriter):
    """Distributed Checkpoint's writer, with the CRC32 of each item as it went to the file.

    Attributes:
        written: items of this rank. items: of all ranks, on the coordinator, after the save.
    """

    def __init__(self, path: Path):
        # Nothing is copied ahead: that is for tensors on a GPU, and makes the thread wait again and again for all that its stream has
        # to do, of which the training's own is one, though what is saved in the background lies in host memory.
        super().__init__(path, sync_files=False, overwrite=True, per_thread_copy_ahead=0)
        self.fs = _SummedFiles()
        self.written: Items = {}
        self.items: Items = {}

    def write_data(self, plan, planner):
        results = super().write_data(plan, planner).wait()
        checked = []
        for result in results:
            info = result.storage_data
            size, crc = self.fs.opened[info.relative_path].sums[info.offset]
            if size != info.length:
                raise CheckpointError(f"{info.relative_path}: wrote {size} bytes for an item of {info.length}.")
            checked.append(_Checked(result.index, result.size_in_bytes, info, crc))
            self.written.setdefault(info.relative_path, []).append((info.offset, info.length, crc))
        future: torch.futures.Future = torch.futures.Future()
        future.set_result(checked)
        return future

    def finish(self, metadata, results) -> None:
        super().finish(metadata, results)
        for result in (result for some in results for result in some):
            assert isinstance(result, _Checked), "write_data makes no others"
            info = result.storage_data
            self.items.setdefault(info.relative_path, []).append((info.offset, info.length, result.crc32))


def prune(checkpoints: Path, keep_last: int, keep_every_steps: int | None) -> list[int]:
    """Removes what retention does not keep, oldest first. Returns the steps removed. What is not whole counts for nothing, and goes once
    a newer one is whole. The newest that does not stand in a streak of skipped updates stays: a rollback ends there."""
    steps, sound, good = list_steps(checkpoints), [], []
    for step in steps:
        try:
            state = read_manifest(checkpoints / directory_name(step)).state
        except CheckpointError:
            continue
        sound.append(step)
        if not state.skipped_in_row:
            good.append(step)
    keep = {*sound[-keep_last:], *good[-1:]} | {s for s in sound if keep_every_steps and s % keep_every_steps == 0}
    removed = [step for step in steps if sound and step < sound[-1] and step not in keep]
    for step in removed:
        remove_checkpoint(checkpoints, step)
    return removed


def remove_checkpoint(checkpoints: Path, step: int) -> None:
    """Its manifest first: half a checkpoint is none."""
    directory = checkpoints / directory_name(step)
    (directory / MANIFEST).unlink(missing_ok=True)
    sync_directory(directory)
    shutil.rmtree(directory)


def recover_interrupted_saves(checkpoints: Path) -> None:
    """What a kill left: a checkpoint that was about to be replaced comes back, unfinished ones go. One process, before others look."""
    restore_folders(checkpoints)
    for left in checkpoints.glob(".tmp-*"):
        remove(left)
