"""Disks that take nothing for a while, or never again: training goes on where it can, nothing is lost, and it is said once."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from crash import events, rows, run_ranks, same, status
from shared import LONG_SECONDS

from megacpt import files, heartbeat
from megacpt.checkpoint.manifest import list_steps
from megacpt.errors import SaveError
from megacpt.files import Journal, new_folder, remove_abandoned, temporary, write_atomically
from megacpt.survive.run_directory import RunDirectory, write_status
from megacpt.survive.watchdog import Watchdog
from megacpt.train import loop


@pytest.fixture
def small(tmp_path):
    """A file system of 12 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs root and the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def before_step(number: int, action) -> None:
    """In a rank: rank 0 does something when a step begins."""
    reached = heartbeat.reach

    def also(point, step=None, subject=None):
        if point == "step.begin" and step == number and os.environ.get("RANK") == "0":
            action()
        reached(point, step, subject)

    heartbeat.reach = also


def fill(folder: Path) -> None:
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == errno.ENOSPC


def tags_of(folder: Path) -> dict[str, list[int]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder))
    reader.Reload()
    return {tag: [event.step for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_a_disk_that_is_full_for_a_while(whole, recipe_file, small):
    """From step 3 to 7 there is not a byte: two saves fail, and at the end everything is there."""

    def prepare():
        before_step(3, lambda: fill(small))
        before_step(8, (small / "filler").unlink)

    run = small / "run"
    codes, errors = run_ranks(2, recipe_file(), [f"--run.directory={run}", "--log.tensorboard=true"], prepare=prepare)
    assert codes == [0, 0], errors
    same(run, whole)
    assert [event["step"] for event in events(run, "save_failed")] == [4, 6]
    failed, again = events(run, "disk"), events(run, "disk_again")
    assert failed and {e["file"] for e in failed} == {e["file"] for e in again}
    assert all(e["error"] == "No space left on device" and 3 <= e["step"] <= 7 for e in failed)
    assert all(e["kept"] > 0 and e["lost"] == 0 for e in again)
    assert tags_of(run / "tb")["train/loss"] == list(range(1, 9))
    assert "disk" not in status(run) and not list(run.rglob("*.tmp*"))


def refuse(run: Path, number: int, first: int, last: int, only: str = "") -> None:
    """In a rank: writes below the run directory fail with an errno from the beginning of one step to that of another."""
    state, os_open = [], os.open

    def forbidden(path) -> bool:
        return bool(state) and str(path).startswith(str(run)) and only in str(path)

    def opened(path, flags, *rest, **more):
        if flags & (os.O_WRONLY | os.O_RDWR) and forbidden(path):
            raise OSError(number, os.strerror(number), str(path))
        return os_open(path, flags, *rest, **more)

    def file_opened(path, mode="r", *rest, **more):
        if set(mode) & set("wa+") and forbidden(path):
            raise OSError(number, os.strerror(number), str(path))
        return open(path, mode, *rest, **more)

    os.open, files.open = opened, file_opened
    before_step(first, lambda: state.append(1))
    before_step(last, state.clear)


@pytest.mark.parametrize("name", ["EROFS", "EACCES", "EDQUOT", "EIO", "ENOSPC"])
def test_a_disk_that_refuses_for_a_while(whole, recipe_file, tmp_path, name):
    run, number = tmp_path / "run", getattr(errno, name)
    codes, errors = run_ranks(2, recipe_file(), [f"--run.directory={run}"], prepare=lambda: refuse(run, number, 3, 6))
    assert codes == [0, 0], errors
    same(run, whole)
    (failed,) = [e for e in events(run, "disk") if e["file"] == "metrics.jsonl"]
    assert failed["error"] == os.strerror(number)
    assert [e["step"] for e in events(run, "save_failed")] == [4]
    assert [e["kept"] for e in events(run, "disk_again") if e["file"] == "metrics.jsonl"] == [4]


def test_a_file_that_cannot_be_written_to_the_end(whole, recipe_file, tmp_path):
    """metrics.jsonl alone is forbidden, as by an attribute: the run ends well, run.json says what is missing."""
    run = tmp_path / "run"

    def prepare():
        return refuse(run, errno.EPERM, 3, 99, "metrics.jsonl")

    assert run_ranks(2, recipe_file(), [f"--run.directory={run}"], prepare=prepare)[0] == [0, 0]
    assert status(run)["status"] == "finished" and status(run)["disk"] == {"metrics.jsonl": "Operation not permitted"}
    assert list_steps(run / "checkpoints") == list_steps(whole / "checkpoints")
    assert [row["step"] for row in rows(run)] == [1, 2]


def test_a_disk_that_stays_full_ends_the_run_in_a_sentence(recipe_file, small):
    run = small / "run"

    def prepare():
        return before_step(3, lambda: fill(small))

    codes, errors = run_ranks(2, recipe_file(), [f"--run.directory={run}"], prepare=prepare)
    assert codes == [75, 75] and errors[0].startswith("SaveError: the checkpoint of step 8 was not saved: rank 0: ")
    assert "Make room" in errors[0]
    (small / "filler").unlink()
    assert run_ranks(2, recipe_file(), [f"--run.directory={run}"])[0] == [0, 0]
    assert status(run)["status"] == "finished"


def test_an_end_that_run_json_cannot_tell_is_no_success(recipe_file, tmp_path):
    run = tmp_path / "run"

    def prepare():
        return refuse(run, errno.ENOSPC, 3, 99, "run.json")

    codes, errors = run_ranks(1, recipe_file(), [f"--run.directory={run}"], prepare=prepare)
    assert codes == [75] and "the run is finished, but run.json cannot say so" in errors[0] and "Make room" in errors[0]


def test_a_disk_without_a_byte_at_the_start_may_be_tried_again(recipe_file, small):
    (small / "run").mkdir()
    fill(small)
    codes, errors = run_ranks(2, recipe_file(), [f"--run.directory={small}/run"])
    assert codes == [75, 75] and all("No space left on device (0 bytes free). Make room" in error for error in errors)


def test_rows_that_wait_are_cut_with_the_others(tmp_path, monkeypatch):
    directory = RunDirectory(tmp_path, True)
    directory.metrics({"step": 1})
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        for step in (2, 3):
            directory.metrics({"step": step})
    directory.cut_metrics(2)
    directory.metrics({"step": 3, "again": True})
    assert rows(tmp_path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_a_disk_that_is_full_at_the_start_is_a_sentence(recipe_file, tmp_path):
    run = tmp_path / "run"

    def prepare():
        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        loop.RunDirectory.begin = full

    codes, errors = run_ranks(1, recipe_file(), [f"--run.directory={run}"], prepare=prepare)
    assert codes == [75] and errors[0] == "SaveError: a file: No space left on device. Make room and try again."


def test_a_limit_inside_a_shard_is_told_of_the_rank_that_has_it(recipe_file, tmp_path):
    """torch's writer of archives says "unexpected pos" of it, and every rank hears of every other's error."""
    run = tmp_path / "run"

    def limit():
        if os.environ["RANK"] == "1":
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    codes, errors = run_ranks(2, recipe_file(), [f"--run.directory={run}", "--run.stop_at_step=4"], prepare=limit)
    assert codes == [75, 75], errors
    told = [event["error"] for event in events(run, "save_failed")]
    assert told and all(
        "rank 1: " in t and "/__1_0.distcp: File too large. A limit of the file's size (ulimit -f)" in t for t in told
    )
    assert not any("rank 0" in t or "enforce fail" in t or "Error" in t for t in told)


def test_a_journal_never_keeps_half_a_record(tmp_path, monkeypatch):
    """Writes that take some bytes and then none, over and over: the file is the records in their order."""
    told, write, budget = [], os.write, [0]

    def sometimes(handle, content):
        count = min(len(content), budget[0])
        budget[0] -= count
        if not count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(handle, content[:count])

    journal = Journal(tmp_path / "j", lambda _, problem: told.append(problem))
    monkeypatch.setattr(files.os, "write", sometimes)
    expected = b""
    for i in range(60):
        budget[0] = (i * 7) % 40
        record = b"%d " % i * 3 + b"\n"
        journal.add(record)
        expected += record
        present = (tmp_path / "j").read_bytes() if (tmp_path / "j").exists() else b""
        if not journal.waiting:
            assert present == expected
    budget[0] = 10_000
    assert journal.flush() and (tmp_path / "j").read_bytes() == expected
    assert (
        told[0] == "No space left on device"
        and told[-1] == ""
        and all(a != b for a, b in zip(told, told[1:], strict=False))
    )


def test_a_journal_keeps_so_many_records_and_counts_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(Journal, "KEPT", 5)
    (tmp_path / "j").mkdir()
    journal = Journal(tmp_path / "j", lambda *_: None)
    for i in range(8):
        journal.add(b"%d\n" % i)
    (tmp_path / "j").rmdir()
    assert journal.flush() and (tmp_path / "j").read_bytes() == b"3\n4\n5\n6\n7\n"
    assert (journal.lost, journal.kept) == (3, 5)


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_small_file_is_whole_or_as_it_was(tmp_path, monkeypatch, moment):
    """A power loss is a write that never came: the name appears after the bytes are on the disk, and the folder after the name."""
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(files.os, name, lambda *a, real=real, name=name: (order.append(name), real(*a)))
    write_atomically(tmp_path / "f", "old")
    assert order == ["fsync", "replace", "fsync"]

    def broken(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files.os, moment, broken)
    with pytest.raises(OSError):
        write_atomically(tmp_path / "f", "new")
    assert (tmp_path / "f").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_small_file_has_the_mode_of_the_umask_and_follows_links(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "f", "x")
        assert (tmp_path / "f").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)
    (tmp_path / "link").symlink_to("f")
    write_atomically(tmp_path / "link", "y")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "f").read_text() == "y"
    write_atomically("/dev/null", "z")
    assert Path("/dev/null").is_char_device()


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    """Of a process that is gone; not of one that lives, nor of another machine that may still write, nor what is not ours."""
    child = subprocess.run([sys.executable, "-c", f"""
from pathlib import Path
from megacpt.files import temporary
for name in ("model", "run.json"):
    path = temporary(Path({str(tmp_path)!r}) / name)
    path.mkdir() if name == "model" else path.write_text("x")
"""], check=True)  # fmt: skip
    assert child.returncode == 0 and len(list(tmp_path.iterdir())) == 2
    mine = temporary(tmp_path / "mine")
    mine.mkdir()
    theirs = tmp_path / ".tmp-x--elsewhere.7-1-1"
    theirs.mkdir()
    (tmp_path / ".tmp-notes").write_text("a user's")
    assert len(remove_abandoned(tmp_path)) == 2
    assert {p.name for p in tmp_path.iterdir()} == {mine.name, theirs.name, ".tmp-notes"}
    os.utime(theirs, (0, 0))
    assert remove_abandoned(tmp_path) == [theirs.name] and mine.exists()


def test_a_new_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, real = [], os.fsync
    monkeypatch.setattr(files.os, "fsync", lambda fd: (synced.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd)))
    with new_folder(tmp_path / "out") as partial:
        (partial / "deep").mkdir()
        (partial / "deep/a").write_text("a")
        (partial / "b").write_text("b")
    names = [Path(path).name.partition("--")[0] for path in synced]
    assert set(names[:-1]) == {"a", "deep", "b", ".tmp-out"} and synced[-1] == str(tmp_path)
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "other"):
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_watchdog_outlives_a_disk_that_takes_nothing(tmp_path, monkeypatch, capfd):
    """A rank fails where the run directory cannot be written: the other is ended all the same, and the reason is printed."""
    from megacpt.heartbeat import Heartbeat
    from megacpt.survive import run_directory, watchdog

    run, beats = tmp_path / "run", tmp_path / "beats"
    run.mkdir(), beats.mkdir()
    write_status(run, {"status": "running"})

    def refused(path, content):
        if str(path).startswith(str(run)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_atomically(path, content)

    def beat(rank: int, pid: int, budget: float, phase: str) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(heartbeat.os, "getpid", lambda: pid)
            Heartbeat(beats / f"rank-{rank:05d}.beat", rank).write(budget, phase, "")

    failing = subprocess.Popen([sys.executable, "-c", "pass"])
    failing.wait()
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(7200)"])
    beat(0, failing.pid, 0.0, "failed")
    beat(1, other.pid, 1e6, "step")
    monkeypatch.setattr(watchdog, "write_atomically", refused)
    monkeypatch.setattr(run_directory, "write_atomically", refused)
    monkeypatch.setattr(watchdog, "GRACE_SECONDS", 0.1)
    watchdog._write(run / "incidents/x/failed-rank-00000.json", watchdog._failure_facts(SaveError("no room")), beats)
    Watchdog(beats, run, 2, 2).watch()
    assert other.wait(LONG_SECONDS) in (-15, -9)
    told = capfd.readouterr().err
    assert "rank 0: SaveError: no room" in told and "run.json: No space left on device" in told
    assert status(run)["status"] == "running"


def test_a_profile_or_picture_that_cannot_be_written_is_told(tmp_path, monkeypatch, capsys):
    from megacpt.config.sections.profile import Profile
    from megacpt.train.profile import Profiler

    (tmp_path / "profile").write_text("in the way")
    profiler = Profiler(Profile(steps=(1, 1)), tmp_path / "profile", 0)
    profiler.before(1)
    torch.ones(2) + 1
    profiler.after(1)
    assert "profile/rank0-steps1-1.json" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ENOSPC", "EROFS", "EACCES", "EIO"])
def test_a_verb_that_cannot_write_says_so_in_a_sentence(recipe_file, tmp_path, monkeypatch, capsys, name):
    from megacpt.cli import main

    number = getattr(errno, name)
    picture = tmp_path / "picture.svg"

    def refused(*_):
        raise OSError(number, os.strerror(number), str(picture))

    monkeypatch.setattr(files.os, "replace", refused)
    with pytest.raises(SystemExit) as left:
        main(["check", recipe_file(), "--schedule-picture", str(picture)])
    told = capsys.readouterr().err
    assert (
        left.value.code == (2 if name == "EACCES" else 75)
        and f"{picture}: {os.strerror(number)}" in told
        and "try again" in told
    )
    assert "Traceback" not in told and not list(tmp_path.glob(".tmp-*"))


def test_recipe_and_run_json_are_written_in_one_act(recipe_file, tmp_path, monkeypatch):
    from megacpt.config.load import load_recipe, save_recipe

    recipe = load_recipe(recipe_file())
    save_recipe(recipe, tmp_path / "recipe.toml")
    stamp = (tmp_path / "recipe.toml").stat().st_mtime_ns
    save_recipe(recipe, tmp_path / "recipe.toml")
    assert (tmp_path / "recipe.toml").stat().st_mtime_ns == stamp, "what is the same needs no room"
    assert load_recipe(str(tmp_path / "recipe.toml")) == recipe
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    directory = RunDirectory(tmp_path, True)
    directory.facts = {"x": 1}
    directory.status("running")
    assert directory.disk == {"run.json": "broken"} and not (tmp_path / "run.json").exists()
    with pytest.raises(SaveError, match="the run is finished, but run.json cannot say so"):
        directory.status("finished", 0)
    monkeypatch.undo()
    directory.metrics({"step": 1, "tokens": 2})
    assert status(tmp_path)["status"] == "running" and directory.disk == {}


IN_THE_WAY = {
    "file": lambda path: path.write_text("x"),
    "folder": lambda path: (path / "deep").mkdir(parents=True),
    "pipe": lambda path: os.mkfifo(path),
    "link": lambda path: path.symlink_to(path.parent),
    "circle": lambda path: path.symlink_to(path.name),
    "nothing": lambda path: None,
}


@pytest.mark.parametrize("way", IN_THE_WAY)
def test_whatever_is_in_a_folders_way_is_set_aside_and_removed(tmp_path, way):
    """As a checkpoint that is saved again meets it; what a link leads to is not touched."""
    IN_THE_WAY[way](tmp_path / "final")
    IN_THE_WAY[way](tmp_path / ".tmp-old-final")
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial/a").write_text("a")
    files.publish_folder(tmp_path / "partial", tmp_path / "final")
    assert [path.name for path in tmp_path.rglob("*")] == ["final", "a"]


def test_a_journal_does_not_wait_for_the_reader_of_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "j")
    told = []
    journal = files.Journal(tmp_path / "j", lambda _, problem: told.append(problem))
    journal.add(b"1\n")
    assert len(told) == 1 and told[0] and journal.waiting == [b"1\n"]
