"""Saving in the background: tensors are copied to host memory, the rest happens in a thread, on the group for objects.

The copies stay: a second save writes into the same host memory, after the first has ended.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from megacpt.checkpoint.manifest import RunState
from megacpt.checkpoint.save import save
from megacpt.parallel.mesh import object_group
from megacpt.parallel.sharded import local_part, wrap_as


def _current_device() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_available() else None


@dataclass
class Outcome:
    """What came of a save: seconds and the steps that retention removed, or an error."""

    state: RunState
    seconds: float = 0.0
    removed: list[int] | None = None
    error: BaseException | None = None


class Saver:
    """One save at a time, in the background or not; all ranks make one and call it alike.

    Args:
        how, prune, fence: as of `save`.
    """

    def __init__(self, how: str, prune: Callable[[], list[int]], fence: Callable[[], None] = lambda: None):
        self.how, self.prune, self.fence = how, prune, fence
        self.host: dict[str, Tensor] = {}
        self.thread: threading.Thread | None = None
        self.outcomes: list[Outcome] = []
        """Of the saves that have ended since the last look."""

    def start(self, checkpoints: Path, tensors: dict[str, Any], state: RunState, facts: dict[str, Any]) -> float:
        """Copies and begins to write; waits first for a save that is still under way. Returns the seconds training stood still."""
        begin = time.monotonic()
        self.wait()
        staged = self._staged(tensors)
        arguments = (checkpoints, staged, state, facts, self.group, _current_device())
        self.thread = threading.Thread(target=self._work, args=arguments, name="save", daemon=True)
        self.thread.start()
        return time.monotonic() - begin

    def now(self, checkpoints: Path, tensors: dict[str, Any], state: RunState, facts: dict[str, Any]) -> None:
        """Writes, and returns when it is done."""
        self.wait()
        self._work(checkpoints, tensors, state, facts, self.group)

    def wait(self) -> None:
        """Until nothing is under way."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    @property
    def failed(self) -> bool:
        """Whether this rank knows of a save that failed."""
        return any(outcome.error for outcome in self.outcomes)

    @property
    def group(self) -> dist.ProcessGroup:
        """For the ranks' agreement, to save and on what is saved; in this thread only while nothing is under way."""
        return object_group()

    def close(self) -> None:
        """Waits, and lets go of the host memory."""
        self.wait()
        self.host = {}

    def _staged(self, tree: dict[str, Any], path: str = "") -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, value in tree.items():
            name = f"{path}/{key}"
            if isinstance(value, dict):
                out[key] = self._staged(value, name)
                continue
            local = local_part(value)
            held = self.host.get(name)
            if held is None or (held.shape, held.dtype) != (local.shape, local.dtype):
                self.host[name] = torch.empty_like(local, device="cpu", pin_memory=local.is_cuda)
            self.host[name].copy_(local, non_blocking=True)
            out[key] = wrap_as(self.host[name], value) if isinstance(value, DTensor) else self.host[name]
        if not path and torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return out

    def _work(
        self,
        checkpoints: Path,
        tensors: dict,
        state: RunState,
        facts: dict,
        group: dist.ProcessGroup,
        device: int | None = None,
    ) -> None:
        """Saves.

        Args:
            device: in a thread, the GPU of this process. A thread begins on GPU 0, and whatever asks for its stream or memory would
                open a context there, half a gigabyte for each rank of the node.
        """
        outcome = Outcome(state)
        try:
            if device is not None:
                torch.cuda.set_device(device)
            outcome.seconds, outcome.removed = save(
                checkpoints, tensors, state, facts, group, self.how, self.prune, self.fence
            )
        except BaseException as error:  # the training raises or reports it, on all ranks
            outcome.error = error
        self.outcomes.append(outcome)
