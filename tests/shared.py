"""What the processes of one test session share: results that are made once, a turn for what fills the machine, waits that end.

Under pytest-xdist each worker is a process. `made_once` computes an expensive value in whichever needs it first; `turn` lets only one
launch of many processes run at a time, by the number of processes that it asks for, so a new test falls into the right group by itself.
"""

import contextlib
import fcntl
import os
import pickle
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

FOLDER = "MEGACPT_TEST_SHARED"
"""Environment variable: the session's folder. conftest.py makes it and takes it away."""
MANY = 4
"""So many processes fill a small machine: two such launches at once would only slow each other down."""
LONG_SECONDS = 1800.0
"""For what must come on a machine with any load. What must not come is shown by a short budget, never by this one."""
T = TypeVar("T")
_turns = 0


def folder() -> Path:
    return Path(
        os.environ.get(FOLDER) or tempfile.gettempdir()
    )  # outside a session, as in soak.py, there is only the turn


def new_folder(name: str) -> Path:
    """For what `made_once` makes."""
    path = folder() / name
    shutil.rmtree(path, ignore_errors=True)  # of an attempt that failed
    path.mkdir()
    return path


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """One process of the session at a time. Forked children inherit the file but not the lock's end: it is given back here."""
    with open(folder() / f"{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def made_once(name: str, make: Callable[[], T]) -> T:
    """`make()` of whichever process comes first; the others read what it made. A failure is not kept."""
    path = folder() / f"{name}.pickle"
    with locked(name):
        if not path.exists():
            value = make()
            partial = path.with_suffix(".partial")
            partial.write_bytes(pickle.dumps(value))
            os.replace(partial, path)
            return value
    with open(path, "rb") as file:
        return pickle.load(file)


@contextlib.contextmanager
def turn(processes: int) -> Iterator[None]:
    """Around a launch of so many processes."""
    global _turns
    if processes < MANY or _turns:  # within a turn there is another launch only of the same test
        yield
        return
    with locked("many-processes"):
        _turns += 1
        try:
            yield
        finally:
            _turns -= 1


def wait_until(
    ready: Callable[[], object], alive: Iterable[int] = (), seconds: float = LONG_SECONDS, told: Callable[[], str] = str
) -> None:
    """Waits for what must come.

    Args:
        alive: children of this process without which it cannot come: one that has ended fails the test at once.
        told: what there is instead.
    """
    deadline = time.monotonic() + seconds
    children = list(alive)
    while not ready():
        if ended := [pid for pid in children if has_ended(pid)]:
            assert ready(), f"process {ended} has ended, and what was waited for is not there. {told()}"
            return
        assert time.monotonic() < deadline, f"not there after {seconds:.0f} s. {told()}"
        time.sleep(0.02)


def has_ended(pid: int) -> bool:
    """Of a child: it is gone, or has ended and was not fetched yet. Its exit code stays for who fetches it."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def is_blocked(pid: int) -> bool:
    """Whether the main thread waits in the kernel, look after look, and has used no time meanwhile: it is inside a call that does not
    return. On a busy machine a thread that could run is not waiting, however long it does not run."""
    looks = []
    for _ in range(10):
        fields = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()
        looks.append((fields[0], fields[11], fields[12]))  # state, user and system ticks
        time.sleep(0.01)
    return set(looks) == {("S", *looks[0][1:])}


def exit_code_of(pid: int, seconds: float = LONG_SECONDS) -> int:
    """Of a forked child, when it ends; a code below 0 is a signal."""
    wait_until(lambda: has_ended(pid), seconds=seconds, told=lambda: f"process {pid} runs on")
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
