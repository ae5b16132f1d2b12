"""Promise 6: restart is one command."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from crash import PLAIN, QUICK, SUPERVISE, kill_agent, rows, same, status, torchrun
from ranks import on_ranks
from shared import LONG_SECONDS, wait_until

from megacpt import cli
from megacpt.config.load import load_recipe
from megacpt.config.run_layout import LEDGER
from megacpt.errors import ConfigError, SaveError
from megacpt.survive import supervise as module
from megacpt.survive.supervise import Options, _choose_nodes, _filled, judge, recipe_of, unusable_nodes

ROOT = Path(__file__).parents[2]


def start(*command: str, fault: str = "", options: tuple[str, ...] = (), **more) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MEGACPT_FAULT": fault}
    words = [*SUPERVISE[:-1], "--backoff", "0.1", *options, "--", *command]
    return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True, **more)


def supervise(*command: str, **more) -> tuple[int, str]:
    """(exit code, what it said)."""
    child = start(*command, **more)
    _, said = child.communicate(timeout=LONG_SECONDS)
    return child.returncode, said


def ledger(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / LEDGER).read_text().splitlines()]


def test_one_command_from_a_killed_rank_a_hang_and_a_killed_agent_to_the_end(whole, recipe_file, tmp_path):
    """torchrun with two ranks and one restart in place. Rank 1 is killed in step 3: torchrun starts anew, on the store of the first time,
    under keys of its own. Rank 0 hangs in step 5: torchrun has no restart left, the supervisor starts again. torchrun itself is killed,
    as the system does when memory is short, while rank 1 sleeps before step 7 and rank 0 waits for it: the ranks end, and the third
    attempt comes to the end, each step once, with the numbers of a run without."""
    run = tmp_path / "run"
    flags = [*QUICK, f"--run.directory={run}", "--health.watchdog=true", "--health.step_timeout_seconds=900"]
    fault = (
        f"kill:rank=1,point=after_forward,step=3,once={tmp_path}/1;"
        f"sleep:rank=0,point=after_backward,step=5,budget=4,once={tmp_path}/2;"
        f"sleep:rank=1,point=step.begin,step=7,once={tmp_path}/3"
    )
    words = torchrun(2, "--max-restarts=1", "--monitor-interval=0.2")
    child = start(*words, recipe_file(), *flags, fault=fault)
    wait_until((tmp_path / "3").exists, alive=[child.pid])
    wait_until(lambda: rows(run)[-1]["step"] == 6, alive=[child.pid])
    kill_agent(child.pid)
    _, said = child.communicate(timeout=LONG_SECONDS)
    assert child.returncode == 0, said[-3000:]
    found = ledger(run)
    assert [row["status"] for row in found] == ["hung", "killed", "finished"] and found[0]["suspects"] == [0]
    assert [(row["checkpoint_before"], row["checkpoint_after"]) for row in found] == [(0, 4), (4, 6), (6, 8)]
    assert 0 < found[-1]["effective_time"] < 1 and "effective training time" in said
    assert status(run)["attempt"] == 4
    same(run, whole)


def test_a_bad_recipe_is_not_tried_again(recipe_file, tmp_path):
    code, said = supervise(*PLAIN, recipe_file(), "--run.start=resume", f"--run.directory={tmp_path}/r")
    assert code == 2 and said.count("holds no checkpoint") == 1


def test_a_bad_recipe_is_not_tried_again_whatever_the_run_before_was(stopped):
    """Through torchrun, which makes every exit code 1. Yesterday the run was preempted, today its recipe is edited: once refused by the
    check, once by the comparison with the checkpoint's recipe, with and without a watchdog."""
    run, before = stopped.run, status(stopped.run)
    assert before["status"] == "preempted"
    flags = [*QUICK, f"--run.directory={run}"]
    for watchdog, flag, expected in (
        ("true", "--parallel.data_shard=3", "world size 1"),
        ("false", "--stages.s.seq_len=128", "It is frozen once the run has begun"),
    ):
        words = [*torchrun(1), stopped.recipe, *flags, flag, f"--health.watchdog={watchdog}"]
        code, said = supervise(*words, options=("--max-restarts", "3"))
        assert code == 2, said[-3000:]
        assert expected in said and status(run)["attempt"] == 1
    found = ledger(run)
    assert [(row["status"], row["exit_code"]) for row in found] == [("failed", 2)] * 2
    assert "frozen" in found[-1]["reason"] and status(run) == before


def test_what_needs_the_end_is_told_that_it_is_not_there(recipe_file, tmp_path, capfd):
    """`--require finished`, alone and under a supervisor: 3 for a run that was stopped, 0 for its end."""
    path, flags = recipe_file(), [*QUICK, f"--run.directory={tmp_path}/run", "--require", "finished"]
    assert on_ranks(1, cli.run, ["train", path, *flags, "--run.stop_at_step=2"]) == [3]
    assert "is saved and not finished" in capfd.readouterr().err
    assert supervise(*PLAIN, path, *flags, "--run.stop_at_step=4")[0] == 3
    assert on_ranks(1, cli.run, ["train", path, *flags]) == [0]
    assert "Export: megacpt export" in capfd.readouterr().err


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
    command = [*PLAIN, recipe_file(), *QUICK, f"--run.directory={tmp_path}/run"]
    code, said = supervise(*command, fault="kill:point=step.begin,step=2", options=("--max-restarts", "1"))
    assert code == 75 and len(ledger(tmp_path / "run")) == 2
    assert "2 attempts in a row brought no new checkpoint" in said
    assert [row["status"] for row in ledger(tmp_path / "run")] == ["killed", "killed"]


def test_a_stop_through_it_is_handed_on_and_not_started_again(recipe_file, tmp_path):
    run = tmp_path / "run"
    endless = [*QUICK, "--stages.s.tokens=1B", "--checkpoint.every_steps=1000000", f"--run.directory={run}"]
    child = start(*PLAIN, recipe_file(), *endless)
    wait_until((run / "metrics.jsonl").exists, alive=[child.pid])
    child.send_signal(signal.SIGUSR1)
    child.communicate(timeout=LONG_SECONDS)
    assert child.returncode == 0 and len(ledger(run)) == 1
    assert (status(run)["status"], status(run)["signal"]) == ("preempted", "SIGUSR1")


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
    def again(status, code=1, asked=False):
        return judge(status, code, asked)

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
    assert unusable_nodes(states) == {"n2", "n3"} and unusable_nodes("n1 inval\nn2 idle") == {"n1"}
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-4]")
    monkeypatch.setenv("NPROC", "2")
    monkeypatch.setattr(module, "_output", lambda *command: "n1\nn2\nn3\nn4\n" if command[0] == "scontrol" else states)
    recipe = load_recipe(recipe_file(), ["--parallel.tensor=2"])
    assert _choose_nodes(recipe, Options(min_nodes=1)) == ["n1", "n4"]
    with pytest.raises(SaveError, match=r"2 of 4 nodes are healthy, 3 are needed \(--min-nodes\)"):
        _choose_nodes(recipe, Options(min_nodes=3))
    monkeypatch.setenv("NPROC", "1")
    fixed = load_recipe(recipe_file(), ["--parallel.data_shard=1"])
    assert _choose_nodes(fixed, Options(min_nodes=1)) == ["n1"], "a layout of one process takes one node"
    assert _filled(["srun", "--nodes={num_nodes}", "--nodelist={nodes}"], ["n1", "n4"]) == [
        "srun",
        "--nodes=2",
        "--nodelist=n1,n4",
    ]


def test_pauses_grow_up_to_five_minutes():
    assert [module.pause(5.0, count) for count in (0, 1, 2, 3, 7, 8, 2000, 10**6)] == [5, 5, 10, 20, 300, 300, 300, 300]
    assert module.pause(0.0, 10**6) == 0.0


@pytest.mark.parametrize("command", ["/nowhere/command", "{folder}", "{folder}/text", "a\0b", "{folder}/text/x"])
def test_a_command_that_is_not_there_is_said_at_once(tmp_path, command):
    (tmp_path / "text").write_text("no program")
    with pytest.raises(ConfigError, match="cannot be started") as error:
        module._run_once([command.format(folder=tmp_path)], {}, None, None, Options())
    assert error.value.exit_code == 2


def test_slurm_that_is_not_there_or_does_not_answer(recipe_file, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-4]")
    monkeypatch.setenv("PATH", "/nowhere")
    recipe = load_recipe(recipe_file())
    with pytest.raises(ConfigError, match="scontrol: cannot be started"):
        _choose_nodes(recipe, Options())
    with pytest.raises(SaveError, match="ended with 3: no controller"):
        module._output("/bin/sh", "-c", "echo no controller >&2; exit 3")
    for wrong in ("gpu", "0", "-1", "²"):
        monkeypatch.setenv("NPROC", wrong)
        with pytest.raises(ConfigError, match="give a number from 1"):
            _choose_nodes(recipe, Options())
