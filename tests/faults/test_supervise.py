"""Promise 6: restart is one command."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from crash import same, status
from shared import LONG_SECONDS, wait_until

from megacpt.config.load import load_recipe
from megacpt.errors import ConfigError, SaveError
from megacpt.survive import supervise as module
from megacpt.survive.supervise import LEDGER, Options, _choose_nodes, _filled, ill_nodes, judge, recipe_of

ROOT = Path(__file__).parents[2]
PLAIN = [sys.executable, "-m", "megacpt", "train"]
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node=2",
    "-m",
    "megacpt",
    "train",
]
QUICK = ["--validation=[]", "--log.tensorboard=false", "--checkpoint.every_steps=2", "--checkpoint.keep_last=3"]


def supervise(*command: str, fault: str = "", options: tuple[str, ...] = (), **more) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MEGACPT_FAULT": fault}
    words = [sys.executable, "-m", "megacpt", "supervise", "--backoff", "0.1", *options, "--", *command]
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=LONG_SECONDS, **more)


def ledger(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / LEDGER).read_text().splitlines()]


def test_one_command_from_a_killed_rank_and_a_hang_to_the_end(whole, recipe_file, tmp_path):
    """torchrun with two ranks: rank 1 is killed in step 3, rank 0 hangs in step 5. Three attempts, and the numbers of a run without."""
    run = tmp_path / "run"
    flags = [*QUICK, f"--run.directory={run}", "--health.watchdog=true", "--health.step_timeout_seconds=900"]
    fault = (
        f"kill:rank=1,point=after_forward,step=3,once={tmp_path}/1;"
        f"sleep:rank=0,point=after_backward,step=5,budget=4,once={tmp_path}/2"
    )
    out = supervise(*TORCHRUN, recipe_file(), *flags, fault=fault)
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
        timeout=LONG_SECONDS,
    )
    assert out.returncode == 0, out.stderr[-3000:]
    assert status(run)["attempt"] == 2
    same(run, whole)


def test_a_bad_recipe_is_not_tried_again(recipe_file, tmp_path):
    out = supervise(
        sys.executable, "-m", "megacpt", "train", recipe_file(), "--run.start=resume", f"--run.directory={tmp_path}/r"
    )
    assert out.returncode == 2 and out.stderr.count("holds no checkpoint") == 1


def test_a_bad_recipe_is_not_tried_again_whatever_the_run_before_was(recipe_file, tmp_path):
    """Through torchrun, which makes every exit code 1. Yesterday the run was preempted, today its recipe is edited: once refused by the
    check, once by the comparison with the checkpoint's recipe, with and without a watchdog."""
    run, path = tmp_path / "run", recipe_file()
    flags = [*QUICK, f"--run.directory={run}"]
    first = subprocess.run([*PLAIN, path, *flags, "--run.stop_at_step=2"], capture_output=True, text=True, timeout=LONG_SECONDS)
    assert first.returncode == 0 and status(run)["status"] == "preempted", first.stderr
    before = status(run)
    for watchdog, flag, said in (
        ("true", "--parallel.data_shard=3", "world size 2"),
        ("false", "--stages.s.seq_len=128", "It is frozen once the run has begun"),
    ):
        out = supervise(*TORCHRUN, path, *flags, flag, f"--health.watchdog={watchdog}", options=("--max-restarts", "3"))
        assert out.returncode == 2, out.stderr[-3000:]
        assert said in out.stderr and status(run)["attempt"] == 1
    found = ledger(run)
    assert [(row["status"], row["exit_code"]) for row in found] == [("failed", 2)] * 2 and "frozen" in found[-1][
        "reason"
    ]
    assert status(run) == before


def test_what_needs_the_end_is_told_that_it_is_not_there(recipe_file, tmp_path):
    """`--require finished`, alone and under a supervisor: 3 for a run that was stopped, 0 for its end."""
    flags = [*QUICK, f"--run.directory={tmp_path}/run", "--require", "finished"]
    stopped = subprocess.run([*PLAIN, recipe_file(), *flags, "--run.stop_at_step=2"], capture_output=True, text=True)
    assert stopped.returncode == 3 and "is saved and not finished" in stopped.stderr, stopped.stderr
    assert supervise(*PLAIN, recipe_file(), *flags, "--run.stop_at_step=4").returncode == 3
    ended = subprocess.run([*PLAIN, recipe_file(), *flags], capture_output=True, text=True)
    assert ended.returncode == 0 and "Export: megacpt export" in ended.stderr, ended.stderr


def test_sound_checkpoints_count_and_folders_do_not(whole, tmp_path):
    """A folder of a later step without a manifest, a checkpoint whose shard is cut, the same step saved anew."""
    checkpoints = tmp_path / "checkpoints"
    shutil.copytree(whole / "checkpoints", checkpoints)
    steps = module.list_steps(checkpoints)
    (checkpoints / "step-00090000").mkdir()
    assert module.newest_step(checkpoints) == steps[-1] == 8
    known = module._published(checkpoints)
    assert not module._brought_one(checkpoints, known)
    shutil.copytree(checkpoints / "step-00000008", checkpoints / "step-00000010")
    shard = next((checkpoints / "step-00000010").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert module.newest_step(checkpoints) == 8 and not module._brought_one(checkpoints, known), "cut"
    shutil.rmtree(checkpoints / "step-00000008")
    shutil.copytree(whole / "checkpoints/step-00000008", checkpoints / "step-00000008")
    os.utime(
        checkpoints / "step-00000008" / "manifest.json"
    )  # a copy has the time, and may have the place, of the one before
    assert module._brought_one(checkpoints, known), "step 8 was damaged, and is saved again"


def test_an_attempt_is_known_by_its_name(tmp_path):
    """Not by times: the ranks' clock may be hours behind, or run.json may say anything."""
    started = module._Started(tmp_path, "one", "yesterday.0")
    assert started.outcome() == {"status": "not started"}
    for time_said in (0.0, 9e99, "x", None):
        told = {"time": time_said, "status": "finished", "attempt_id": "yesterday.0"}
        (tmp_path / "run.json").write_text(json.dumps(told))
        assert started.status() == {}
        (tmp_path / "run.json").write_text(json.dumps(told | {"attempt_id": "one.0"}))
        assert started.status()["status"] == "finished"
        (tmp_path / "run.json").write_text(json.dumps(told | {"attempt_id": "two.0"}))
        assert started.status() == {}, "of another supervisor"
        (tmp_path / "run.json").write_text(json.dumps(told | {"attempt_id": "20260101-000000-abcdef"}))
        assert started.status()["status"] == "finished", "the launcher hands no environment on: they named themselves"


def test_it_gives_up_where_nothing_moves(recipe_file, tmp_path):
    """A kill in every attempt before the first checkpoint."""
    command = [sys.executable, "-m", "megacpt", "train", recipe_file(), *QUICK, f"--run.directory={tmp_path}/run"]
    out = supervise(*command, fault="kill:point=step.begin,step=2", options=("--max-restarts", "1"))
    assert out.returncode == 75 and len(ledger(tmp_path / "run")) == 2
    assert "2 attempts in a row brought no new checkpoint" in out.stderr
    assert [row["status"] for row in ledger(tmp_path / "run")] == ["killed", "killed"]


def test_a_stop_through_it_is_handed_on_and_not_started_again(recipe_file, tmp_path):
    run = tmp_path / "run"
    endless = [*QUICK, "--stages.s.tokens=1B", "--checkpoint.every_steps=1000000", f"--run.directory={run}"]
    words = [sys.executable, "-m", "megacpt", "supervise", "--", *PLAIN, recipe_file(), *endless]
    child = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    wait_until((run / "metrics.jsonl").exists, alive=[child.pid])
    child.send_signal(signal.SIGUSR1)
    assert child.wait(LONG_SECONDS) == 0
    assert (status(run)["status"], status(run)["signal"]) == ("preempted", "SIGUSR1") and len(ledger(run)) == 1


def test_a_request_that_comes_twice_is_one(monkeypatch):
    """A scheduler signals every process, and its batch script hands the signal on."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    stop, clock = module._Stop(), [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    for seconds, number, count in (
        (0, "SIGUSR1", 1),
        (1, "SIGTERM", 1),
        (9, "SIGTERM", 1),
        (11, "SIGTERM", 2),
        (12, "SIGINT", 3),
    ):
        clock[0] = 100.0 + seconds
        stop._receive(getattr(signal, number), None)
        assert len(stop.received) == count


def test_what_is_tried_again():
    again = lambda status, code=1, asked=False: judge(status, code, asked)
    assert again({"status": "finished"}) == 0
    assert again({"status": "preempted", "signal": None}) == 0, "the recipe's stop_at_step"
    assert again({"status": "preempted", "signal": "SIGTERM"}) is None, (
        "only the ranks heard it: a node that is taken away"
    )
    assert again({"status": "preempted", "signal": "SIGTERM"}, asked=True) == 0
    assert again({"status": "preempted", "signal": "stop-request"}) == 0, "a person asked for it"
    assert judge({"status": "preempted", "signal": None}, 3, False, unfinished=3) == 3
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
    assert ill_nodes(states) == {"n2", "n3"} and ill_nodes("n1 inval\nn2 idle") == {"n1"}
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
