"""Promises 1, 3 and 9: saves that fail, disks that are full, data that is not what it was."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from crash import events, rows, run_ranks, same, status

from megacpt.checkpoint.manifest import list_steps
from megacpt.cli import run as verb
from megacpt.config.load import load_recipe
from megacpt.data.indexed import IndexedDataset
from megacpt.errors import DataError


@pytest.mark.parametrize("asynchronous", ["false", "true"], ids=["waiting", "behind"])
@pytest.mark.parametrize("point", ["save.staged", "save.after_shards", "save.before_manifest"])
def test_a_full_disk_does_not_stop_the_training(whole, recipe_file, tmp_path, point, asynchronous):
    """The save of step 2 meets ENOSPC on rank 0: told on all ranks, training goes on, the next save is made, the end is the same."""
    run = tmp_path / "run"
    flags = [f"--run.directory={run}", f"--checkpoint.asynchronous={asynchronous}"]
    codes, errors = run_ranks(2, recipe_file(), flags, f"full:rank=0,point={point},step=2")
    assert codes == [0, 0], errors
    (failed,) = events(run, "save_failed")
    assert failed["step"] == 2 and "No space left on device" in failed["error"] and "rank 0" in failed["error"]
    assert list_steps(run / "checkpoints") == [4, 6, 8]
    assert not [p for p in (run / "checkpoints").iterdir() if p.name.startswith(".")], "the room is free again"
    same(run, whole)


def test_room_is_looked_for_before_a_save(whole, recipe_file, tmp_path):
    def full():
        usage, calls = shutil.disk_usage, []

        def little(path):
            calls.append(1)
            real = usage(path)
            return real._replace(free=1000) if len(calls) == 1 else real

        shutil.disk_usage = little

    run = tmp_path / "run"
    assert run_ranks(2, recipe_file(), [f"--run.directory={run}"], prepare=full)[0] == [0, 0]
    (failed,) = events(run, "save_failed")
    assert "free are 1,000. Make room, or lower checkpoint.keep_last" in failed["error"]
    size = sum(p.stat().st_size for p in (run / "checkpoints/step-00000008").glob("*.distcp"))
    needed = int(failed["error"].split("needs ")[1].split(" bytes")[0].replace(",", ""))
    assert 0.6 * size < needed - (1 << 20) < 1.1 * size, "the figure is that of what is really written"
    same(run, whole)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to mount a small file system")
def test_a_file_system_that_is_really_full(recipe_file, tmp_path):
    """A tmpfs with room for one checkpoint, not for two."""
    import subprocess

    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2200k", "tmpfs", str(small)], capture_output=True
    ).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        flags = [f"--run.directory={small}/run", "--checkpoint.keep_last=9", "--run.stop_at_step=6"]
        codes, errors = run_ranks(1, recipe_file(), flags)
        told = events(small / "run", "save_failed")
        assert told and "a checkpoint needs" in told[0]["error"] and codes == [75], (codes, errors)
        assert list_steps(small / "run/checkpoints"), "what was published is still there"
        assert [row["step"] for row in rows(small / "run")] == [1, 2, 3, 4, 5, 6], "training went on"
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_the_last_save_must_succeed(recipe_file, tmp_path):
    run = tmp_path / "run"
    codes, errors = run_ranks(2, recipe_file(), [f"--run.directory={run}"], "full:rank=1,point=save.staged,step=8")
    assert codes == [75, 75] and "rank 1: OSError" in errors[0]
    assert (status(run)["status"], status(run)["exit_code"]) == ("failed", 75)
    assert run_ranks(2, recipe_file(), [f"--run.directory={run}"])[0] == [0, 0]


def test_a_folder_that_cannot_be_written_is_named(recipe_file, tmp_path):
    """As root every folder can be written, so a file stands where a folder should be: of the checkpoints, of the run."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").write_text("in the way")
    codes, errors = run_ranks(1, recipe_file(), [f"--run.directory={run}"])
    assert codes == [2] and f"{run}/checkpoints" in errors[0]
    (tmp_path / "file").write_text("in the way")
    codes, errors = run_ranks(2, recipe_file(), [f"--run.directory={tmp_path}/file/run"])
    assert codes == [2, 2] and all(f"{tmp_path}/file/run cannot be written" in error for error in errors)


def test_names_command_no_terminal(capsys):
    from megacpt import log

    log.info("domain \x1b[2J\x1b]0;title\x07 of \u202efdp")
    assert "\\x1b[2J\\x1b]0;title\\x07 of \\x202efdp" in capsys.readouterr().err


def test_what_cannot_be_removed_is_no_failed_save(recipe_file, tmp_path):
    run = tmp_path / "run"
    flags = [f"--run.directory={run}", "--checkpoint.keep_last=1"]
    assert run_ranks(2, recipe_file(), flags, "full:rank=0,point=save.before_prune,step=8")[0] == [0, 0]
    assert list_steps(run / "checkpoints") == [6, 8] and not events(run, "save_failed")


def test_nothing_is_pruned_before_a_newer_one_is_there(recipe_file, tmp_path):
    """With one checkpoint kept, a save that fails leaves that one."""
    run = tmp_path / "run"
    flags = [f"--run.directory={run}", "--checkpoint.keep_last=1", "--run.stop_at_step=4"]
    run_ranks(2, recipe_file(), flags, "flip:rank=0,point=save.after_shards,step=4")
    assert list_steps(run / "checkpoints") == [2]


def test_fifty_saves_leave_memory_flat(mesh, tmp_path):
    """Behind the training, in this process: the memory after the fifth and after the fiftieth save."""
    from torch import nn
    from torch.distributed.tensor import DTensor, Replicate

    from megacpt.checkpoint.background import Saver
    from megacpt.checkpoint.manifest import RunState
    from megacpt.checkpoint.save import prune, tensors_of
    from megacpt.optim.adamw import AdamW
    from megacpt.train.metrics import resident_gib

    def make():
        return nn.Parameter(DTensor.from_local(torch.randn(512, 512), mesh.tensor, [Replicate()]))

    parameters = {f"w{i}": make() for i in range(8)}
    optimizer = AdamW(parameters)
    saver, sizes = Saver("rename", lambda: prune(tmp_path, 1, None)), []
    for step in range(1, 51):
        saver.start(tmp_path, tensors_of(parameters, optimizer), RunState(step, step, step, "s"), {})
        saver.wait()
        sizes.append(resident_gib())
    saver.close()
    assert not any(outcome.error for outcome in saver.outcomes) and list_steps(tmp_path) == [50]
    written = 8 * 3 * 512 * 512 * 4 / 2**30
    assert sizes[-1] - sizes[4] < written, "45 saves wrote 45 times as much"


def test_data_is_verified_on_demand(prepared, tmp_path, capsys):
    for kind in ("bin", "idx", "json"):
        shutil.copy(prepared / f"a.{kind}", tmp_path / f"a.{kind}")
    prefix = str(tmp_path / "a")
    assert verb(["prepare", "--verify", prefix]) == 0 and "sound" in capsys.readouterr().out
    raw = bytearray((tmp_path / "a.bin").read_bytes())
    raw[1001] ^= 1
    (tmp_path / "a.bin").write_bytes(raw)
    with pytest.raises(DataError, match=r"a\.bin: CRC32 is [0-9a-f]{8}, its manifest says"):
        verb(["prepare", "--verify", prefix])
    (tmp_path / "a.bin").write_bytes(raw[:-2])
    with pytest.raises(DataError, match="its manifest says"):
        verb(["prepare", "--verify", prefix])


def test_data_cut_while_it_is_read_is_an_error(prepared, tmp_path):
    """A mapped file would end the process with SIGBUS."""
    for kind in ("bin", "idx", "json"):
        shutil.copy(prepared / f"a.{kind}", tmp_path / f"a.{kind}")
    data = IndexedDataset(tmp_path / "a")
    whole = data.read(data.num_documents - 1, 0, int(data.lengths[-1])).copy()
    assert np.array_equal(whole, np.fromfile(tmp_path / "a.bin", data.dtype)[-len(whole) :])
    os.truncate(tmp_path / "a.bin", 100)
    with pytest.raises(DataError, match=r"a\.bin: .* the file was cut since it was opened"):
        data.read(data.num_documents - 1, 0, int(data.lengths[-1]))


@pytest.mark.parametrize(
    "name", ["row_start.bin", "piece_document.bin", "piece_offset.bin", "piece_length.bin", "a.idx"]
)
def test_an_index_cut_under_a_run_is_an_error_with_its_name(recipe_file, prepared, tmp_path, name):
    """At step 3, to ten bytes: no zeros are trained, no SIGBUS, and the same command goes on where the data can be had again."""
    for kind in ("bin", "idx", "json"):
        shutil.copy(prepared / f"a.{kind}", tmp_path / f"a.{kind}")
    run, packing = tmp_path / "run", tmp_path / "packing"
    flags = [f"--run.directory={run}", f'--data.a.paths=["{tmp_path}/a"]', "--validation=[]"]
    assert run_ranks(2, recipe_file(), [*flags, "--run.stop_at_step=2"])[0] == [0, 0]

    def cut():
        from megacpt.train.session import Session

        rows_of = Session._read_ahead

        def rows(session, first):
            files = [tmp_path / name] if name == "a.idx" else packing.glob(f"*/{name}")
            waiting = rows_of(session, first)
            yield next(waiting)
            for file in files:
                os.truncate(file, 10)
            yield from waiting

        Session._read_ahead = rows

    codes, errors = run_ranks(2, recipe_file(), flags, prepare=cut)
    assert 76 in codes and set(codes) <= {76, 75}, (codes, errors)
    told = next(error for code, error in zip(codes, errors, strict=True) if code == 76)
    assert name in told and "the file has 10, at least" in told and "was cut since it was opened" in told
    assert status(run)["exit_code"] in (75, 76)
    shutil.copy(prepared / "a.idx", tmp_path / "a.idx")
    assert run_ranks(2, recipe_file(), flags)[0] == [0, 0]


def test_a_damaged_packing_index_does_not_change_a_run(whole, recipe_file, tmp_path):
    """Between two starts, each file with another damage; both ranks find it at once."""
    run, packing = tmp_path / "run", tmp_path / "packing"
    assert run_ranks(2, recipe_file(), [f"--run.directory={run}", "--run.stop_at_step=1"])[0] == [0, 0]
    folders = sorted(path for path in packing.iterdir() if path.is_dir())
    (folders[0] / "index.json").unlink()
    (folders[1] / "row_start.bin").write_bytes(bytes((folders[1] / "row_start.bin").stat().st_size))
    assert run_ranks(2, recipe_file(), [f"--run.directory={run}"])[0] == [0, 0]
    same(run, whole)


def test_no_secret_reaches_a_file_of_the_run(recipe_file, tmp_path, monkeypatch):
    secret = "hf_" + "s3cr3t" * 4
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setenv("WANDB_API_KEY", secret)
    run = tmp_path / "run"
    run_ranks(1, recipe_file(), [f"--run.directory={run}", "--log.tensorboard=true"])
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 10 and not any(secret.encode() in path.read_bytes() for path in files)


def test_a_recipe_is_only_text(recipe_file, tmp_path):
    """Nothing in it is replaced, looked up or run."""
    words = ["$(touch x)", "${HF_TOKEN}", "${oc.env:HF_TOKEN}", "{{ 1 + 1 }}", "`id`", "; rm -rf ~", "%(here)s"]
    for word in words:
        recipe = load_recipe(recipe_file(), [f"--run.directory={tmp_path}/{word}"])
        assert recipe.run.directory == f"{tmp_path}/{word}"
        assert json.loads(json.dumps(recipe.model_dump(mode="json")))["run"]["directory"].endswith(word)
    assert not (tmp_path / "x").exists()
