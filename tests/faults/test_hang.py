"""Promises 4, 5 and 9: stop requests are honoured, no hang goes unseen, one rank's failure ends all."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from crash import events, rows, run_ranks, same, status
from shared import LONG_SECONDS, has_ended, is_blocked, wait_until

from megacpt.heartbeat import Beat, Heartbeat, begin, reach, read_beat
from megacpt.survive.watchdog import Watchdog, conclusion

WATCHED = ["--health.watchdog=true", "--health.step_timeout_seconds=900"]
"""What works has time on any machine; a fault that shall be seen soon says so itself (`budget`)."""


def evidence(run):
    """(folder, conclusion) of the one incident."""
    (folder,) = (run / "incidents").iterdir()
    return folder, json.loads((folder / "conclusion.json").read_text())


def told(run):
    """run.json, once the watchdog has written its part."""
    wait_until(lambda: "incident" in status(run), told=lambda: str(status(run)))
    return status(run)


@pytest.mark.parametrize("action, why", [("sleep", "in _cause"), ("stop", "stopped"), ("hold", "line")])
def test_a_hang_is_seen_and_named(whole, recipe_file, tmp_path, action, why):
    """Rank 1 sleeps, is stopped, or holds Python's lock in step 3; the collectives' own timeouts are far away."""
    run = tmp_path / "run"
    flags = [*WATCHED, f"--run.directory={run}"]
    codes, _ = run_ranks(2, recipe_file(), flags, f"{action}:rank=1,point=after_forward,step=3,budget=4")
    assert codes[0] == 75 and codes[1] in (75, -signal.SIGKILL), codes
    found = told(run)
    assert (found["status"], found["exit_code"], found["suspects"]) == ("hung", 75, [1]), found
    assert "rank 1 (step 3, after_forward" in found["reason"] and why in found["reason"]
    folder, _ = evidence(run)
    (node,) = (json.loads(path.read_text())["ranks"] for path in folder.glob("node-*.json"))
    assert (node["0"]["budget_seconds"], node["1"]["budget_seconds"]) == (900, 4), "the recipe's, and the fault's"
    stacks = {path.name: path.read_text() for path in folder.glob("rank-*.txt")}
    assert "train_step" in stacks["rank-00000.txt"]
    assert action == "stop" or "in _cause" in stacks["rank-00001.txt"]  # who is stopped cannot say where
    assert run_ranks(2, recipe_file(), [f"--run.directory={run}"])[0] == [0, 0]
    same(run, whole)


def test_a_hang_in_a_save_behind_the_training_is_seen(recipe_file, tmp_path):
    """The disk does not answer: the next save waits for the one before, and that has a budget."""
    run = tmp_path / "run"
    flags = [*WATCHED, f"--run.directory={run}", "--checkpoint.asynchronous=true", "--health.save_timeout_seconds=10"]
    codes, _ = run_ranks(2, recipe_file(), flags, "sleep:rank=1,point=save.after_shards,step=2")
    assert codes == [75, 75] and told(run)["status"] == "hung" and "phase save" in status(run)["reason"]
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4], "training went on meanwhile"


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_request_is_heard_inside_a_collective(whole, recipe_file, tmp_path, asked):
    """Rank 0 waits for rank 1 in a collective of step 3 when it is asked; the thread hears it there, the next step's own reduction takes
    it to all ranks, and that step is the last."""
    run, heard = tmp_path / "run", tmp_path / "heard"

    def slow():
        from megacpt.train.handlers import steps
        from megacpt.train.stop import StopRequest

        step, ask, calls = steps.train_step, StopRequest.ask, []

        def held(*args, **kwargs):
            calls.append(1)
            if len(calls) == 3:
                (tmp_path / f"in{os.environ['RANK']}").touch()
                if os.environ["RANK"] == "1":
                    wait_until((tmp_path / "go").exists)
            return step(*args, **kwargs)

        def told(self, why):
            ask(self, why)
            heard.touch()

        steps.train_step, StopRequest.ask = held, told

    def request(pids):
        wait_until(lambda: all((tmp_path / f"in{rank}").exists() for rank in (0, 1)), alive=pids)
        wait_until(lambda: is_blocked(pids[0]), alive=pids)
        os.kill(pids[0 if asked == signal.SIGTERM else 1], asked)
        wait_until(heard.exists, alive=pids)
        (tmp_path / "go").touch()

    codes, _ = run_ranks(2, recipe_file(), [f"--run.directory={run}"], prepare=slow, during=request)
    assert codes == [0, 0]
    why = asked.name if asked == signal.SIGTERM else "on another rank"
    assert (status(run)["status"], status(run)["exit_code"], status(run)["signal"]) == ("preempted", 0, why)
    assert len(rows(run)) == 4 and len(events(run, "stopped")) == 1
    assert (run / "checkpoints/step-00000004/manifest.json").exists()
    assert run_ranks(2, recipe_file(), [f"--run.directory={run}"])[0] == [0, 0]
    same(run, whole)


def test_a_second_stop_request_leaves_at_once(recipe_file, tmp_path):
    """Inside a collective that never ends. A SIGTERM that comes twice, as from a scheduler and from torchrun, is one request."""
    listened = tmp_path / "listened"

    def prepare():
        from megacpt.train import stop

        read, stop.REPEAT_SECONDS = os.read, LONG_SECONDS  # the two are one request, however slow the machine is

        def noted(file, count):
            if os.environ["RANK"] == "0" and threading.current_thread().name == "signals":
                with open(listened, "a") as log:  # it has dealt with all that came before
                    log.write("x")
            return read(file, count)

        os.read = noted

    def ask(pids):
        wait_until(lambda: (tmp_path / "run/metrics.jsonl").exists() and len(rows(tmp_path / "run")) == 2, alive=pids)
        wait_until(lambda: is_blocked(pids[0]), alive=pids)
        for number, count in ((signal.SIGTERM, 2), (signal.SIGTERM, 3)):
            os.kill(pids[0], number)
            wait_until(lambda count=count: listened.stat().st_size == count, alive=pids)
        os.kill(pids[0], signal.SIGINT)
        wait_until(lambda: has_ended(pids[0]))
        os.kill(pids[1], signal.SIGKILL)

    flags = [f"--run.directory={tmp_path}/run"]
    fault = "sleep:rank=1,point=step.begin,step=3"
    codes, _ = run_ranks(2, recipe_file(), flags, fault, prepare=prepare, during=ask)
    assert codes == [75, -9]


@pytest.mark.parametrize("point", ["step.begin", "save.before_rename"])
def test_one_rank_that_fails_ends_all(recipe_file, tmp_path, point):
    """An error of one rank, in a step or where only rank 0 works: the others leave, and nobody waits for a timeout."""
    run, rank = tmp_path / "run", 1 if point == "step.begin" else 0
    fault = f"raise:rank={rank},point={point},step=4"
    codes, _ = run_ranks(
        2, recipe_file(), [*WATCHED, f"--run.directory={run}"], fault, seconds=600
    )  # the timeouts are 900
    if point == "step.begin":
        assert codes[1] == 1 and codes[0] != 0
        found = told(run)
        assert found["status"] == "failed" and found["suspects"] == [1] and "a fault of the test" in found["reason"]
    else:  # a save that fails is tried again
        assert codes == [0, 0] and "rank 0: RuntimeError" in events(run, "save_failed")[0]["error"]


def test_bad_data_on_one_rank_is_what_run_json_says(recipe_file, tmp_path):
    """A token id outside the vocabulary, which one rank reads: 76, though the others see a lost connection."""

    def poison():
        from megacpt.data import loader

        make = loader.make_batch

        def bad(rows, *rest):
            batch = make(rows, *rest)
            if os.environ["RANK"] == "1" and (tmp_path / "run/metrics.jsonl").exists():
                from megacpt.errors import DataError

                raise DataError("domain a, document 7: token id 70000 is outside the model's vocabulary of 401.")
            return batch

        loader.make_batch = bad

    run = tmp_path / "run"
    codes, _ = run_ranks(2, recipe_file(), [*WATCHED, f"--run.directory={run}"], prepare=poison)
    assert codes[1] == 76 and codes[0] != 0
    found = told(run)
    assert (found["status"], found["exit_code"], found["suspects"]) == (
        "failed",
        76,
        [1],
    ) and "token id 70000" in found["reason"]


def test_a_killed_rank_is_named(recipe_file, tmp_path):
    run = tmp_path / "run"
    run_ranks(2, recipe_file(), [*WATCHED, f"--run.directory={run}"], "kill:rank=1,point=after_backward,step=3")
    found = told(run)
    assert (found["status"], found["exit_code"], found["suspects"]) == ("failed", 75, [1])
    assert "rank 1 (step 3, after_backward) ended without a word" in found["reason"]


def test_a_plain_process_that_hangs_leaves_with_75(recipe_file, tmp_path):
    """No torchrun: what a shell sees. The budget is the recipe's; it holds from the end of the first step, so no work falls under it."""
    environment = os.environ | {"MEGACPT_FAULT": "sleep:point=step.begin,step=2"}
    short = ["--health.watchdog=true", "--health.step_timeout_seconds=3"]
    flags = [*short, f"--run.directory={tmp_path}/run", "--validation=[]", "--log.tensorboard=false"]
    out = subprocess.run(
        [sys.executable, "-m", "megacpt", "train", recipe_file(), *flags],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 75 and told(tmp_path / "run")["status"] == "hung", out.stderr
    assert "megacpt watchdog: hung" in out.stderr or (tmp_path / "run/incidents").is_dir()


def rank_facts(**more):
    return {
        "step": 5,
        "point": "after_forward",
        "phase": "step",
        "state": "S",
        "silent_seconds": 9.0,
        "budget_seconds": 3.0,
    } | more


def test_who_is_named():
    """Without stacks, on a GPU, all ranks wait for their device: then it is the one that came least far."""
    waiting, idle = rank_facts(waits=True), rank_facts(waits=False)
    assert conclusion("hung", {0: waiting, 1: idle, 2: waiting}, {})[1] == [1]
    behind = rank_facts(waits=True, step=4)
    assert conclusion("hung", {0: waiting, 1: waiting, 2: behind}, {})[1] == [2]
    assert conclusion("hung", {0: waiting, 1: rank_facts(waits=True, state="T")}, {})[1] == [1]
    lost = {"kind": "RuntimeError", "message": "Connection closed", "exit_code": 1, "ours": False, "time": 1.0}
    ours = {"kind": "DataError", "message": "cut", "exit_code": 76, "ours": True, "time": 2.0}
    assert conclusion("failed", {0: waiting, 1: waiting}, {0: lost, 1: ours})[:2] == (76, [1])
    assert conclusion("died", {0: waiting, 1: rank_facts(gone=True)}, {0: lost})[:2] == (75, [1])


def test_a_heartbeat_is_read_whole_or_not_at_all(tmp_path):
    heart = Heartbeat(tmp_path / "beat", 3)
    assert read_beat(tmp_path / "beat") is None, "nothing said yet"
    begin(heart)
    try:
        reach("step.begin", 7)
        beat = read_beat(tmp_path / "beat")
        assert isinstance(beat, Beat) and (beat.rank, beat.step, beat.pid, beat.point) == (
            3,
            7,
            os.getpid(),
            "step.begin",
        )
        raw = bytearray((tmp_path / "beat").read_bytes())
        for i in range(0, len(raw), 7):
            torn = raw.copy()
            torn[i] ^= 255
            (tmp_path / "torn").write_bytes(torn)
            assert read_beat(tmp_path / "torn") is None
    finally:
        begin(None)


def test_the_watchdog_leaves_with_the_last_rank(tmp_path):
    """A rank that is done is no incident, and a rank that never came is not waited for."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)"])
    heart = Heartbeat(tmp_path / "rank-00000.beat", 0)
    heart.write(0.0, "done", "")
    watchdog = Watchdog(tmp_path, tmp_path / "run", 1, 1)
    child.wait()
    watchdog._look()
    watchdog.beats = {0: Beat(child.pid, 0, 1, 0.0, 0.0, "done", "")}
    watchdog._look = lambda: None
    watchdog.watch()
    assert not (tmp_path / "run").exists()


RANK = """
import sys, time
from pathlib import Path
from megacpt.heartbeat import Heartbeat
heart = Heartbeat(Path(sys.argv[1]) / f"rank-{int(sys.argv[2]):05d}.beat", int(sys.argv[2]))
heart.step = int(sys.argv[4])
heart.write(float(sys.argv[3]), "step", "after_forward")
time.sleep(7200)
"""


def test_nodes_tell_each_other(tmp_path, monkeypatch):
    """Two nodes with a watchdog and a rank each, that share nothing but the run directory: one rank is silent, both end, run.json names
    the one that came least far."""
    monkeypatch.setattr("megacpt.survive.watchdog.REPORT_SECONDS", LONG_SECONDS)
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"status": "running", "attempt": 3}))
    children, threads = [], []
    try:
        for rank, budget, step in ((0, 1e6, 7), (1, 0.5, 6)):
            folder = tmp_path / f"node{rank}"
            folder.mkdir()
            (folder / "attempt").write_text("attempt-3")
            words = [sys.executable, "-c", RANK, str(folder), str(rank), str(budget), str(step)]
            children.append(subprocess.Popen(words))

            def said(path=folder / f"rank-{rank:05d}.beat"):
                return (beat := read_beat(path)) and beat.pid

            wait_until(said, alive=[children[-1].pid])
            watchdog = Watchdog(folder, run, 1, 2)
            watchdog.node = f"node{rank}"
            threads.append(threading.Thread(target=watchdog.watch, daemon=True))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG_SECONDS)
        wait_until(lambda: all(has_ended(child.pid) for child in children))
    finally:
        for child in children:
            child.kill()
    assert [child.wait() for child in children] == [-signal.SIGUSR2] * 2, "no handler there: the first signal ends them"
    found = status(run)
    assert (found["status"], found["exit_code"], found["suspects"], found["attempt"]) == ("hung", 75, [1], 3)
    folder, _ = evidence(run)
    assert sorted(p.name for p in folder.glob("node-*.json")) == ["node-node0.json", "node-node1.json"]
    assert all(json.loads(p.read_text())["ranks"] for p in folder.glob("node-*.json"))


def test_heartbeats_lie_where_nobody_else_writes(tmp_path, monkeypatch):
    import tempfile

    from megacpt.errors import ConfigError
    from megacpt.survive.watchdog import _private_folder

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = _private_folder()
    assert folder.stat().st_mode & 0o777 == 0o700 and _private_folder() == folder
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match="others can write it"):
        _private_folder()
    folder.rmdir()
    folder.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    with pytest.raises(ConfigError, match="Remove it, or set TMPDIR"):
        _private_folder()
