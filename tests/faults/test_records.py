"""What a run leaves and reads back: metrics.jsonl and run.json with anything in them; and a watchdog that lets a rank leave."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from crash import QUICK, events, rows, run_ranks
from shared import LONG_SECONDS, wait_until

from megacpt.files import JsonError, read_object, read_records
from megacpt.heartbeat import Heartbeat
from megacpt.survive import watchdog as module
from megacpt.survive.run_directory import RunDirectory, read_status, useful_seconds
from megacpt.survive.watchdog import Watchdog


def row(step: int, **more) -> str:
    return json.dumps({"step": step, "step_s": 1.0} | more) + "\n"


def test_each_step_stands_once_and_damaged_rows_are_told(tmp_path, capsys):
    """Rows that came twice, in any order: the last of each counts. Bytes that are no text, other types, a line cut by a kill."""
    path = tmp_path / "metrics.jsonl"
    lines = [row(1), row(2, loss=1), row(3), row(2, loss=2), row(3, loss=3), row(4), row(9)]
    bad = [b'\xac{"step": 5}\n', b'{"step": "x"}\n', b"[1]\n", b'{"step": true}\n', b"[" * 100_000 + b"\n"]
    path.write_bytes(
        b"".join([*(line.encode() for line in lines[:3]), *bad, *(line.encode() for line in lines[3:])])
        + b'{"step": 5, "lo'
    )
    directory = RunDirectory(tmp_path, write=True)
    directory.cut_metrics(4)
    kept = rows(tmp_path)
    assert [found["step"] for found in kept] == [1, 2, 3, 4] and [found.get("loss") for found in kept] == [
        None,
        2,
        3,
        None,
    ]
    assert directory.useful_seconds == 4.0
    told = capsys.readouterr().err
    assert told.count("is damaged and was left out") == len(bad) and "line 4 is" in told
    assert events(tmp_path, "damaged_rows")[0]["lines"] == [4, 5, 6, 7, 8]


def test_times_that_are_none_count_nothing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        row(1) + row(2, step_s="x") + row(3, step_s=None) + '{"step": 4, "step_s": Infinity}\n'
    )
    assert useful_seconds(tmp_path) == 1.0


ABSURD = [
    ("step", [0, -1, 1 << 54, 10**400, 1.5, True, None]),
    ("step_s", [-1.0, -(10**400), 1e12, float("nan"), float("inf"), "1"]),
]


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in ABSURD for value in values])
def test_rows_with_absurd_numbers_count_nothing(tmp_path, key, value):
    (tmp_path / "metrics.jsonl").write_text(row(1) + json.dumps({"step": 7, "step_s": 5.0} | {key: value}) + "\n")
    assert useful_seconds(tmp_path) == 1.0
    directory = RunDirectory(tmp_path, write=True)
    directory.cut_metrics(99)
    assert [found["step"] for found in rows(tmp_path)] == ([1] if key == "step" else [1, 7])


@pytest.mark.parametrize("key, value", [("attempt", -5), ("attempt", 10**400), ("first_started", -1e9), ("first_started", 0),
                                        ("first_started", 1e300), ("first_started", 9e11), ("exit_code", 10**30)])  # fmt: skip
def test_absurd_numbers_of_run_json_are_left_out(tmp_path, key, value):
    (tmp_path / "run.json").write_text(json.dumps({"status": "running", key: value}))
    assert read_status(tmp_path) == {"status": "running"}
    sound = {"attempt": 3, "first_started": time.time() - 10, "exit_code": 75}
    (tmp_path / "run.json").write_text(json.dumps(sound))
    assert read_status(tmp_path) == sound


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "it is empty"),
        (b"[" * 1_000_000, "nested too deeply"),
        (b'{"a":' * 300_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "it is no JSON"),
        (b"\xff\xfe{}", "it is no JSON"),
        (b"[1]", "it holds a list, not an object"),
        (b"null", "it holds a NoneType"),
        (b'{"a": "' + b"x" * 5000 + b'"}', "it has more than 4,096 bytes"),
    ],
)
def test_whatever_is_no_object_is_one_error(tmp_path, content, told):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(JsonError, match=told):
        read_object(tmp_path / "f", 4096 if "4,096" in told else 1 << 24)
    (tmp_path / "f").write_bytes(b'{"a": 1}')
    assert read_object(tmp_path / "f", 8) == {"a": 1}


def test_what_is_no_plain_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(OSError, match="is no plain file"):
            read_object(tmp_path / name)


def test_a_line_that_is_too_long_hides_no_other(tmp_path):
    lines = [b'{"a": 1}', b"x" * 100, b"", b'{"a": 2, "b": "' + b"y" * 40 + b'"}', b'{"a": 3}', b'{"a": 4']
    (tmp_path / "f").write_bytes(b"\n".join(lines))
    found = [(record.number, record.row and record.row["a"]) for record in read_records(tmp_path / "f", 32)]
    assert found == [(1, 1), (2, None), (4, None), (5, 3)], "of the last one nobody knows whether it was finished"
    assert [record.row and record.row["a"] for record in read_records(tmp_path / "f")] == [1, None, 2, 3]


def test_incidents_may_hold_anything(tmp_path):
    """What the watchdogs and the supervisor believe of them: nothing that is not whole, and no name but those that ranks give."""
    folder = tmp_path / "incidents/a.0"
    folder.mkdir(parents=True)
    sound = {"time": 1.0, "kind": "DataError", "message": "m", "exit_code": 76, "ours": True}
    rank = {"step": 1, "phase": "step", "point": "", "silent_seconds": 1.0, "budget_seconds": 2.0, "state": "S"}
    for i, wrong in enumerate(({}, {"time": 10**400}, {"exit_code": "76"}, {"ours": 1}, {"message": None})):
        (folder / f"failed-rank-{i:05d}.json").write_text(json.dumps(sound | wrong if wrong else {}))
    for name in ("failed-rank-x.json", "failed-rank-²0000.json", "failed-rank-1.json", "failed-rank-00007.json"):
        (folder / name).write_text(json.dumps(sound))
    (folder / "failed-rank-00008.json").mkdir()
    (folder / "node-a.json").write_text(
        json.dumps({"ranks": {"0": rank, "1": {}, "x": rank, "²": rank, "3": rank | {"silent_seconds": 10**400}}})
    )
    (folder / "node-b.json").write_text("[" * 100_000)
    (folder / "node-c.json").write_text(json.dumps({"ranks": [1]}))
    assert list(module._failures(folder)) == [7] and list(module._all_ranks(folder)) == [0]
    (folder / "conclusion.json").write_text(json.dumps({"status": 3, "exit_code": 2}))
    assert module.read_conclusion(tmp_path, "a") == {
        "status": "failed",
        "exit_code": 76,
        "suspects": [7],
        "reason": "rank 7: DataError: m",
    }
    assert module.conclusion("hung", {}, {})[0] == 75


def test_the_watchdog_speaks_where_the_lease_cannot_be_read(tmp_path):
    (tmp_path / "lease/00000001.json").mkdir(parents=True)
    watchdog = Watchdog(tmp_path / "beats", tmp_path, 1, 1)
    assert watchdog._may_conclude({"attempt_id": "beats"}) and not watchdog._may_conclude({"attempt_id": "another"})


@pytest.mark.parametrize(
    "text",
    ['{"attempt": "x"}', '{"attempt": null}', '{"attempt": [1]}', '{"attempt": true, "first_started": "x"}',
     '{"first_started": Infinity}', '{"time": "x", "status": 7}', '{"attempt_id": 3, "signal": 4}', "[]", "x", "[" * 100_000],
)  # fmt: skip
def test_run_json_may_hold_anything(text, recipe_file, tmp_path):
    (tmp_path / "run.json").write_text(text)
    found = read_status(tmp_path)
    assert not found.keys() & {"attempt", "first_started", "attempt_id", "signal", "status"}
    from megacpt.config.load import load_recipe
    from megacpt.survive.supervise import effective_time

    assert effective_time(tmp_path) is None
    directory = RunDirectory(tmp_path, write=True, attempt="one")
    directory.begin(load_recipe(recipe_file()), {})
    assert (read_status(tmp_path)["attempt"], read_status(tmp_path)["status"]) == (1, "running")


def test_a_resume_over_damaged_records(recipe_file, tmp_path):
    run, flags = tmp_path / "run", [f"--run.directory={tmp_path}/run"]
    assert run_ranks(2, recipe_file(), [*flags, "--run.stop_at_step=4"])[0] == [0, 0]
    content = bytearray((run / "metrics.jsonl").read_bytes())
    content[20] |= 0x80
    (run / "metrics.jsonl").write_bytes(content)
    (run / "run.json").write_text('{"attempt": [1], "first_started": "x"}')
    assert run_ranks(2, recipe_file(), flags)[0] == [0, 0]
    assert [found["step"] for found in rows(run)] == [2, 3, 4, 5, 6, 7, 8] and len(events(run, "damaged_rows")) == 1


def test_a_folder_where_a_file_belongs_is_named_on_all_ranks(recipe_file, tmp_path):
    (tmp_path / "run/metrics.jsonl").mkdir(parents=True)
    codes, errors = run_ranks(2, recipe_file(), [f"--run.directory={tmp_path}/run"])
    assert codes == [2, 2] and all("a folder lies where a file belongs. Move it away" in error for error in errors)


LEAVING = """
import sys, time
from pathlib import Path
from megacpt.heartbeat import Heartbeat
heart = Heartbeat(Path(sys.argv[1]) / "rank-00000.beat", 0)
heart.write(0.0, sys.argv[2], "")
until = time.monotonic() + 1800
while not (Path(sys.argv[1]) / "go").exists() and time.monotonic() < until:
    time.sleep(0.02)
sys.exit(2)
"""


@pytest.mark.parametrize("phase, code", [("failed", 2), ("step", -signal.SIGTERM)])
def test_who_is_leaving_takes_its_own_exit_code_with_it(tmp_path, monkeypatch, phase, code):
    """A machine so slow that a rank needs longer than the grace of the others. The twin: a rank that has said nothing is ended."""
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.1)
    (tmp_path / "beats").mkdir()
    child = subprocess.Popen([sys.executable, "-c", LEAVING, str(tmp_path / "beats"), phase])
    watchdog = Watchdog(tmp_path / "beats", tmp_path / "run", 1, 1)
    wait_until(lambda: watchdog._look() or watchdog.beats, alive=[child.pid])
    waits = watchdog._wait

    def wait(so_long, seconds):
        if seconds > 10:  # the signals for the others are behind it
            (tmp_path / "beats/go").touch()
        waits(so_long, seconds)

    watchdog._wait = wait
    watchdog._end(0.1)
    assert child.wait(LONG_SECONDS) == code


def test_a_changed_value_is_shown_at_the_resume(recipe_file, tmp_path, capfd):
    flags = [*QUICK, f"--run.directory={tmp_path}/run"]
    run_ranks(1, recipe_file(), [*flags, "--run.stop_at_step=2"])
    capfd.readouterr()
    run_ranks(1, recipe_file(), [*flags, "--stages.s.lr.peak=1e-4", "--run.stop_at_step=4"])
    assert "changed since the run was started: stages.s.lr.peak: 0.001 -> 0.0001" in capfd.readouterr().err


def test_the_heartbeat_of_who_leaves_is_read(tmp_path):
    """What the watchdog goes by is written before the error leaves the process."""
    from megacpt import heartbeat

    watch = module.Watch(tmp_path / "none", tmp_path, 0)
    heartbeat.begin(Heartbeat(tmp_path / "rank-00000.beat", 0))
    watch.report_failure(ValueError("x"))
    assert module.read_beat(tmp_path / "rank-00000.beat").phase == "failed"
