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


@pytest.mark.parametrize("point", STEP_POINTS)
@pytest.mark.parametrize("who", ["rank=1,", ""], ids=["one", "all"])
def test_a_kill_in_a_step_loses_what_came_after_the_checkpoint(whole, recipe_file, tmp_path, point, who):
    part = tmp_path / "part"
    flags = [f"--run.directory={part}"]
    codes, _ = run_ranks(2, recipe_file(), flags, f"kill:{who}point={point},step=5")
    assert codes[1] == KILLED and (codes[0] == KILLED if not who else codes[0] != 0), codes
    assert list_steps(part / "checkpoints") == [2, 4] and len(rows(part)) in (4, 5)
    assert run_ranks(2, recipe_file(), flags)[0] == [0, 0]
    assert status(part)["started_at_step"] == 4
    same(part, whole)


@pytest.mark.parametrize("point", SAVE_POINTS)
@pytest.mark.parametrize("asynchronous", ["false", "true"], ids=["waiting", "behind"])
def test_a_kill_in_a_save_loses_what_came_after_the_checkpoint(whole, recipe_file, tmp_path, point, asynchronous):
    """The save of step 4 is cut short on rank 0, or on both: what there is is whole, and the rest does not block the next save."""
    part = tmp_path / "part"
    flags = [f"--run.directory={part}", f"--checkpoint.asynchronous={asynchronous}"]
    everywhere = point in ("save.staged", "save.after_shards")
    codes, _ = run_ranks(2, recipe_file(), flags, f"kill:{'' if everywhere else 'rank=0,'}point={point},step=4")
    assert codes[0] == KILLED and codes[1] != 0, codes
    published = [2, 4] if point in ("save.after_rename", "save.before_prune") else [2]
    assert list_steps(part / "checkpoints") == published
    assert all(verify(part / f"checkpoints/step-{step:08d}") for step in published)
    assert run_ranks(2, recipe_file(), flags)[0] == [0, 0]
    assert status(part)["started_at_step"] == published[-1]
    assert [p.name for p in (part / "checkpoints").iterdir() if p.name.startswith(".")] == []
    same(part, whole)


@pytest.mark.parametrize("point", ["save.after_shards", "save.before_manifest", "save.after_rename"])
def test_without_rename_the_manifest_decides(whole, recipe_file, tmp_path, point):
    part = tmp_path / "part"
    flags = [f"--run.directory={part}", "--checkpoint.publish=manifest"]
    codes, _ = run_ranks(2, recipe_file(), flags, f"kill:rank=0,point={point},step=4")
    assert codes[0] == KILLED
    assert run_ranks(2, recipe_file(), flags)[0] == [0, 0]
    assert status(part)["started_at_step"] == (4 if point == "save.after_rename" else 2)
    same(part, whole)


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


def test_a_flipped_bit_behind_the_writer_is_never_published(whole, recipe_file, tmp_path):
    """Between writing and publishing a bit of a shard turns: that save fails on all ranks, the run goes on, saves again, ends alike."""
    part = tmp_path / "part"
    flags = [f"--run.directory={part}"]
    assert run_ranks(2, recipe_file(), flags, "flip:rank=1,point=save.after_shards,step=4")[0] == [0, 0]
    (failed,) = events(part, "save_failed")
    assert failed["step"] == 4 and "rank 1" in failed["error"] and "it is damaged" in failed["error"]
    assert list_steps(part / "checkpoints") == [2, 6, 8]
    same(part, whole)


def test_a_damaged_newest_is_found_by_who_reads_it(whole, recipe_file, tmp_path):
    """One bit of rank 1's shard: both ranks go back to the checkpoint before, and say which one was bad."""
    part = tmp_path / "part"
    flags = [f"--run.directory={part}"]
    run_ranks(2, recipe_file(), [*flags, "--run.stop_at_step=4"])
    shard = sorted((part / "checkpoints/step-00000004").glob("*.distcp"))[1]
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 16
    shard.write_bytes(raw)
    assert run_ranks(2, recipe_file(), flags)[0] == [0, 0]
    assert status(part)["started_at_step"] == 2 and [e["step"] for e in events(part, "damaged")] == [4]
    same(part, whole)


def test_a_resume_twice_from_the_same_checkpoint_is_the_same(whole, recipe_file, tmp_path):
    part = tmp_path / "part"
    flags = [f"--run.directory={part}"]
    for _ in range(2):
        run_ranks(2, recipe_file(), flags, "kill:point=after_backward,step=6")
    assert status(part)["attempt"] == 2
    assert run_ranks(2, recipe_file(), flags)[0] == [0, 0]
    same(part, whole)


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
