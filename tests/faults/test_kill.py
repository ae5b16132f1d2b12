"""Promises 1 and 2: a kill at any point of a step or of a save loses at most the steps since the last checkpoint."""

import os
import signal

import pytest
from crash import QUICK, events, rows, run_ranks, same, status, weights

from megacpt.checkpoint.manifest import list_steps, verify
from megacpt.heartbeat import POINTS

STEP_POINTS = [p for p in POINTS if not p.startswith("save.") and p != "evaluate"]
SAVE_POINTS = [p for p in POINTS if p.startswith("save.")]
KILLED = -signal.SIGKILL


ALL = ("after_backward", "step.end")
"""Where both ranks are killed: the resume does not see how many were, only what is on the disk, which within a step and at its end differs
by a row."""
KILLS = [*((point, "rank=1,") for point in STEP_POINTS), *((point, "") for point in ALL)]


@pytest.mark.parametrize("point, who", KILLS, ids=[f"{'one' if who else 'all'}-{point}" for point, who in KILLS])
def test_a_kill_in_a_step_loses_what_came_after_the_checkpoint(whole, stopped, point, who):
    """In step 5, by a job that went on from step 4."""
    run = stopped.run
    flags = [f"--run.directory={run}"]
    codes, _ = run_ranks(2, stopped.recipe, flags, f"kill:{who}point={point},step=5")
    assert codes[1] == KILLED and (codes[0] == KILLED if not who else codes[0] != 0), codes
    assert list_steps(run / "checkpoints") == [2, 4] and len(rows(run)) in (4, 5)
    assert run_ranks(2, stopped.recipe, flags)[0] == [0, 0]
    assert status(run)["started_at_step"] == 4
    same(run, whole)


@pytest.mark.parametrize("point", SAVE_POINTS)
@pytest.mark.parametrize("asynchronous", ["false", "true"], ids=["waiting", "behind"])
def test_a_kill_in_a_save_loses_what_came_after_the_checkpoint(whole, stopped, point, asynchronous):
    """The save of step 6 is cut short on rank 0, or on both: what there is is whole, and the rest does not block the next save."""
    run = stopped.run
    flags = [f"--run.directory={run}", f"--checkpoint.asynchronous={asynchronous}"]
    everywhere = point in ("save.staged", "save.after_shards")
    codes, _ = run_ranks(2, stopped.recipe, flags, f"kill:{'' if everywhere else 'rank=0,'}point={point},step=6")
    assert codes[0] == KILLED and codes[1] != 0, codes
    published = [2, 4, 6] if point in ("save.after_rename", "save.before_prune") else [2, 4]
    assert list_steps(run / "checkpoints") == published
    assert all(verify(run / f"checkpoints/step-{step:08d}") for step in published)
    assert run_ranks(2, stopped.recipe, flags)[0] == [0, 0]
    assert status(run)["started_at_step"] == published[-1]
    assert [p.name for p in (run / "checkpoints").iterdir() if p.name.startswith(".")] == []
    same(run, whole)


@pytest.mark.parametrize("point", ["save.after_shards", "save.before_manifest", "save.after_rename"])
def test_without_rename_the_manifest_decides(whole, stopped, point):
    run = stopped.run
    flags = [f"--run.directory={run}", "--checkpoint.publish=manifest"]
    codes, _ = run_ranks(2, stopped.recipe, flags, f"kill:rank=0,point={point},step=6")
    assert codes[0] == KILLED
    assert run_ranks(2, stopped.recipe, flags)[0] == [0, 0]
    assert status(run)["started_at_step"] == (6 if point == "save.after_rename" else 4)
    same(run, whole)


def test_the_comparison_sees_a_lost_step(whole, recipe_file, tmp_path):
    """The twin: a run that trains one step twice ends elsewhere."""
    part = tmp_path / "part"

    def twice():
        from megacpt.train.handlers import steps

        step, count = steps.train_step, []

        def doubled(*args, **kwargs):
            count.append(1)
            if len(count) == 3:
                step(*args, **kwargs)
            return step(*args, **kwargs)

        steps.train_step = doubled

    run_ranks(2, recipe_file(), [f"--run.directory={part}"], prepare=twice)
    assert weights(part, 8) != weights(whole, 8)


def test_a_flipped_bit_behind_the_writer_is_never_published(whole, stopped):
    """Between writing and publishing a bit of a shard turns: that save fails on all ranks, the run goes on, saves again, ends alike."""
    run = stopped.run
    flags = [f"--run.directory={run}"]
    assert run_ranks(2, stopped.recipe, flags, "flip:rank=1,point=save.after_shards,step=6")[0] == [0, 0]
    (failed,) = events(run, "save_failed")
    assert failed["step"] == 6 and "rank 1" in failed["error"] and "it is damaged" in failed["error"]
    assert list_steps(run / "checkpoints") == [2, 4, 8]
    same(run, whole)


def test_a_damaged_newest_is_found_by_who_reads_it(whole, stopped):
    """One bit of rank 1's shard: both ranks go back to the checkpoint before, and say which one was bad."""
    run = stopped.run
    shard = sorted((run / "checkpoints/step-00000004").glob("*.distcp"))[1]
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 16
    shard.write_bytes(raw)
    assert run_ranks(2, stopped.recipe, [f"--run.directory={run}"])[0] == [0, 0]
    assert status(run)["started_at_step"] == 2 and [e["step"] for e in events(run, "damaged")] == [4]
    same(run, whole)


def test_a_resume_twice_from_the_same_checkpoint_is_the_same(whole, stopped):
    run = stopped.run
    flags = [f"--run.directory={run}"]
    for _ in range(2):
        run_ranks(2, stopped.recipe, flags, "kill:point=after_backward,step=6")
    assert status(run)["attempt"] == 3
    assert run_ranks(2, stopped.recipe, flags)[0] == [0, 0]
    same(run, whole)


def test_the_points_are_all_passed(recipe_file, tmp_path):
    """Otherwise the kills above prove nothing: each point is reached in a plain run, in its order."""
    from ranks import on_ranks

    seen = on_ranks(1, _passed, recipe_file(), [*QUICK, f"--run.directory={tmp_path}/run"])[0]
    assert set(seen) == set(POINTS) - {"evaluate"}
    assert [p for p in seen if p.startswith("save.")][: len(SAVE_POINTS)] == SAVE_POINTS
    assert seen.index("after_forward") < seen.index("after_backward") < seen.index("before_update")


def _passed(path, flags):
    from megacpt import heartbeat
    from megacpt.config.load import load_recipe
    from megacpt.train import loop

    seen, original = [], heartbeat.reach
    heartbeat.reach = lambda point, *rest, **more: (seen.append(point), original(point, *rest, **more))[1]
    loop.train(load_recipe(path, flags))
    return seen


def test_no_such_fault(monkeypatch):
    from megacpt.errors import ConfigError
    from megacpt.faults import parse_faults

    with pytest.raises(ConfigError, match="2 problems in MEGACPT_FAULT"):
        parse_faults("kill:point=nowhere;dance:point=step.begin")
    assert "MEGACPT_FAULT" not in os.environ
