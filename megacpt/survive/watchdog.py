"""The watchdog: a process beside each node's ranks. It reads their heartbeats (heartbeat.py) and sees a rank that is silent for longer than
its phase allows, that failed, or that is gone. Then it keeps the evidence in the run directory, ends the node's ranks and writes into
run.json what happened. So it does when what started the ranks (torchrun, the supervisor) is gone. Imports no torch.

Nodes tell each other by files in RUN/incidents/ATTEMPT/: whoever sees something writes there first, and every watchdog looks there.
A rank's stack comes from faulthandler, whose handler needs neither Python's lock nor the main thread's attention.
"""

import contextlib
import faulthandler
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megacpt import heartbeat, log
from megacpt.config.run_layout import INCIDENTS, STATUS, incident_folder
from megacpt.errors import ConfigError, LeaseError, MegacptError
from megacpt.files import JsonError, describe_os_error, read_object, write_atomically
from megacpt.heartbeat import POINTS, Beat, Heartbeat, read_beat
from megacpt.survive.lease import Process, agents, attempt_name, current_owner, gone, process_state, supervised

LOOK_SECONDS, SHARED_LOOK_SECONDS, GRACE_SECONDS, REPORT_SECONDS = 0.3, 2.0, 5.0, 10.0
LEAVE_SECONDS = 60.0
"""For a rank that has said why it leaves, or that it is done: it takes its own exit code with it, however slow the machine is."""
DUMP = signal.SIGUSR2
WAITS = re.compile(r"torch/distributed/|in (wait|execute|barrier|synchronize)$")
"""Of a stack's innermost line: the rank waits for others."""
_FAILED = re.compile(r"failed-rank-([0-9]{5,9})\.json")
_RANK_NUMBER = re.compile(r"[0-9]{1,9}")


KINDS = ("failed", "died", "hung", "orphaned")
"""Of what a watchdog sees."""


class Watch:
    """This rank's side: nothing, if the recipe wants no watchdog."""

    def __init__(self, run: Path, folder: Path | None, rank: int):
        self.run, self.folder, self.rank, self.attempt = run, folder, rank, ""
        if supervised():
            self.join(attempt_name())

    def join(self, attempt: str) -> None:
        """All ranks have met, and share a name for this attempt."""
        self.attempt = attempt
        if self.folder:
            write_atomically(self.folder / "attempt", attempt)

    def report_failure(self, error: BaseException) -> None:
        """Tells the other ranks, so that none waits for this one, and the supervisor, which sees only torchrun's exit code."""
        if isinstance(error, LeaseError):  # nothing of this start belongs there
            self.report_done()
            return
        attempt = self.attempt or (self.folder.name if self.folder else "")
        if supervised() or (self.folder and os.path.isdir(self.run)):
            folder = _incident(self.run, attempt)
            _write(folder / f"failed-rank-{self.rank:05d}.json", _failure_facts(error), self.folder)
        if not self.folder:
            return
        heartbeat.set_deadline("failed", 0.0)
        heartbeat.begin(None)

    def report_done(self) -> None:
        if self.folder:
            heartbeat.set_deadline("done", 0.0)
            heartbeat.begin(None)


def tell_supervisor(run: Path, error: BaseException) -> None:
    """Of a start that fails before the ranks meet; through torchrun the supervisor sees no exit code."""
    if supervised():
        Watch(run, None, int(os.environ.get("RANK", "0"))).report_failure(error)


def start(run: Path, enabled: bool) -> Watch:
    """Begins this rank's heartbeat; the node's first rank starts the watchdog."""
    rank = int(os.environ.get("RANK", "0"))
    if not enabled:
        return Watch(run, None, rank)
    common = f"{os.getppid()}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"  # to the ranks of a node
    name = common if "RANK" in os.environ else f"{os.getpid()}-{time.monotonic_ns()}"
    folder = _private_folder() / f"{name}-{zlib.crc32(os.fsencode(os.path.abspath(run))):08x}"
    folder.mkdir(mode=0o700, exist_ok=True)
    stack = open(folder / f"rank-{rank:05d}.stack", "w")
    faulthandler.register(DUMP, file=stack, all_threads=True, chain=False)
    for name in (
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
        "TORCH_FR_DUMP_TEMP_FILE",
    ):  # torch's flight recorder, with the rank behind it
        os.environ.setdefault(name, str(folder / "flight_recorder_"))
    os.environ.setdefault("TORCH_NCCL_DEBUG_INFO_PIPE_FILE", str(folder / "flight_recorder_ask_"))
    heartbeat.begin(Heartbeat(folder / f"rank-{rank:05d}.beat", rank))
    if os.environ.get("LOCAL_RANK", "0") == "0":
        size = os.environ.get("LOCAL_WORLD_SIZE", "1")
        world = os.environ.get("WORLD_SIZE", "1")
        above = json.dumps([asdict(agent) for agent in agents()])
        arguments = [
            sys.executable,
            "-m",
            "megacpt.survive.watchdog",
            str(folder),
            os.path.abspath(run),
            size,
            world,
            above,
        ]
        # A session of its own: what ends the ranks' process groups leaves it alone.
        subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    return Watch(run, folder, rank)


def _private_folder() -> Path:
    """A folder for heartbeats on this node's own disk, that only this user can write."""
    path = Path(tempfile.gettempdir()) / f"megacpt-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    info = path.lstat()
    if path.is_symlink() or info.st_uid != os.getuid() or info.st_mode & 0o022:
        raise ConfigError(
            [
                f"{path}: belongs to somebody else, or others can write it. Remove it, or set TMPDIR to a folder of your own."
            ],
            "the environment",
        )
    return path


def _failure_facts(error: BaseException) -> dict[str, Any]:
    return {
        "time": time.time(),
        "kind": type(error).__name__,
        "message": str(error)[:2000],
        "exit_code": error.exit_code if isinstance(error, MegacptError) else 1,
        "ours": isinstance(error, MegacptError),
        "traceback": "".join(traceback.format_exception(error))[-8000:],
    }


def _incident(run: Path, attempt: str) -> Path:
    path = incident_folder(run, attempt)
    with contextlib.suppress(OSError):  # what is written there tells
        path.mkdir(parents=True, exist_ok=True)
    return path


def _write(path: Path, content: dict[str, Any], spare: Path | None) -> None:
    """Into the run directory, or, where its disk takes nothing, into a folder of this node, from which the watchdog reads too."""
    text = json.dumps(content, indent=1)
    try:
        write_atomically(path, text)
    except OSError:
        with contextlib.suppress(OSError):
            if spare:
                write_atomically(spare / path.name, text)


def _read(path: Path) -> dict[str, Any]:
    """What was written there; nothing if it is no such thing."""
    try:
        return read_object(path)
    except (OSError, JsonError):
        return {}


class Watchdog:
    """Watches the ranks of this node until all are gone.

    Args:
        folder: of heartbeats. run: the run directory. size: ranks of this node. world_size: of all nodes.
        above: what started the ranks, without which they shall not live.
    """

    def __init__(self, folder: Path, run: Path, size: int, world_size: int, above: Sequence[Process] = ()):
        self.folder, self.run, self.size, self.world_size, self.above = folder, run, size, world_size, above
        self.node, self.shared_look = f"{socket.gethostname()}-{os.getpid()}", 0.0
        self.beats: dict[int, Beat] = {}

    def watch(self) -> None:
        begin = time.monotonic()
        while True:
            self._look()
            alive = [beat for beat in self.beats.values() if process_state(beat.pid)]
            if kind := self._kind():
                self._incident(kind)
                return
            over = all(beat.phase == "done" for beat in self.beats.values()) or not alive
            if over and (self.beats or time.monotonic() - begin > 60):
                return
            time.sleep(LOOK_SECONDS)

    def _look(self) -> None:
        for path in self.folder.glob("rank-*.beat"):
            beat = read_beat(path)
            if beat and beat.pid:
                self.beats[beat.rank] = beat

    def _overdue(self, beat: Beat) -> bool:
        return bool(process_state(beat.pid)) and time.monotonic() - beat.seconds > beat.budget

    def _kind(self) -> str | None:
        """What has happened, here or on another node."""
        running = [beat for beat in self.beats.values() if beat.phase not in ("done", "failed")]
        if any(beat.phase == "failed" for beat in self.beats.values()):
            return "failed"
        if any(not process_state(beat.pid) for beat in running):
            self._look()  # a last word may have come in between
            if any(not process_state(b.pid) and b.phase not in ("done", "failed") for b in self.beats.values()):
                return "died"
        if any(self._overdue(beat) for beat in running):
            return "hung"
        if running and gone(self.above):
            return "orphaned"
        if time.monotonic() - self.shared_look > SHARED_LOOK_SECONDS and self.world_size > self.size:
            self.shared_look = time.monotonic()
            for path in incident_folder(self.run, self._attempt()).glob("node-*.json"):
                kind = _read(path).get("kind")
                return kind if kind in KINDS else "failed"
        return None

    def _attempt(self) -> str:
        try:
            return (self.folder / "attempt").read_text()
        except OSError:
            return self.folder.name

    def _incident(self, kind: str) -> None:
        """Evidence, end, and what run.json says of it."""
        if not os.path.isdir(self.run):  # it ended before there was a run
            self._end(GRACE_SECONDS)
            return
        folder = _incident(self.run, self._attempt())
        report = folder / f"node-{self.node}.json"
        _write(report, {"kind": kind}, self.folder)  # the other nodes need not wait for the rest
        ranks = {rank: self._evidence(beat) for rank, beat in sorted(self.beats.items())}
        if kind == "hung":
            self._dump(folder, ranks)
        _write(report, {"kind": kind, "ranks": ranks}, self.folder)
        if 0 in ranks:
            self._wait_for_nodes(folder)
        self._end(0.0 if kind in ("hung", "orphaned") else GRACE_SECONDS)
        if 0 in ranks:
            self._conclude(folder, kind)

    def _evidence(self, beat: Beat) -> dict[str, Any]:
        return {
            "pid": beat.pid,
            "step": beat.step,
            "phase": beat.phase,
            "point": beat.point,
            "silent_seconds": round(time.monotonic() - beat.seconds, 1),
            "budget_seconds": beat.budget,
            "state": process_state(beat.pid),
            "gone": not process_state(beat.pid) and beat.phase not in ("done", "failed"),
        }

    def _dump(self, folder: Path, ranks: dict[int, dict[str, Any]]) -> None:
        """Stacks of this node's ranks, and torch's flight recorder where NCCL keeps one."""
        for rank, found in ranks.items():
            with contextlib.suppress(OSError):
                os.kill(found["pid"], DUMP)
            with contextlib.suppress(OSError):
                pipe = os.open(self.folder / f"flight_recorder_ask_{rank}.pipe", os.O_WRONLY | os.O_NONBLOCK)
                os.write(pipe, b"1\n")
                os.close(pipe)
        until = time.monotonic() + 3.0

        def stack(rank: int) -> Path:
            return self.folder / f"rank-{rank:05d}.stack"

        asked = [rank for rank, found in ranks.items() if found["state"] != "T"]  # a stopped one cannot answer
        while time.monotonic() < until and not all(stack(r).exists() and stack(r).stat().st_size for r in asked):
            time.sleep(0.1)
        time.sleep(0.2)
        for path in [*self.folder.glob("rank-*.stack"), *self.folder.glob("flight_recorder_*")]:
            if path.is_file() and path.stat().st_size:
                with contextlib.suppress(OSError):
                    shutil.copy(path, folder / path.name.replace(".stack", ".txt"))
        for rank, found in ranks.items():
            lines = _main_thread(stack(rank).read_text(errors="replace")) if stack(rank).exists() else []
            found["waits"] = any(WAITS.search(line) for line in lines[:1])
            found["stack"] = lines[:8]

    def _wait_for_nodes(self, folder: Path) -> None:
        until = time.monotonic() + REPORT_SECONDS
        while time.monotonic() < until and len(_all_ranks(folder, self.folder)) < self.world_size > self.size:
            time.sleep(0.5)

    def _end(self, grace: float) -> None:
        """Ranks leave by themselves, then on a second stop request, with 75, then without being asked. Who is leaving already has
        longer."""
        begin = time.monotonic()
        self._wait(lambda: bool(self._alive()), grace)
        for number, seconds in ((signal.SIGTERM, 0.3), (signal.SIGINT, 3.0), (signal.SIGKILL, 3.0)):
            for pid in self._alive(leaving=False):
                _send(pid, number)
            self._wait(lambda: bool(self._alive(leaving=False)), seconds)
        self._wait(lambda: bool(self._alive()), LEAVE_SECONDS - (time.monotonic() - begin))
        for pid in self._alive():
            _send(pid, signal.SIGKILL)

    def _alive(self, leaving: bool = True) -> list[int]:
        """Pids of ranks that are there, with or without those that have said that they leave."""
        self._look()
        beats = (beat for beat in self.beats.values() if leaving or beat.phase not in ("done", "failed"))
        return [beat.pid for beat in beats if process_state(beat.pid)]

    def _wait(self, so_long: Callable[[], bool], seconds: float) -> None:
        until = time.monotonic() + seconds
        while so_long() and time.monotonic() < until:
            time.sleep(0.05)

    def _conclude(self, folder: Path, kind: str) -> None:
        from megacpt.survive.run_directory import read_status, write_status

        run = read_status(self.run)
        ranks = _all_ranks(folder, self.folder)
        code, suspects, reason = conclusion(kind, ranks, _failures(folder, self.folder))
        status = "hung" if kind == "hung" else "failed"
        outcome = {"status": status, "exit_code": code, "reason": reason, "suspects": suspects, "incident": str(folder)}
        _write(folder / "conclusion.json", outcome, self.folder)
        if not self._may_conclude(run) or (run.get("status") in ("finished", "preempted") and kind != "hung"):
            return
        try:
            write_status(self.run, run | {"time": time.time(), "attempt_id": self._attempt()} | outcome)
        except OSError as error:
            log.say(f"megacpt watchdog: {describe_os_error(error, self.run / STATUS)}")
        log.say(f"megacpt watchdog: {status}: {reason} Evidence: {folder}")

    def _may_conclude(self, run: dict[str, Any]) -> bool:
        """Whether run.json is this start's to write: nobody else has begun since, and nobody else owns the directory."""
        attempt = self._attempt()
        try:
            owner = current_owner(self.run)
        except OSError:
            return run.get("attempt_id") in (None, attempt)
        if owner and not owner.released:
            return owner.facts.get("attempt") == attempt
        return owner is None or owner.facts.get("attempt") == attempt or run.get("attempt_id") in (None, attempt)


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def read_conclusion(run: Path, attempt: str) -> dict[str, Any]:
    """What an attempt under a supervisor left that did not come as far as run.json: the watchdog's conclusion, or the ranks' own words."""
    for folder in sorted((run / INCIDENTS).glob(f"{attempt}.*"), reverse=True):
        if _holds(facts := _read(folder / "conclusion.json"), _CONCLUSION):
            return facts
        if failures := _failures(folder):
            code, suspects, reason = conclusion("failed", {}, failures)
            return {"status": "failed", "exit_code": code, "suspects": suspects, "reason": reason}
    return {}


_TIME = (int, float)
_FAILURE = {"time": _TIME, "kind": str, "message": str, "exit_code": int, "ours": bool}
_RANK = {"step": int, "phase": str, "point": str, "silent_seconds": _TIME, "budget_seconds": _TIME, "state": str}
_CONCLUSION = {"status": str, "exit_code": int, "reason": str, "suspects": list}
"""What a file below incidents/ must hold to be believed."""


def _holds(found: Any, fields: dict[str, type | tuple]) -> bool:
    return isinstance(found, dict) and all(_is(found.get(key), kind) for key, kind in fields.items())


def _is(value: Any, kind: type | tuple) -> bool:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        return False
    return abs(value) < 1 << 53 or value == math.inf if isinstance(value, int | float) else True


def _failures(*folders: Path) -> dict[int, dict[str, Any]]:
    found = {}
    for path in (path for folder in folders for path in folder.glob("failed-rank-*.json")):
        name, failure = _FAILED.fullmatch(path.name), _read(path)
        if name and _holds(failure, _FAILURE):
            found[int(name.group(1))] = failure
    return found


def _all_ranks(*folders: Path) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    for path in (path for folder in folders for path in folder.glob("node-*.json")):
        ranks = _read(path).get("ranks")
        for rank, evidence in ranks.items() if isinstance(ranks, dict) else ():
            if _RANK_NUMBER.fullmatch(rank) and _holds(evidence, _RANK):
                found[int(rank)] = evidence
    return found


def _main_thread(dump: str) -> list[str]:
    """Frames of the main thread in faulthandler's output, the innermost first. It comes last: threads stand youngest first."""
    last = re.split(r"^(?:Current thread|Thread) 0x.*$", dump, flags=re.MULTILINE)[-1]
    return [line.strip() for line in last.splitlines() if line.startswith("  File")]


def _progress(found: dict[str, Any]) -> tuple[int, int]:
    """How far a rank has come: its step, and its last point there."""
    return found["step"], POINTS.index(found["point"]) if found["point"] in POINTS else -1


def conclusion(kind: str, ranks: dict[int, dict], failures: dict[int, dict]) -> tuple[int, list[int], str]:
    """(exit code, suspects, reason) of what was found on all nodes."""
    missing = sorted(rank for rank, found in ranks.items() if found.get("gone"))
    ours = {rank: failure for rank, failure in failures.items() if failure["ours"]}
    if kind == "hung" and ranks:
        idle = [r for r, found in ranks.items() if found["state"] == "T" or not found.get("waits", False)]
        if not idle or len(idle) == len(ranks) > 1:
            progress = {rank: _progress(found) for rank, found in ranks.items()}
            least = min(progress.values())
            idle = [rank for rank in ranks if progress[rank] == least]
        first = min(ranks.values(), key=lambda found: found["budget_seconds"] - found["silent_seconds"])
        names = ", ".join(f"rank {r} ({_where(ranks[r])})" for r in sorted(idle)[:8])
        return 75, sorted(idle), (
            f"no sign of life for {first['silent_seconds']:.0f} s in phase {first['phase']}, {first['budget_seconds']:.0f} s are allowed. "
            f"The others seem to wait for {names}."
        )  # fmt: skip
    if ours or (failures and not missing):
        chosen = ours or failures
        rank = min(chosen, key=lambda r: chosen[r]["time"])
        failure = chosen[rank]
        return failure["exit_code"], [rank], f"rank {rank}: {failure['kind']}: {failure['message']}"
    if kind == "orphaned":
        return 75, [], "what started the ranks (torchrun or the supervisor) is gone: they were ended."
    names = ", ".join(f"rank {r} ({_where(ranks[r])})" for r in missing[:8]) or "a rank"
    return 75, missing, f"{names} ended without a word: killed, out of memory, or a node lost."


def _where(found: dict[str, Any]) -> str:
    stopped = ", stopped" if found["state"] == "T" else ""
    stack = found.get("stack")
    inside = f", {stack[0]}" if isinstance(stack, list) and stack else ""
    return f"step {found['step']}, {found['point'] or found['phase']}{stopped}{inside}"


def main() -> None:
    folder, run, size, world_size, above = sys.argv[1:]
    started = [Process(**agent) for agent in json.loads(above)]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # it leaves with the last rank, not before
    try:
        Watchdog(Path(folder), Path(run), int(size), int(world_size), started).watch()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
