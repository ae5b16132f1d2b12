"""Starts a training command again after an end that may be tried again: a kill, a hang, a lost node, a stop that only the ranks heard.
What happened is read from run.json and from what the ranks left in incidents/, not from an exit code, which torchrun turns into 1. What
belongs to an attempt is known by its name, not by times, which two machines see differently. Every attempt is a line of ledger.jsonl.

A stop request is handed on as a file in the run directory (lease.py), because a signal does not pass every launcher: srun kills its tasks.
A closed terminal ends nothing. Ranks end when their supervisor is gone.

On a Slurm cluster it runs once, on the batch host, around srun; each attempt takes the nodes of the job that are still healthy.
Imports no torch.
"""

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacpt import log
from megacpt.checkpoint.manifest import MANIFEST, directory_name, list_steps, read_manifest
from megacpt.config.load import load_recipe
from megacpt.config.recipe import Recipe
from megacpt.config.rules import problems_of
from megacpt.config.run_layout import CHECKPOINTS, LEDGER, STOP_REQUEST, misplaced, path_problems
from megacpt.errors import UNFINISHED, CheckpointError, ConfigError, SaveError
from megacpt.files import Journal
from megacpt.survive.lease import REPEAT_SECONDS, Supervised, new_attempt, process_of, request_stop
from megacpt.survive.run_directory import read_status, useful_seconds
from megacpt.survive.watchdog import read_conclusion

UNUSABLE_STATES = ("down", "drain", "drng", "drained", "fail", "failg", "unk", "boot", "pow", "maint", "inval", "futr")
"""Beginnings of the states in which Slurm's sinfo shows a node that cannot be used; a star behind one: it does not answer."""


@dataclass(frozen=True)
class Options:
    """Attributes:
    max_restarts: attempts in a row that may bring no new checkpoint.
    backoff_seconds: before the first of them; doubled for each further one, up to five minutes.
    min_nodes: fewest nodes to go on with, on Slurm.
    patience_seconds: for a command that has not left although run.json says that its run is over.
    """

    max_restarts: int = 10
    backoff_seconds: float = 5.0
    min_nodes: int = 1
    patience_seconds: float = 120.0


def recipe_of(command: Sequence[str]) -> Recipe:
    """The recipe that a command trains: its first argument that ends in .toml, with the overrides behind it.

    Raises:
        ConfigError: if there is none.
    """
    found = next((i for i, argument in enumerate(command) if argument.endswith(".toml")), None)
    if found is None:
        raise ConfigError(
            [
                f"no argument of {' '.join(command) or 'the empty command'} ends in .toml. Write: megacpt supervise -- bash "
                "launch/torchrun.sh recipe.toml"
            ],
            "the arguments",
        )
    flags = [a for a in command[found + 1 :] if a.startswith("--") and "." in a.partition("=")[0]]
    return load_recipe(command[found], flags)


def status_of(command: Sequence[str]) -> str:
    """The status in run.json of the run that a command trains; "unknown" without one."""
    return read_status(Path(recipe_of(command).directory)).get("status", "unknown")


def supervise(command: Sequence[str], options: Options) -> int:
    """Runs the command until its run is finished, stopped through this process, or beyond help. Returns the exit code."""
    recipe = recipe_of(command)
    run = Path(recipe.directory)
    if problems := path_problems(recipe.directory) or misplaced(run):
        raise ConfigError(problems)
    without_progress, attempt = 0, 0
    checkpoints, unfinished = run / CHECKPOINTS, UNFINISHED if _requires_the_end(command) else 0
    stop, ledger = _Stop(), Journal(run / LEDGER, _report_journal)
    while True:
        attempt += 1
        nodes = _choose_nodes(recipe, options) if "SLURM_JOB_NODELIST" in os.environ else []
        started = _Started(run, new_attempt(), read_status(run).get("attempt_id"))
        before, known, begin = newest_step(checkpoints), _published(checkpoints), time.monotonic()
        began = time.time()
        code = _run_once(_filled(command, nodes), _environment(nodes, attempt, started.name), started, stop, options)
        status, after = started.outcome(), newest_step(checkpoints)
        verdict = judge(status, code, stop.asked, unfinished)
        row = {
            "attempt": attempt,
            "attempt_id": started.name,
            "began": round(began, 3),
            "seconds": round(time.monotonic() - begin, 3),
            "status": "killed" if status["status"] == "running" else status["status"],
            "exit_code": status.get("exit_code"),
            "reason": status.get("reason"),
            "suspects": status.get("suspects"),
            "checkpoint_before": before,
            "checkpoint_after": after,
            "nodes": nodes,
            "effective_time": effective_time(run),
        }
        if run.is_dir():
            ledger.add((json.dumps(row) + "\n").encode())
        log.info(
            f"attempt {attempt}: {row['status']}, checkpoint of step {after}, effective training time {_percent(run)}"
        )
        if verdict is not None:
            return verdict
        without_progress = 0 if _brought_one(checkpoints, known) else without_progress + 1
        if without_progress > options.max_restarts:
            log.warn(
                f"{without_progress} attempts in a row brought no new checkpoint (--max-restarts {options.max_restarts}): {run}/{LEDGER}"
            )
            return SaveError.exit_code
        stop.wait(pause(options.backoff_seconds, without_progress))
        if stop.asked:
            return unfinished if status["status"] == "preempted" else SaveError.exit_code


def pause(first_seconds: float, without_progress: int) -> float:
    """Seconds before the next attempt: doubled with each attempt in a row that brought no new checkpoint, up to five minutes."""
    return min(300.0, first_seconds * 2.0 ** min(32, max(0, without_progress - 1)))


def _report_journal(ledger: Journal, problem: str) -> None:
    state = f"{problem}. Lines are kept and written when that works again." if problem else "is written again"
    log.warn(f"{ledger.path}: {state}")


def judge(status: dict[str, Any], code: int, asked: bool, unfinished: int = 0) -> int | None:
    """The exit code with which to leave, or None to start again.

    Args:
        status: what became of the attempt. code: of the command. asked: whether this process was asked to stop.
        unfinished: the exit code for a run that was stopped on request.
    """
    match status["status"]:
        case "finished":
            return 0
        # by us, by a person, or by the recipe's stop_at_step
        case "preempted" if asked or status.get("signal") in (None, STOP_REQUEST):
            return unfinished
        case "failed" if status.get("exit_code") in (2, 76):  # a restart would find the same
            return status["exit_code"]
        case "not started" if code in (2, 76):
            return code
    return SaveError.exit_code if asked else None


@dataclass(frozen=True)
class _Started:
    """One attempt.

    Attributes:
        name: told to the ranks, which write it into run.json. before: what stood there when it began.
    """

    run: Path
    name: str
    before: str | None

    def status(self) -> dict[str, Any]:
        """run.json, if this attempt wrote it. A launcher that hands no environment on, as ssh, lets the ranks name themselves."""
        found = read_status(self.run)
        theirs = found.get("attempt_id", "")
        ours = theirs.partition(".")[0] == self.name or ("." not in theirs and theirs != (self.before or ""))
        return found if ours and "status" in found else {}

    def outcome(self) -> dict[str, Any]:
        return self.status() or read_conclusion(self.run, self.name) or {"status": "not started"}


def newest_step(checkpoints: Path) -> int:
    """Of the newest checkpoint whose manifest and sizes are right; 0 without one."""
    return next((step for step in reversed(list_steps(checkpoints)) if _is_sound(checkpoints, step)), 0)


def _is_sound(checkpoints: Path, step: int) -> bool:
    try:
        read_manifest(checkpoints / directory_name(step))
        return True
    except CheckpointError:
        return False


def _published(checkpoints: Path) -> dict[int, tuple[int, int]]:
    """What tells a checkpoint from another one of the same step."""
    found = {}
    for step in list_steps(checkpoints):
        with contextlib.suppress(OSError):
            info = (checkpoints / directory_name(step) / MANIFEST).stat()
            found[step] = info.st_ino, info.st_mtime_ns
    return found


def _brought_one(checkpoints: Path, known: dict[int, tuple[int, int]]) -> bool:
    """Whether there is a sound checkpoint that was not there before, be it of a step that was."""
    now = _published(checkpoints)
    return any(mark != known.get(step) and _is_sound(checkpoints, step) for step, mark in now.items())


def _requires_the_end(command: Sequence[str]) -> bool:
    pairs = zip(command, [*command[1:], ""], strict=True)
    return any(pair == ("--require", "finished") or pair[0] == "--require=finished" for pair in pairs)


def effective_time(run: Path) -> float | None:
    """Seconds of steps whose updates the weights hold, over all since the run was first started."""
    first = read_status(run).get("first_started")
    return round(min(1.0, useful_seconds(run) / max(1e-9, time.time() - first)), 4) if first else None


def _percent(run: Path) -> str:
    share = effective_time(run)
    return "unknown" if share is None else f"{100 * share:.1f} %"


class _Stop:
    """SIGTERM, SIGINT and SIGUSR1 are for the run: it is asked to save and leave, and is not started again. A second one asks it to leave
    at once, a third ends it; where a scheduler signals all processes and its batch script, too, SIGTERM and SIGUSR1 come twice for one
    reason, so these must be ten seconds apart. SIGHUP is nothing: the terminal is gone, the run is not."""

    def __init__(self) -> None:
        self.received: list[str] = []
        self.last = 0.0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._receive)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    @property
    def asked(self) -> bool:
        return bool(self.received)

    def _receive(self, number: int, frame) -> None:
        now = time.monotonic()
        if not self.received or number == signal.SIGINT or now - self.last > REPEAT_SECONDS:
            self.received.append(signal.Signals(number).name)
            self.last = now

    def wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self.asked and time.monotonic() < until:
            time.sleep(0.1)


def _run_once(command: list[str], environment: dict[str, str], started: _Started, stop: _Stop, options: Options) -> int:
    try:
        child = subprocess.Popen(command, env=environment, start_new_session=True)
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        why = getattr(error, "strerror", None) or error
        if getattr(error, "errno", None) in (errno.EAGAIN, errno.ENOMEM):
            raise SaveError(f"{command[0]}: cannot be started at present ({why}).") from None
        raise ConfigError(
            [f"{command[0]}: cannot be started ({why}). Give a command that is there."], "the arguments"
        ) from None
    over, handed_on = None, 0
    try:
        while child.poll() is None:
            time.sleep(0.2)
            if len(stop.received) > handed_on:
                handed_on = len(stop.received)
                _hand_on(stop.received, started, child)
            status = started.status().get("status")
            if status in ("hung", "failed", "finished", "preempted"):
                over = over or time.monotonic()
                if time.monotonic() - over > options.patience_seconds:
                    log.warn(f"the run is {status}, and its command still there: it is ended")
                    _end(child)
    finally:
        if child.poll() is None:
            _end(child)
    return child.returncode


def _hand_on(received: list[str], started: _Started, child: subprocess.Popen) -> None:
    if len(received) > 2:
        _end(child)
        return
    log.info(f"{received[-1]}: the run is asked to {'leave at once' if len(received) > 1 else 'save and leave'}")
    try:
        request_stop(started.run, started.name, received[-1], at_once=len(received) > 1)
    except OSError as error:
        log.warn(f"{started.run}: no stop request can be written there ({error.strerror}); SIGTERM goes to the command")
        child.send_signal(signal.SIGTERM)


def _end(child: subprocess.Popen) -> None:
    for number, seconds in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(child.pid, number)
            child.wait(seconds)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _environment(nodes: list[str], attempt: int, name: str) -> dict[str, str]:
    """What launch/torchrun.sh reads: every attempt meets under a name of its own. And what the ranks are told of their supervisor."""
    job = os.environ.get("SLURM_JOB_ID", str(os.getpid()))
    more = {"RUN_ID": f"{os.environ.get('RUN_ID', job)}-{attempt}"} | Supervised(
        name, process_of(os.getpid())
    ).environment()
    if nodes:
        port = os.environ.get("RENDEZVOUS", ":29500").rpartition(":")[2]
        more |= {"NNODES": str(len(nodes)), "RENDEZVOUS": f"{nodes[0]}:{port}"}
    return os.environ | more


def _filled(command: Sequence[str], nodes: list[str]) -> list[str]:
    """The command with {nodes} and {num_nodes} of this attempt in it. No shell reads it."""
    return [text.replace("{nodes}", ",".join(nodes)).replace("{num_nodes}", str(len(nodes))) for text in command]


def _choose_nodes(recipe: Recipe, options: Options) -> list[str]:
    """The job's healthy nodes, as many as the recipe's layouts divide.

    Raises:
        SaveError: if they are fewer than `min_nodes`, or no number of them fits.
    """
    given = os.environ.get("NPROC") or os.environ.get("SLURM_GPUS_ON_NODE") or "1"
    each = int(given) if re.fullmatch("[0-9]{1,6}", given) else 0
    if not each:
        raise ConfigError(
            [f"{given} processes a node (NPROC, SLURM_GPUS_ON_NODE): give a number from 1."], "the environment"
        )
    names = _output("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    unusable = unusable_nodes(_states(names))
    healthy = [name for name in names if name not in unusable]
    for count in range(len(healthy), options.min_nodes - 1, -1):
        if count and not problems_of(recipe, count * each):
            return healthy[:count]
    problem = problems_of(recipe, max(1, len(healthy)) * each)
    raise SaveError(
        f"{len(healthy)} of {len(names)} nodes are healthy, {options.min_nodes} are needed (--min-nodes)"
        + (f"; with {each} processes each: {problem[0]}" if problem else ".")
    )


def _states(names: Sequence[str]) -> str:
    return _output("sinfo", "--noheader", "--Node", "--format=%N %t", f"--nodes={','.join(names)}")


def unusable_nodes(states: str) -> set[str]:
    """Names of nodes that cannot be used, from lines "name state" of sinfo."""
    rows = (line.split()[:2] for line in states.splitlines() if len(line.split()) >= 2)
    return {name for name, state in rows if state.lower().startswith(UNUSABLE_STATES) or state.endswith("*")}


def _output(*command: str) -> str:
    """Raises ConfigError if the command is not there, SaveError if it fails: Slurm's controller may be back later."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise ConfigError(
            [f"{command[0]}: cannot be started ({error.strerror}), but SLURM_JOB_NODELIST is set."], "the environment"
        ) from None
    if done.returncode:
        raise SaveError(f"{' '.join(command)}: ended with {done.returncode}: {done.stderr.strip()[:500]}")
    return done.stdout
