"""Promise 6: restart is one command."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from crash import same, status

from megacpt.config.load import load_recipe
from megacpt.errors import ConfigError, SaveError
from megacpt.train import supervise as module
from megacpt.train.supervise import LEDGER, Options, _choose_nodes, _filled, ill_nodes, judge, recipe_of

ROOT = Path(__file__).parents[2]
QUICK = ["--validation=[]", "--log.tensorboard=false", "--checkpoint.every_steps=2", "--checkpoint.keep_last=3"]


def supervise(*command: str, fault: str = "", options: tuple[str, ...] = (), **more) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MEGACPT_FAULT": fault}
    words = [sys.executable, "-m", "megacpt", "supervise", "--backoff", "0.1", *options, "--", *command]
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=240, **more)


def ledger(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / LEDGER).read_text().splitlines()]


def test_one_command_from_a_killed_rank_and_a_hang_to_the_end(whole, recipe_file, tmp_path):
    """torchrun with two ranks: rank 1 is killed in step 3, rank 0 hangs in step 5. Three attempts, and the numbers of a run without."""
    run = tmp_path / "run"
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "megacpt",
        "train",
    ]
    flags = [*QUICK, f"--run.directory={run}", "--health.watchdog=true", "--health.step_timeout_seconds=4"]
    fault = f"kill:rank=1,point=after_forward,step=3,once={tmp_path}/1;sleep:rank=0,point=after_backward,step=5,once={tmp_path}/2"
    out = supervise(*torchrun, recipe_file(), *flags, fault=fault)
    assert out.returncode == 0, out.stderr[-3000:]
    found = ledger(run)
    assert [row["status"] for row in found] == ["failed", "hung", "finished"]
    assert [row["suspects"] for row in found[:2]] == [[1], [0]]
    assert [(row["checkpoint_before"], row["checkpoint_after"]) for row in found] == [(0, 2), (2, 4), (4, 8)]
    assert 0 < found[-1]["effective_time"] < 1 and "effective training time" in out.stderr
    assert status(run)["attempt"] == 3
    same(run, whole)


def test_torchrun_restarts_in_place(whole, recipe_file, tmp_path):
    """--max-restarts: the second attempt meets on the store of the first, under keys of its own."""
    run = tmp_path / "run"
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--max-restarts=2",
        "--monitor-interval=0.2",
    ]
    fault = f"kill:rank=1,point=after_backward,step=3,once={tmp_path}/1"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MEGACPT_FAULT": fault}
    flags = [*QUICK, f"--run.directory={run}", "--health.watchdog=true"]
    out = subprocess.run(
        [*words, "-m", "megacpt", "train", recipe_file(), *flags],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    assert status(run)["attempt"] == 2
    same(run, whole)


def test_a_bad_recipe_is_not_tried_again(recipe_file, tmp_path):
    out = supervise(
        sys.executable, "-m", "megacpt", "train", recipe_file(), "--run.start=resume", f"--run.directory={tmp_path}/r"
    )
    assert out.returncode == 2 and out.stderr.count("holds no checkpoint") == 1


def test_it_gives_up_where_nothing_moves(recipe_file, tmp_path):
    """A kill in every attempt before the first checkpoint."""
    command = [sys.executable, "-m", "megacpt", "train", recipe_file(), *QUICK, f"--run.directory={tmp_path}/run"]
    out = supervise(*command, fault="kill:point=step.begin,step=2", options=("--max-restarts", "1"))
    assert out.returncode == 75 and len(ledger(tmp_path / "run")) == 2
    assert "2 attempts in a row brought no new checkpoint" in out.stderr
    assert [row["status"] for row in ledger(tmp_path / "run")] == ["killed", "killed"]


def test_a_stop_through_it_is_handed_on_and_not_started_again(whole, recipe_file, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "megacpt", "train", recipe_file(), *QUICK, f"--run.directory={run}"]
    words = [sys.executable, "-m", "megacpt", "supervise", "--", *command]
    environment = os.environ | {"MEGACPT_FAULT": "sleep:point=step.begin,step=99;term:point=step.end,step=99"}
    child = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment)
    while not (run / "metrics.jsonl").exists():
        time.sleep(0.05)
    child.send_signal(signal.SIGUSR1)
    assert child.wait(60) == 0
    assert status(run)["status"] in ("preempted", "finished") and len(ledger(run)) == 1
    if status(run)["status"] == "preempted":
        assert status(run)["signal"] == "SIGUSR1"


def test_what_is_tried_again():
    again = lambda status, code=1, asked=False: judge(status, code, asked)
    assert again({"status": "finished"}) == 0
    assert again({"status": "preempted", "signal": None}) == 0, "the recipe's stop_at_step"
    assert again({"status": "preempted", "signal": "SIGTERM"}) is None, (
        "only the ranks heard it: a node that is taken away"
    )
    assert again({"status": "preempted", "signal": "SIGTERM"}, asked=True) == 0
    assert again({"status": "failed", "exit_code": 2}) == 2 and again({"status": "failed", "exit_code": 76}) == 76
    for end in (
        {"status": "failed", "exit_code": 1},
        {"status": "failed", "exit_code": 75},
        {"status": "hung"},
        {"status": "running"},
    ):
        assert again(end) is None and again(end, asked=True) == 75
    assert again({"status": "not started"}, 2) == 2 and again({"status": "not started"}, 1) is None


def test_the_recipe_of_a_command(recipe_file, tmp_path):
    path = recipe_file()
    recipe = recipe_of(["bash", "launch/torchrun.sh", path, f"--run.directory={tmp_path}/x", "--verbose"])
    assert recipe.directory == f"{tmp_path}/x"
    with pytest.raises(ConfigError, match="ends in .toml"):
        recipe_of(["bash", "train.sh"])


def test_nodes_that_are_left(recipe_file, monkeypatch):
    """Of four nodes one is drained and one does not answer; the layout divides two."""
    states = "n1 idle\nn2 drng\nn3 alloc*\nn4 mix\n"
    assert ill_nodes(states) == {"n2", "n3"}
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-4]")
    monkeypatch.setenv("NPROC", "2")
    monkeypatch.setattr(module, "_output", lambda *command: "n1\nn2\nn3\nn4\n" if command[0] == "scontrol" else states)
    recipe = load_recipe(recipe_file(), ["--parallel.tensor=2"])
    assert _choose_nodes(recipe, Options(min_nodes=1)) == ["n1", "n4"]
    with pytest.raises(SaveError, match=r"2 of 4 nodes are well, 3 are needed \(--min-nodes\)"):
        _choose_nodes(recipe, Options(min_nodes=3))
    monkeypatch.setenv("NPROC", "1")
    fixed = load_recipe(recipe_file(), ["--parallel.data_shard=1"])
    assert _choose_nodes(fixed, Options(min_nodes=1)) == ["n1"], "a layout of one process takes one node"
    assert _filled(["srun", "--nodes={num_nodes}", "--nodelist={nodes}"], ["n1", "n4"]) == [
        "srun",
        "--nodes=2",
        "--nodelist=n1,n4",
    ]
