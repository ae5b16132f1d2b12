"""Named points of a step and of a save. At each the rank says that it lives, which the watchdog reads (train/watchdog.py), and a test can
cause a fault there. Imports no torch.

The heartbeat is one record in a file that is mapped into memory: writing it costs no system call. Faults are armed only by the test switch
MEGACPT_FAULT, a list of `action:key=value,…` parted by semicolons, for example "kill:rank=1,point=save.after_shards,step=4".
"""

import errno
import mmap
import os
import re
import signal
import struct
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacpt.errors import ConfigError

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
ACTIONS = ("kill", "stop", "term", "sleep", "hold", "raise", "full", "nan", "flip")


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
    text = lambda field: field.rstrip(b"\0").decode(errors="replace")
    return Beat(pid, rank, step, seconds, budget, text(phase), text(point))


@dataclass(frozen=True)
class Fault:
    """Of a test: what happens at a point. rank None is every rank, step None every step; `once` names a file that says it has happened."""

    action: str
    point: str
    rank: int | None = None
    step: int | None = None
    once: str | None = None


def parse_faults(text: str) -> list[Fault]:
    """Raises:
    ConfigError: for an action, point or key that is not there."""
    faults, problems = [], []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        action, _, rest = part.partition(":")
        given = dict(pair.partition("=")[::2] for pair in rest.split(","))
        unknown = given.keys() - {"point", "rank", "step", "once"}
        if action not in ACTIONS or given.get("point") not in POINTS or unknown:
            problems.append(
                f"{part}: actions are {', '.join(ACTIONS)}; points {', '.join(POINTS)}; keys point, rank, step, once."
            )
            continue
        number = {key: int(given[key]) for key in ("rank", "step") if key in given}
        faults.append(Fault(action, given["point"], once=given.get("once"), **number))
    if problems:
        raise ConfigError(problems, "MEGACPT_FAULT")
    return faults


_faults = parse_faults(os.environ.get("MEGACPT_FAULT", ""))
_heart: Heartbeat | None = None
_phase, _budget, _step = "start", float("inf"), 0


def begin(heart: Heartbeat | None) -> None:
    """From now on beats go there."""
    global _heart
    _heart = heart


def allow(phase: str, seconds: float) -> None:
    """From now on, so much time may pass between two points."""
    global _phase, _budget
    _phase, _budget = phase, seconds
    if _heart:
        _heart.write(seconds, phase, "")


def reached(point: str, step: int | None = None, subject: Callable[[], Any] | None = None) -> None:
    """This rank has come to a point.

    Args:
        step: of the clock, or of the checkpoint; None: the step that has begun last.
        subject: what faults spoil there: a tensor, or a folder of files.
    """
    global _step
    assert point in POINTS, point
    if point == "step.begin":
        _step = step or 0
    if _heart and threading.current_thread() is threading.main_thread():  # a save behind it is no sign of its life
        _heart.step = _step
        _heart.write(_budget, _phase, point)
    for fault in _faults:
        if (
            fault.point == point
            and fault.rank in (None, int(os.environ.get("RANK", "0")))
            and fault.step in (None, _step if step is None else step)
        ):
            _cause(fault, subject)


def _cause(fault: Fault, subject: Callable[[], Any] | None) -> None:
    if fault.once:
        try:
            os.close(os.open(fault.once, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return
    match fault.action:
        case "kill" | "stop" | "term":
            number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}[fault.action]
            os.kill(os.getpid(), number)
        case "sleep":
            while True:
                time.sleep(3600)
        case "hold":  # with Python's lock held: no thread of this process runs
            re.match("(a+)+$", "a" * 64 + "b")
        case "raise":
            raise RuntimeError(f"a fault of the test at {fault.point}")
        case "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        case "nan" | "flip":
            _spoil(fault.action, subject() if subject else None)


def _spoil(action: str, subject: Any) -> None:
    """One flipped bit in this rank's file of a folder, or a number that is none in a tensor."""
    assert (action == "flip") == isinstance(subject, Path), f"{action} cannot be done to {type(subject).__name__}"
    if isinstance(subject, Path):
        file = next(subject.glob(f"__{os.environ.get('RANK', '0')}_*"))
        with open(file, "r+b") as opened:
            opened.seek(file.stat().st_size // 2)
            byte = opened.read(1)[0]
            opened.seek(-1, os.SEEK_CUR)
            opened.write(bytes([byte ^ 4]))
            opened.flush()
            os.fsync(opened.fileno())
        return
    subject.detach().view(-1)[:1].fill_(float("nan"))
