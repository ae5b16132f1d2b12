"""Saving behind the training: tensors are copied to host memory, the rest happens in a thread on a process group of its own.

The copies stay: a second save writes into the same host memory, after the first has ended.
"""

import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from megacpt.checkpoint.manifest import State
from megacpt.checkpoint.save import begin_save, publish, write_tensors
from megacpt.errors import CheckpointError


class BackgroundSaver:
    """One save at a time; all ranks make one and call it alike.

    Args:
        keep: removes old checkpoints after a save; returns their steps. Rank 0 calls it.
    """

    def __init__(self, keep):
        self.keep = keep
        self.group: dist.ProcessGroup | None = dist.new_group(backend="gloo")
        self.host: dict[str, Tensor] = {}
        self.thread: threading.Thread | None = None
        self.error: str | None = None
        self.published: list[tuple[State, float, list[int]]] = []
        """What has been published since the last look: state, seconds, steps removed."""

    def start(self, checkpoints: Path, tensors: dict[str, Any], state: State, facts: dict[str, Any]) -> float:
        """Copies and begins to write; waits first for a save that is still under way. Returns the seconds training stood still."""
        begin = time.monotonic()
        self.wait()
        partial = begin_save(checkpoints, state.step, self.group)
        staged = self._staged(tensors)
        self.thread = threading.Thread(
            target=self._work, args=(checkpoints, partial, staged, state, facts, begin), name="save", daemon=True
        )
        self.thread.start()
        return time.monotonic() - begin

    def wait(self) -> None:
        """Until nothing is under way."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def close(self) -> None:
        """Waits, and lets go of the process group and the host memory."""
        self.wait()
        self.group, self.host = None, {}

    def _staged(self, tree: dict[str, Any], path: str = "") -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in tree.items():
            name = f"{path}/{key}"
            if isinstance(value, dict):
                out[key] = self._staged(value, name)
                continue
            local = value._local_tensor if isinstance(value, DTensor) else value
            if name not in self.host or self.host[name].shape != local.shape:
                self.host[name] = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
            self.host[name].copy_(local, non_blocking=True)
            out[key] = (
                DTensor(self.host[name], value._spec, requires_grad=False)
                if isinstance(value, DTensor)
                else self.host[name]
            )
        if not path and torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return out

    def _work(self, checkpoints: Path, partial: Path, staged: dict, state: State, facts: dict, begin: float) -> None:
        problem, removed = None, []
        try:
            write_tensors(partial, staged, self.group)
        except Exception as error:  # it is raised in the training, on all ranks
            problem = f"{type(error).__name__}: {error}"
        try:
            problem = _first(problem, self.group)
            if problem is None and dist.get_rank() == 0:
                try:
                    publish(checkpoints, partial, state, facts)
                    removed = self.keep()
                except Exception as error:
                    problem = f"{type(error).__name__}: {error}"
            elif problem is not None:
                raise CheckpointError(problem)
            problem = _first(problem, self.group)
        except CheckpointError as error:
            problem = str(error)
        except Exception as error:  # a rank is gone
            problem = problem or f"{type(error).__name__}: {error}"
        if problem is None:
            self.published.append((state, time.monotonic() - begin, removed))
        else:
            self.error = f"the save of step {state.step} failed: {problem}"

    def raise_error(self) -> None:
        """Raises what a save met. Call it where all ranks have agreed that one failed."""
        self.wait()
        raise CheckpointError(self.error or "a save failed on another rank.")


def _first(problem: str | None, group: dist.ProcessGroup) -> str | None:
    """The first problem of any rank, on all ranks."""
    everyone: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, problem, group=group)
    return next((f"rank {rank}: {text}" for rank, text in enumerate(everyone) if text), None)
