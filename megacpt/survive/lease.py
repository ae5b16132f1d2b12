"""One run directory, one owner. Imports no torch.

RUN/lease/00000007.json names the job that owns the directory: the file with the highest number counts. Who wants to be next creates the
file of the next number, which only one can (O_EXCL, on NFS too), and only when the owner has released it, is gone, or has not been heard
for STALE_SECONDS. No file of an owner is ever changed or renamed by another, so there is no moment at which two own the directory, and the
number is the fence: an owner that was taken for dead finds a higher one before it publishes, and leaves.

On the owner's own machine its process decides, by pid and start time; elsewhere its heartbeat, the file's time, which the waiting job
watches for changes with its own clock: clocks of two machines are never compared.

RUN/stop-request asks the owner to save and leave, whatever launched it: srun answers a SIGTERM by killing its tasks.
"""

import contextlib
import errno
import json
import os
import re
import secrets
import socket
import stat
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megacpt import log
from megacpt.config.run_layout import LEASE, STOP_REQUEST
from megacpt.errors import ConfigError, LeaseError
from megacpt.files import JsonError, open_plain, parse_object

ATTEMPT = "MEGACPT_ATTEMPT"
REPEAT_SECONDS = 10.0
"""Signals that ask for a stop and come closer together are one request, delivered by two ways."""
LOOK_SECONDS, BEAT_SECONDS, TRUST_SECONDS = 1.0, 5.0, 10.0
PATIENCE_SECONDS, STALE_SECONDS = 15.0, 60.0
"""What a job waits for an owner that lives, which may just be ending, and for one on another machine that is not heard."""
FOLLOWED = 1000
"""Leases that may be followed by another between the look at the folder and that into the file."""
MOST_BYTES = 1 << 16
"""Of a lease, and of a stop request."""


@dataclass(frozen=True)
class Process:
    """A process that cannot be taken for a later one of the same number.

    Attributes:
        start: ticks after the machine's boot. machine: its boot, and the container; empty where the system does not say.
    """

    pid: int
    start: int
    machine: str

    def alive(self) -> bool | None:
        """Whether it is there; None for one of another machine, of which this one knows nothing."""
        if not self.machine or self.machine != _machine():
            return None
        return bool(process_state(self.pid)) and _start_of(self.pid) == self.start


def process_of(pid: int) -> Process:
    return Process(pid, _start_of(pid), _machine())


def process_from(facts: dict[str, Any]) -> Process | None:
    """The process that a file or the environment names; None for numbers that no process has."""
    pid, start, machine = (facts.get(key) for key in ("pid", "start", "machine"))
    if type(pid) is not int or type(start) is not int or not isinstance(machine, str):
        return None
    return Process(pid, start, machine) if 0 < pid < 1 << 31 and 0 <= start < 1 << 63 else None


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0


def process_state(pid: int) -> str:
    """R, S, D, T … as the kernel says; "" for a process that is gone, or ended and not yet fetched."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return "" if state in "ZX" else state
    except (OSError, IndexError):
        pass
    if Path("/proc/self/stat").exists():
        return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    return "S"


@dataclass(frozen=True)
class Supervised:
    """What a supervisor tells the ranks through the environment: the name of the attempt, and who it is."""

    attempt: str
    process: Process

    def environment(self) -> dict[str, str]:
        return {ATTEMPT: json.dumps({"attempt": self.attempt, **asdict(self.process)})}


def supervised() -> Supervised | None:
    """By whom this process was started, if it was by `megacpt supervise`."""
    try:
        facts = parse_object(os.environ.get(ATTEMPT, ""))
    except JsonError:
        return None
    process, attempt = process_from(facts), facts.get("attempt")
    return Supervised(attempt, process) if process and isinstance(attempt, str) else None


def new_attempt() -> str:
    """A name that no other attempt has, whatever the clocks say."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def attempt_name() -> str:
    """Of what this process belongs to: the supervisor's name, with the count of torchrun's restarts in place behind it."""
    above = supervised()
    return f"{above.attempt}.{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}" if above else new_attempt()


def agents() -> list[Process]:
    """Processes without which this rank shall not live: torchrun, or what else started the ranks, and the supervisor."""
    found = [process_of(os.getppid())] if "RANK" in os.environ else []
    above = supervised()
    return found + ([above.process] if above and above.process.alive() is not None else [])


def gone(processes: Sequence[Process]) -> Process | None:
    """The first of them that has ended."""
    return next((process for process in processes if process.alive() is False), None)


@dataclass(frozen=True)
class Owner:
    """Of a run directory, as its file says.

    Attributes:
        facts: attempt, host, since; empty while the file is being written, or if it is damaged. mark: changes with every heartbeat.
    """

    number: int
    process: Process | None
    facts: dict[str, Any]
    released: bool
    mark: tuple
    heard: float

    def describe(self, run: Path, seconds: float | None) -> str:
        """Who it is, for people."""
        pid, host = (self.process.pid if self.process else "unknown"), self.facts.get("host", "unknown")
        heard = "" if seconds is None else f", last heartbeat {max(0.0, seconds):.0f} s ago"
        return (
            f"process {pid} on {host} (attempt {self.facts.get('attempt', 'unknown')}, since "
            f"{self.facts.get('since', 'unknown')}{heard})"
        )


class Lease:
    """This job's hold on a run directory; rank 0 has it.

    Args:
        attempt: the name of this start of the job.
    """

    def __init__(self, run: Path, attempt: str):
        self.run, self.attempt, self.folder = run, attempt, run / LEASE
        self.number, self.lost, self._file, self._checked = 0, False, -1, 0.0

    def take(self) -> None:
        """Becomes the owner, or waits until it can; a stop request that is none of this job's is dropped.

        Raises:
            LeaseError: if another job has the directory and stays. ConfigError: if what lies in the folder is no lease. OSError: if the
                folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if strange := [path for path in _paths(self.folder).values() if _is_strange(path)]:
            raise ConfigError([f"{path}: is no plain file, where a lease belongs. Move it away." for path in strange])
        for _ in range(FOLLOWED):
            owner = current_owner(self.run)
            if owner and not owner.released:
                self._wait_for(owner)
            if self._create((owner.number if owner else 0) + 1):
                break
        else:
            raise LeaseError(f"{self.run}: {FOLLOWED} others came before this job. Look who starts jobs on it.")
        request = stop_request(self.run)
        above = supervised()
        if request is None or not (above and request.get("attempt") == above.attempt):
            (self.run / STOP_REQUEST).write_text("")

    def _wait_for(self, owner: Owner) -> None:
        begin, said, found = time.monotonic(), False, owner
        while found and found.number == owner.number and not found.released:
            alive = found.process.alive() if found.process else None
            passed = time.monotonic() - begin
            if alive is False or (alive is None and found.mark == owner.mark and passed > STALE_SECONDS):
                return
            if passed > PATIENCE_SECONDS and (alive or found.mark != owner.mark):
                raise LeaseError(self._refusal(found))
            if not said:
                log.info(f"{self.run}: belongs to {found.describe(self.run, None)}; waiting for it to leave")
                said = True
            time.sleep(0.2)
            found = current_owner(self.run)

    def _refusal(self, owner: Owner) -> str:
        pid = f"kill -TERM {owner.process.pid}" if owner.process else "kill -TERM its process"
        return (
            f"{self.run}: belongs to another job that trains in it: {owner.describe(self.run, self._now() - owner.heard)}. Two jobs in one "
            f"run directory would mix their checkpoints. Wait for it, ask it to save and leave ({pid} on {owner.facts.get('host')}), or "
            "take another run.name."
        )

    def _now(self) -> float:
        """The clock of the run directory's file system."""
        probe = self.folder / f".clock-{os.getpid()}"
        probe.write_text("")
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _create(self, number: int) -> bool:
        """Whether this job became the owner of that number."""
        path = self.folder / _name(number)
        try:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_APPEND, 0o644)
        except FileExistsError:
            return False
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        facts = {
            "attempt": self.attempt,
            "host": socket.gethostname(),
            "since": since,
            **asdict(process_of(os.getpid())),
        }
        os.write(file, (json.dumps(facts) + "\n").encode())
        with contextlib.suppress(OSError):
            os.fsync(file)
        paths = _paths(self.folder)
        if max(paths, default=0) != number:  # what we took for the last had been followed long ago
            os.close(file)
            path.unlink(missing_ok=True)
            return False
        for older in paths.keys() - {number}:
            paths[older].unlink(missing_ok=True)
        self.number, self._file, self._checked = number, file, time.monotonic()
        return True

    def beat(self) -> None:
        """Shows that this job lives, and looks whether it still is the owner. A disk that does not answer is no loss."""
        with contextlib.suppress(OSError):
            os.utime(self._file)
            self.look()

    def look(self) -> bool:
        """Whether this job still owns the directory, by the directory itself. Raises OSError."""
        try:
            last = max(_paths(self.folder), default=0)
        except FileNotFoundError:
            last = 0
        self.lost = self.lost or last != self.number
        self._checked = time.monotonic()
        return not self.lost

    def held(self) -> bool:
        """The same, by the last look if that is not long ago: a process that was stopped looks before it writes."""
        if not self.lost and time.monotonic() - self._checked > TRUST_SECONDS:
            with contextlib.suppress(OSError):
                self.look()
        return not self.lost

    def fence(self) -> None:
        """Before something is published or removed.

        Raises:
            LeaseError: if the directory is another's by now. OSError: if that cannot be seen.
        """
        if not self.look():
            raise LeaseError(f"{self.run}: {self.describe_loss()}")

    def describe_loss(self) -> str:
        owner = None
        with contextlib.suppress(OSError):
            owner = current_owner(self.run)
        by = f"to {owner.describe(self.run, None)}" if owner else "to nobody: its lease was removed"
        return f"this job ({self.attempt}) owns the run directory no longer, it belongs {by}. Nothing more is written there."

    def release(self) -> None:
        """The next job need not wait."""
        if self._file < 0:
            return
        with contextlib.suppress(OSError):
            os.write(self._file, b"released\n")
        os.close(self._file)
        self._file = -1


_NAME = re.compile(r"[0-9]{8,}\.json")


def _name(number: int) -> str:
    return f"{number:08d}.json"


def _paths(folder: Path) -> dict[int, Path]:
    """Leases by number. Only a name that `_name` gives is one: a folder may hold anything."""
    numbers = {int(name.removesuffix(".json")): name for name in os.listdir(folder) if _NAME.fullmatch(name)}
    return {number: folder / name for number, name in numbers.items() if number and name == _name(number)}


def _is_strange(path: Path) -> bool:
    """Whether what lies there can be no lease; one that is gone by now was one."""
    with contextlib.suppress(FileNotFoundError):
        return not stat.S_ISREG(path.lstat().st_mode)
    return False


def current_owner(run: Path) -> Owner | None:
    """Who has the lease of a run directory, or had it last. Raises OSError if that cannot be seen."""
    for _ in range(FOLLOWED):
        try:
            paths = _paths(run / LEASE)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if not paths:
            return None
        number = max(paths)
        try:
            with open_plain(paths[number]) as file:
                first, *rest = file.read(MOST_BYTES).decode(errors="replace").split("\n")
                info = os.fstat(file.fileno())
        except FileNotFoundError:  # followed by a higher one in between
            continue
        try:
            facts = parse_object(first)
            process = process_from(facts)
        except JsonError:
            facts, process = {}, None
        return Owner(number, process, facts, "released" in rest, (info.st_mtime_ns, info.st_size, first), info.st_mtime)
    raise OSError(errno.ESTALE, f"lists leases that were not there {FOLLOWED} times", str(run / LEASE))


def request_stop(run: Path, attempt: str, why: str, at_once: bool = False) -> None:
    """Asks the job of an attempt to save and leave, or to leave at once. Written in place: a client of NFS that opens the file sees it."""
    run.mkdir(parents=True, exist_ok=True)
    (run / STOP_REQUEST).write_text(json.dumps({"attempt": attempt, "why": why, "at_once": at_once}))


def stop_request(run: Path) -> dict[str, Any] | None:
    """What stands in RUN/stop-request; a person may have written any text, which is for whoever owns the directory."""
    try:
        with open_plain(run / STOP_REQUEST) as file:
            text = file.read(MOST_BYTES).strip()
        return parse_object(text) if text else None
    except OSError:
        return None
    except JsonError:
        return {"why": STOP_REQUEST}


class Keeper:
    """A thread of a rank: renews the lease and reads stop requests on rank 0; without a watchdog it looks whether the agents live.

    Args:
        ask: called with the reason when somebody asks for a stop.
        agents: this rank leaves with 75 when one of them is gone; none where a watchdog sees to that.
    """

    def __init__(self, ask: Callable[[str], None], agents: Sequence[Process]):
        self.ask, self.agents = ask, agents
        self.lease: Lease | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="keeper", daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        beat, said = time.monotonic(), set()
        while not self._over.wait(LOOK_SECONDS):
            try:
                beat = self._look(beat)
            except Exception as error:  # the next round must come: without it the lease is lost, and no stop is heard
                if (text := f"{type(error).__name__}: {error}") not in said:
                    said.add(text)
                    log.warn(f"the thread that keeps the run directory goes on after {text}")

    def _look(self, beat: float) -> float:
        """One round. Returns when the lease was last shown to live."""
        if missing := gone(self.agents):
            log.info(f"process {missing.pid}, which started this rank, is gone: leaving")
            os._exit(75)
        if lease := self.lease:
            if time.monotonic() - beat >= BEAT_SECONDS:
                beat = time.monotonic()
                lease.beat()
            self._read(lease)
        return beat

    def _read(self, lease: Lease) -> None:
        request, above = stop_request(lease.run), supervised()
        if request is None or (above and request.get("attempt") not in (None, above.attempt)):
            return
        if request.get("at_once") is True:
            os._exit(75)
        by_supervisor = above and request.get("attempt") == above.attempt
        self.ask(str(request.get("why"))[:80] if by_supervisor else STOP_REQUEST)

    def close(self) -> None:
        self._over.set()
        self._thread.join(5.0)  # a disk that does not answer keeps nobody
