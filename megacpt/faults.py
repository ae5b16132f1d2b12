"""Faults of a test, caused at the points of a step and of a save (heartbeat.py). Imported only where the test switch MEGACPT_FAULT arms
them: a list of `action:key=value,…` parted by semicolons, for example "kill:rank=1,point=save.after_shards,step=4". Imports no torch.
"""

import errno
import os
import re
import signal
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megacpt import heartbeat
from megacpt.errors import ConfigError

ACTIONS = ("kill", "stop", "term", "sleep", "hold", "raise", "full", "nan", "flip")


@dataclass(frozen=True)
class Fault:
    """What happens at a point. rank None is every rank, step None every step; `once` names a file that says it has happened; `budget`
    is the number of seconds within which the next sign of life is due from then on, so that what works needs no short one."""

    action: str
    point: str
    rank: int | None = None
    step: int | None = None
    budget: int | None = None
    once: str | None = None


def parse_faults(text: str) -> list[Fault]:
    """Raises:
    ConfigError: for an action, point or key that is not there."""
    faults, problems = [], []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        action, _, rest = part.partition(":")
        given = {key: value for key, _, value in (pair.partition("=") for pair in rest.split(","))}
        unknown = given.keys() - {"point", "rank", "step", "budget", "once"}
        if action not in ACTIONS or given.get("point") not in heartbeat.POINTS or unknown:
            problems.append(
                f"{part}: actions are {', '.join(ACTIONS)}; points {', '.join(heartbeat.POINTS)}; keys point, rank, step, budget, once."
            )
            continue
        number = {key: int(given[key]) for key in ("rank", "step", "budget") if key in given}
        faults.append(Fault(action, given["point"], once=given.get("once"), **number))
    if problems:
        raise ConfigError(problems, "MEGACPT_FAULT")
    return faults


def arm(text: str) -> None:
    """From now on this rank's faults happen where the text says."""
    faults = parse_faults(text)
    heartbeat.observe(partial(_cause_all, faults) if faults else None)


def _cause_all(faults: list[Fault], point: str, step: int, subject: heartbeat.Subject | None) -> None:
    rank = int(os.environ.get("RANK", "0"))
    for fault in faults:
        if fault.point == point and fault.rank in (None, rank) and fault.step in (None, step):
            _cause(fault, subject)


def _cause(fault: Fault, subject: heartbeat.Subject | None) -> None:
    if fault.once:
        try:
            os.close(os.open(fault.once, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return
    if fault.budget:
        heartbeat.expect_next(fault.point, fault.budget)
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
