"""Ranks that may die: runs of a tiny recipe on forked ranks with a fault armed, and what is left of them."""

import gc
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import forget_groups
from shared import LONG_SECONDS, has_ended, turn, wait_until

from megacpt import faults
from megacpt.config.load import load_recipe
from megacpt.survive.lease import process_state
from megacpt.train import loop

PLAIN = [sys.executable, "-m", "megacpt", "train"]
SUPERVISE = [sys.executable, "-m", "megacpt", "supervise", "--"]
EXACT = ("step", "tokens", "stage", "loss", "grad_norm", "lr", "batch_tokens", "domain_tokens", "seq_len", "skipped")
QUICK = ["--validation=[]", "--log.tensorboard=false", "--checkpoint.every_steps=2", "--checkpoint.keep_last=3"]


def _rank(rank: int, world_size: int, folder: str, path: str, flags: list[str], fault: str, prepare) -> None:
    gc.freeze()
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size)
    )
    code = 1
    try:
        forget_groups()
        dist.distributed_c10d._world.default_pg = None
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
        faults.arm(fault)
        if prepare:
            prepare()
        loop.train(load_recipe(path, [*QUICK, *flags]))
        code = 0
    except BaseException as error:
        code = getattr(error, "exit_code", 1)
        Path(f"{folder}/{rank}.error").write_text(f"{type(error).__name__}: {error}")
    finally:
        os._exit(code)


def run_ranks(
    world_size: int,
    path: str,
    flags: list[str],
    fault: str = "",
    prepare=None,
    during=None,
    seconds: float = LONG_SECONDS,
) -> tuple[list[int], list[str]]:
    """(exit codes, errors) of the ranks of one run; a code below 0 is a signal. No rank outlives it.

    Args:
        prepare: called on every rank before the run. during: called here with the ranks' pids while they run; what it waits for, it waits
            for with `wait_until(…, alive=pids)`.
    """
    with turn(world_size), tempfile.TemporaryDirectory() as folder:
        pids: list[int] = []
        try:
            for rank in range(world_size):
                pid = os.fork()
                if pid == 0:
                    _rank(rank, world_size, folder, path, flags, fault, prepare)
                pids.append(pid)
            if during:
                during(pids)

            def ended():
                return [pid for pid in pids if has_ended(pid)]

            wait_until(
                lambda: len(ended()) == world_size,
                seconds=seconds,
                told=lambda: f"Under {fault!r} {len(ended())} of {world_size} ranks have ended.",
            )
        finally:
            for pid in pids:
                if not has_ended(pid):
                    os.kill(pid, signal.SIGKILL)
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        told = [Path(f"{folder}/{rank}.error") for rank in range(world_size)]
        return codes, [p.read_text() if p.exists() else "" for p in told]


def torchrun(processes: int, *options: str) -> list[str]:
    """The beginning of a command line; the recipe and its flags come behind it."""
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *options]
    return [sys.executable, *words, "-m", "megacpt", "train"]


def descendants(pid: int) -> list[int]:
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *descendants(int(child))]
    return found


def kill_agent(supervisor: int) -> None:
    """SIGKILL for torchrun under a supervisor; returns when its ranks have ended."""
    (agent,) = (int(pid) for pid in Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split())
    ranks = [pid for pid in descendants(agent) if b"watchdog" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(agent, signal.SIGKILL)
    wait_until(lambda: not any(process_state(pid) for pid in ranks), told=lambda: f"ranks {ranks} of {agent} live on")


def rows(directory: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / name).read_text().splitlines()]


def events(directory: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in rows(directory, "events.jsonl") if event["kind"] == kind]


def exact(directory: Path) -> list[dict[str, Any]]:
    return [{key: row[key] for key in EXACT} for row in rows(directory)]


def weights(directory: Path, step: int) -> bytes:
    return b"".join(p.read_bytes() for p in sorted((directory / f"checkpoints/step-{step:08d}").glob("*.distcp")))


def status(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "run.json").read_text())


def same(directory: Path, whole: Path, step: int = 8) -> None:
    """The two runs ended alike, to the bit."""
    assert exact(directory) == exact(whole)
    assert weights(directory, step) == weights(whole, step)
    assert status(directory)["status"] == "finished"
