"""Named points of a step and of a save. At each the rank says that it lives, which the watchdog reads (survive/watchdog.py). Imports no
torch.

The heartbeat is one record in a file that is mapped into memory: writing it costs no system call.
"""

import mmap
import os
import struct
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POINTS = (
    "step.begin",
    "after_forward",
    "after_backward",
    "before_update",
    "step.end",
    "evaluate",
    "save.staged",
    "save.after_shards",
    "save.before_manifest",
    "save.before_rename",
    "save.after_rename",
    "save.before_prune",
)

Subject = Callable[[], Any]
"""Gives what is at work at a point: a tensor, or a folder of files."""


@dataclass(frozen=True)
class Beat:
    """What a rank last said. Seconds are of the machine's monotonic clock.

    Attributes:
        budget: seconds until the next beat must come.
        phase: start, step, save or evaluate; "failed" and "done" end the watch.
    """

    pid: int
    rank: int
    step: int
    seconds: float
    budget: float
    phase: str
    point: str


_RECORD = struct.Struct("<qqqdd16s32s")
_SIZE = _RECORD.size + 4


class Heartbeat:
    """This rank's record in a file."""

    def __init__(self, path: Path, rank: int):
        self.path, self.rank, self.step = path, rank, 0
        with open(path, "wb") as file:
            file.write(bytes(_SIZE))
        with open(path, "r+b") as file:
            self.memory = mmap.mmap(file.fileno(), _SIZE)

    def write(self, budget: float, phase: str, point: str) -> None:
        body = _RECORD.pack(
            os.getpid(), self.rank, self.step, time.monotonic(), budget, phase.encode()[:16], point.encode()[:32]
        )
        self.memory[:] = body + zlib.crc32(body).to_bytes(4, "little")


def read_beat(path: Path) -> Beat | None:
    """A rank's last beat; None for a file that is not one, or that is just being written."""
    try:
        raw = path.read_bytes()
    except OSError:
        return None
    if len(raw) != _SIZE or zlib.crc32(raw[:-4]) != int.from_bytes(raw[-4:], "little"):
        return None
    pid, rank, step, seconds, budget, phase, point = _RECORD.unpack(raw[:-4])
    return Beat(pid, rank, step, seconds, budget, _text(phase), _text(point))


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode(errors="replace")


_heart: Heartbeat | None = None
_observer: Callable[[str, int, Subject | None], None] | None = None
_phase, _budget, _step = "start", float("inf"), 0


def begin(heart: Heartbeat | None) -> None:
    """From now on beats go there."""
    global _heart
    _heart = heart


def observe(observer: Callable[[str, int, Subject | None], None] | None) -> None:
    """From now on, at each point it is called with the point, the step and the subject. None: nothing is."""
    global _observer
    _observer = observer


def set_deadline(phase: str, seconds: float) -> None:
    """From now on, so much time may pass between two points."""
    global _phase, _budget
    _phase, _budget = phase, seconds
    if _heart:
        _heart.write(seconds, phase, "")


def expect_next(point: str, seconds: float) -> None:
    """This rank is at a point, and this once so little time may pass until the next."""
    if _heart and threading.current_thread() is threading.main_thread():  # a save behind it is no sign of its life
        _heart.step = _step
        _heart.write(seconds, _phase, point)


def reach(point: str, step: int | None = None, subject: Subject | None = None) -> None:
    """Says that this rank has come to a point.

    Args:
        step: of the clock, or of the checkpoint; None: the step that has begun last.
        subject: what is at work there.
    """
    global _step
    assert point in POINTS, point
    if point == "step.begin":
        _step = step or 0
    expect_next(point, _budget)
    if _observer:
        _observer(point, _step if step is None else step, subject)
