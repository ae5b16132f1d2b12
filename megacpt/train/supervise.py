"""Starts a training command again after an end that may be tried again: a kill, a hang, a lost node, a stop that only the ranks heard.
What happened is read from run.json, not from an exit code, which torchrun turns into 1. Every attempt is a line of ledger.jsonl.

On a Slurm cluster it runs once, on the batch host, around srun; each attempt takes the nodes of the job that are still well.
Imports no torch.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacpt import log
from megacpt.checkpoint.manifest import list_steps
from megacpt.config.load import load_recipe
from megacpt.config.recipe import Recipe
from megacpt.config.rules import problems_of
from megacpt.errors import ConfigError, SaveError
from megacpt.files import Journal
from megacpt.train.run_directory import read_status, useful_seconds

LEDGER = "ledger.jsonl"
ILL = ("down", "drain", "drng", "drained", "fail", "failg", "unk", "boot", "pow", "maint")
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


def supervise(command: Sequence[str], options: Options) -> int:
    """Runs the command until its run is finished, stopped through this process, or beyond help. Returns the exit code."""
    recipe = recipe_of(command)
    run, barren, attempt = Path(recipe.directory), 0, 0
    stop, ledger = _Stop(), Journal(run / LEDGER, _told)
    while True:
        attempt += 1
        nodes = _choose_nodes(recipe, options) if "SLURM_JOB_NODELIST" in os.environ else []
        before, begin = max(list_steps(run / "checkpoints"), default=0), time.time()
        code = _run_once(_filled(command, nodes), _environment(nodes, attempt), run, begin, stop, options)
        status, after = read_status(run), max(list_steps(run / "checkpoints"), default=0)
        if status.get("time", 0) < begin:  # this attempt did not come so far
            status = {"status": "not started"}
        verdict = judge(status, code, stop.asked)
        row = {
            "attempt": attempt,
            "began": round(begin, 3),
            "seconds": round(time.time() - begin, 3),
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
        barren = 0 if after > before else barren + 1
        if barren > options.max_restarts:
            log.warn(
                f"{barren} attempts in a row brought no new checkpoint (--max-restarts {options.max_restarts}): {run}/{LEDGER}"
            )
            return SaveError.exit_code
        stop.wait(min(300.0, options.backoff_seconds * 2 ** max(0, barren - 1)))
        if stop.asked:
            return 0 if status["status"] == "preempted" else SaveError.exit_code


def _told(ledger: Journal, problem: str) -> None:
    state = f"{problem}. Lines are kept and written when that works again." if problem else "is written again"
    log.warn(f"{ledger.path}: {state}")


def judge(status: dict[str, Any], code: int, asked: bool) -> int | None:
    """The exit code with which to leave, or None to start again.

    Args:
        status: run.json. code: of the command. asked: whether this process was asked to stop.
    """
    match status["status"]:
        case "finished":
            return 0
        case "preempted" if asked or not status.get("signal"):  # by us, or the recipe's stop_at_step
            return 0
        case "failed" if status.get("exit_code") in (2, 76):  # a restart would find the same
            return status["exit_code"]
        case "not started" if code in (2, 76):
            return code
    return SaveError.exit_code if asked else None


def effective_time(run: Path) -> float | None:
    """Seconds of steps whose updates the weights hold, over all since the run was first started."""
    first = read_status(run).get("first_started")
    return round(min(1.0, useful_seconds(run) / max(1e-9, time.time() - first)), 4) if first else None


def _percent(run: Path) -> str:
    share = effective_time(run)
    return "unknown" if share is None else f"{100 * share:.1f} %"


class _Stop:
    """SIGTERM, SIGINT and SIGUSR1 are for the run: they are handed on as SIGTERM, and it is not started again."""

    def __init__(self) -> None:
        self.asked, self.child = False, None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame) -> None:
        self.asked = True
        if self.child and self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)

    def wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self.asked and time.monotonic() < until:
            time.sleep(0.1)


def _run_once(
    command: list[str], environment: dict[str, str], run: Path, begin: float, stop: _Stop, options: Options
) -> int:
    stop.child = child = subprocess.Popen(command, env=environment, start_new_session=True)
    over = None
    while child.poll() is None:
        time.sleep(0.2)
        status = read_status(run)
        if status.get("time", 0) >= begin and status.get("status") in ("hung", "failed", "finished"):
            over = over or time.monotonic()
            if time.monotonic() - over > options.patience_seconds:
                log.warn(f"the run is {status['status']}, and its command still there: it is ended")
                _end(child)
    return child.returncode


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


def _environment(nodes: list[str], attempt: int) -> dict[str, str]:
    """What launch/torchrun.sh reads: every attempt meets under a name of its own."""
    job = os.environ.get("SLURM_JOB_ID", str(os.getpid()))
    more = {"RUN_ID": f"{os.environ.get('RUN_ID', job)}-{attempt}"}
    if nodes:
        port = os.environ.get("RENDEZVOUS", ":29500").rpartition(":")[2]
        more |= {"NNODES": str(len(nodes)), "RENDEZVOUS": f"{nodes[0]}:{port}"}
    return os.environ | more


def _filled(command: Sequence[str], nodes: list[str]) -> list[str]:
    """The command with {nodes} and {num_nodes} of this attempt in it. No shell reads it."""
    filled = lambda text: text.replace("{nodes}", ",".join(nodes)).replace("{num_nodes}", str(len(nodes)))
    return [filled(text) for text in command]


def _choose_nodes(recipe: Recipe, options: Options) -> list[str]:
    """The job's nodes that are well, as many as the recipe's layouts divide.

    Raises:
        SaveError: if they are fewer than `min_nodes`, or no number of them fits.
    """
    each = int(os.environ.get("NPROC") or os.environ.get("SLURM_GPUS_ON_NODE") or 1)
    names = _output("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()
    well = [name for name in names if name not in ill_nodes(_states(names))]
    for count in range(len(well), options.min_nodes - 1, -1):
        if count and not problems_of(recipe, count * each):
            return well[:count]
    problem = problems_of(recipe, max(1, len(well)) * each)
    raise SaveError(
        f"{len(well)} of {len(names)} nodes are well, {options.min_nodes} are needed (--min-nodes)"
        + (f"; with {each} processes each: {problem[0]}" if problem else ".")
    )


def _states(names: Sequence[str]) -> str:
    return _output("sinfo", "--noheader", "--Node", "--format=%N %t", f"--nodes={','.join(names)}")


def ill_nodes(states: str) -> set[str]:
    """Names of nodes that cannot be used, from lines "name state" of sinfo."""
    rows = (line.split()[:2] for line in states.splitlines() if len(line.split()) >= 2)
    return {name for name, state in rows if state.lower().startswith(ILL) or state.endswith("*")}


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
