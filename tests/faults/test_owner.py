"""A run directory has one owner, and an owner may lose its agent, its supervisor, its terminal and the reader of its output."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from crash import PLAIN, QUICK, SUPERVISE, descendants, events, kill_agent, rows, run_ranks, status, torchrun
from shared import LONG_SECONDS, exit_code_of, wait_until

from megacpt.checkpoint.manifest import list_steps
from megacpt.config.run_layout import LEASE
from megacpt.errors import ConfigError, LeaseError
from megacpt.survive import lease as module
from megacpt.survive.lease import Lease, current_owner, process_of, request_stop, stop_request

LONG = ["--stages.s.tokens=1B", "--checkpoint.every_steps=1000000"]


def has_steps(run: Path, count: int):
    return lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_bytes().count(b"\n") >= count


def owner_file(run: Path, number: int, **more) -> Path:
    """The lease of a job on another machine."""
    (run / LEASE).mkdir(parents=True, exist_ok=True)
    path = run / LEASE / f"{number:08d}.json"
    facts = {"attempt": "theirs", "host": "elsewhere", "since": "yesterday", "pid": 7, "start": 1, "machine": "another"}
    path.write_text(json.dumps(facts | more) + "\n")
    return path


def test_only_one_of_many_owns_it(tmp_path, monkeypatch):
    """Eight processes take and release it again and again; inside, each makes a file that must not be there."""
    monkeypatch.setattr(module, "PATIENCE_SECONDS", LONG_SECONDS)

    def work() -> None:
        for _ in range(10):
            lease = Lease(tmp_path, f"of {os.getpid()}")
            lease.take()
            os.close(os.open(tmp_path / "inside", os.O_CREAT | os.O_EXCL))
            assert lease.look() and lease.held()
            os.unlink(tmp_path / "inside")
            lease.release()

    pids = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                work()
                code = 0
            finally:
                os._exit(code)
        pids.append(pid)
    assert [exit_code_of(pid) for pid in pids] == [0] * 8
    assert current_owner(tmp_path).number == 80 and len(list((tmp_path / LEASE).iterdir())) == 1


def test_a_second_job_names_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.3)
    first, second = Lease(tmp_path, "first"), Lease(tmp_path, "second")
    first.take()
    with pytest.raises(
        LeaseError, match=rf"process {os.getpid()} on .*attempt first, since .*last heartbeat \d+ s ago"
    ):
        second.take()
    assert not second.lost and first.look(), "who was refused changed nothing"
    first.release()
    second.take()
    assert second.look()


def test_the_process_decides_on_its_own_machine(tmp_path, monkeypatch):
    """A process that is gone is not waited for, nor one whose number has gone to another process since."""
    monkeypatch.setattr(module, "STALE_SECONDS", 1000.0)
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 1000.0)
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    mine = process_of(os.getpid())
    for i, process in enumerate((replace(mine, pid=child.pid, start=5), replace(mine, start=mine.start + 1)), 1):
        run = tmp_path / str(i)
        owner_file(run, 3, **asdict(process))
        lease = Lease(run, "next")
        lease.take()
        assert lease.number == 4


class Clock:
    """Stands for `time` in the lease: sleeping passes time at once, and what happens meanwhile is `meanwhile`."""

    def __init__(self, meanwhile=lambda clock: None):
        self.now, self.meanwhile = 0.0, meanwhile

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.meanwhile(self)

    def __getattr__(self, name):
        return getattr(time, name)


def test_elsewhere_the_heartbeat_decides_whatever_the_clocks_say(tmp_path, monkeypatch):
    """The file's time is a year ahead, or behind: only whether it changes counts. So it is with a file that was cut in its writing."""
    for i, shift in enumerate((3e7, -3e7)):
        path = owner_file(tmp_path / str(i), 1)

        def beat(clock: Clock, path=path, shift=shift) -> None:
            os.utime(path, (time.time() + shift + clock.now,) * 2)

        clock = Clock(beat)
        monkeypatch.setattr(module, "time", clock)
        with pytest.raises(LeaseError, match="process 7 on elsewhere"):
            Lease(tmp_path / str(i), "next").take()
        assert module.PATIENCE_SECONDS < clock.now < module.STALE_SECONDS, (
            "refused while it lives, before it could be stale"
        )
        clock = Clock()
        monkeypatch.setattr(module, "time", clock)
        lease = Lease(tmp_path / str(i), "next")
        lease.take()
        assert lease.number == 2 and module.STALE_SECONDS < clock.now < module.STALE_SECONDS + 1
    path = owner_file(tmp_path / "cut", 1)
    path.write_bytes(b'{"attempt": "th')
    Lease(tmp_path / "cut", "next").take()
    assert clock.now > 2 * module.STALE_SECONDS


def test_a_slow_one_does_not_come_between(tmp_path):
    """It saw number 1 as the last, then slept while 2 came and went: what it creates now is not the last and gives it nothing."""
    owner_file(tmp_path, 3)
    slow = Lease(tmp_path, "slow")
    assert not slow._create(2) and current_owner(tmp_path).number == 3
    assert [path.name for path in (tmp_path / LEASE).iterdir()] == ["00000003.json"]


def test_the_owner_sees_that_it_is_none_any_more(tmp_path, monkeypatch):
    lease = Lease(tmp_path, "old")
    lease.take()
    lease.fence()
    owner_file(tmp_path, lease.number + 1)
    assert lease.held(), "the last look is not long ago"
    monkeypatch.setattr(module, "TRUST_SECONDS", -1.0)
    assert not lease.held()
    with pytest.raises(LeaseError, match="belongs to process 7 on elsewhere"):
        lease.fence()
    removed = Lease(tmp_path / "b", "old")
    removed.take()
    (tmp_path / "b" / LEASE / "00000001.json").unlink()
    with pytest.raises(LeaseError, match="to nobody"):
        removed.fence()


def test_two_trainings_on_one_directory(recipe_file, tmp_path, monkeypatch):
    """The second is refused with 75 and has written nothing; the first goes on, and has each step once."""
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.5)
    run, seen = tmp_path / "run", {}

    def second(pids):
        wait_until(has_steps(run, 2), alive=pids)
        monkeypatch.setenv(
            "TORCHELASTIC_RESTART_COUNT", "9"
        )  # another launcher's ranks: their heartbeats lie elsewhere
        for rival in ("true", "false"):
            flags = [*LONG, f"--run.directory={run}", f"--health.watchdog={rival}"]
            seen[rival] = run_ranks(2, path, flags)
        monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
        seen["status"], seen["steps"] = status(run), len(rows(run))
        wait_until(has_steps(run, seen["steps"] + 2), alive=pids)
        (run / "stop-request").write_text("please\n")

    path = recipe_file()
    flags = [*LONG, f"--run.directory={run}", "--health.watchdog=true"]
    codes, _ = run_ranks(2, path, flags, during=second)
    assert codes == [0, 0] and seen["status"]["status"] == "running" and seen["status"]["attempt"] == 1
    for rival in ("true", "false"):
        refused, errors = seen[rival]
        assert refused == [75, 75] and all("belongs to another job" in error for error in errors), errors
    assert (status(run)["status"], status(run)["signal"], status(run)["attempt"]) == ("preempted", "stop-request", 1)
    assert [row["step"] for row in rows(run)] == list(range(1, len(rows(run)) + 1))
    assert list_steps(run / "checkpoints") == [len(rows(run))] and not (run / "incidents").exists()


@pytest.mark.parametrize("watchdog", ["true", "false"])
def test_who_lost_the_directory_publishes_nothing(recipe_file, tmp_path, monkeypatch, watchdog):
    """Another job takes the directory over while this one trains. The next save is not published, nothing is pruned, run.json and the
    rows are the other's, and all ranks leave with 75."""
    monkeypatch.setattr(module, "BEAT_SECONDS", 1000.0)  # the fence alone
    run = tmp_path / "run"

    def take_over(pids):
        wait_until(has_steps(run, 5), alive=pids)
        owner_file(run, 2)
        (run / "run.json").write_text('{"status": "running", "attempt_id": "theirs"}')
        (tmp_path / "go").touch()

    def slow():
        from megacpt.train.handlers import steps

        step, count = steps.train_step, []

        def held(*args, **kwargs):
            count.append(1)
            wait_until(lambda: len(count) != 6 or (tmp_path / "go").exists())
            return step(*args, **kwargs)

        steps.train_step = held

    flags = [f"--run.directory={run}", f"--health.watchdog={watchdog}", "--checkpoint.keep_last=2"]
    codes, errors = run_ranks(2, recipe_file(), flags, prepare=slow, during=take_over)
    assert codes == [75, 75], errors
    assert list_steps(run / "checkpoints") == [2, 4] and status(run) == {"status": "running", "attempt_id": "theirs"}
    assert len(rows(run)) in (5, 6)


def test_the_fence_is_what_holds_it_back(recipe_file, tmp_path, monkeypatch):
    """The twin: without it, the job that lost the directory publishes its checkpoint."""
    monkeypatch.setattr(module, "BEAT_SECONDS", 1000.0)
    run = tmp_path / "run"

    def unfenced():
        from megacpt.survive.run_directory import RunDirectory

        RunDirectory.fence = lambda self: None

    def take_over(pids):
        wait_until(has_steps(run, 1), alive=pids)
        owner_file(run, 2)

    run_ranks(1, recipe_file(), [f"--run.directory={run}"], prepare=unfenced, during=take_over)
    assert 8 in list_steps(run / "checkpoints")


def test_a_stop_request_is_for_who_is_meant(tmp_path, monkeypatch):
    asked = []
    keeper = module.Keeper(asked.append, [])
    try:
        monkeypatch.setenv(
            module.ATTEMPT, module.Supervised("mine", process_of(os.getpid())).environment()[module.ATTEMPT]
        )
        request_stop(tmp_path, "mine", "SIGUSR1")
        lease = Lease(tmp_path, "mine.0")
        lease.take()
        assert stop_request(tmp_path), "it came before the owner"
        keeper._read(lease)
        request_stop(tmp_path, "theirs", "SIGTERM")
        keeper._read(lease)
        assert asked == ["SIGUSR1"]
        (tmp_path / "stop-request").write_text("by hand")
        keeper._read(lease)
        assert asked == ["SIGUSR1", "stop-request"]
        lease.release()
        Lease(tmp_path, "later").take()
        assert stop_request(tmp_path) is None, "a later job is not asked"
    finally:
        keeper.close()


STRANGE = [
    "1.json",
    "²0000001.json",
    "٠٠٠٠٠٠٩٩.json",
    "0000000999.json",
    "00000000.json",
    "x.json",
    "00000099.json.tmp",
    "-0000099.json",
]


def test_only_the_names_that_owners_give_are_leases(tmp_path):
    """Whatever else lies there: nobody waits for it, and it stays."""
    (tmp_path / LEASE).mkdir()
    for name in STRANGE:
        (tmp_path / LEASE / name).write_text("{}")
    assert current_owner(tmp_path) is None
    lease = Lease(tmp_path, "mine")
    lease.take()
    assert lease.number == current_owner(tmp_path).number == 1 and lease.look()
    assert sorted(os.listdir(tmp_path / LEASE)) == sorted([*STRANGE, "00000001.json"])
    lease.release()


def test_a_lease_that_is_no_file_is_named_at_once(tmp_path):
    (tmp_path / LEASE / "00000003.json").mkdir(parents=True)
    (tmp_path / LEASE / "00000004.json").symlink_to("00000004.json")
    with pytest.raises(ConfigError) as error:
        Lease(tmp_path, "mine").take()
    assert len(error.value.problems) == 2 and "is no plain file, where a lease belongs" in str(error.value)


def test_no_look_at_the_owner_is_without_an_end(tmp_path, monkeypatch):
    """A folder that lists what is not there, as a client of NFS may for a while, and another that is always faster."""
    owner_file(tmp_path, 1).unlink()
    monkeypatch.setattr(module.os, "listdir", lambda folder: ["00000001.json"])
    with pytest.raises(OSError, match="leases that were not there"):
        current_owner(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(Lease, "_create", lambda self, number: False)
    with pytest.raises(LeaseError, match="others came before this job"):
        Lease(tmp_path, "mine").take()


@pytest.mark.parametrize(
    "content",
    [b"", b"[" * 1_000_000, b'{"pid": 1e999, "start": 1, "machine": ""}\n', b'{"pid": -1, "start": 1, "machine": "x"}\n',
     b'{"pid": ' + b"9" * 400 + b', "start": 1, "machine": "x"}\n', b'{"pid": true, "start": 1, "machine": "x"}\n', b"\xff" * 5000],
)  # fmt: skip
def test_an_owner_that_no_process_can_be_is_unknown(tmp_path, content):
    owner_file(tmp_path, 5).write_bytes(content)
    found = current_owner(tmp_path)
    assert found.number == 5 and found.process is None and "process unknown on" in found.describe(tmp_path, None)


@pytest.mark.parametrize("content", [b"[" * 1_000_000, b'{"why":' * 9000, b"\xff\xfe", b"9" * 5000, b"[1]"])
def test_a_stop_request_may_hold_anything(tmp_path, content):
    """As before it is for whoever owns the directory; what is empty or no file asks for nothing."""
    (tmp_path / "stop-request").write_bytes(content)
    assert stop_request(tmp_path) == {"why": "stop-request"}
    for empty in (b"", b" \n"):
        (tmp_path / "stop-request").write_bytes(empty)
        assert stop_request(tmp_path) is None
    (tmp_path / "stop-request").unlink()
    os.mkfifo(tmp_path / "stop-request")
    assert stop_request(tmp_path) is None


def test_the_keeper_outlives_what_it_meets(tmp_path, monkeypatch, capsys):
    """A round that fails is told once, and the next one comes: the lease is shown to live, and a stop is heard."""
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.0)
    rounds, asked = [], []

    class Broken:
        run = tmp_path

        def beat(self):
            rounds.append(1)
            if len(rounds) < 5:
                raise RecursionError("too deep")

    (tmp_path / "stop-request").write_text("by hand")
    keeper = module.Keeper(asked.append, [])
    keeper.lease = Broken()
    try:
        wait_until(lambda: asked)
    finally:
        keeper.close()
    assert len(rounds) >= 5 and capsys.readouterr().err.count("goes on after RecursionError: too deep") == 1


def ask_to_stop(run: Path) -> None:
    """By hand, when three more steps have been made: what happened before has ended nothing."""
    wait_until(has_steps(run, len(rows(run)) + 3))
    (run / "stop-request").write_text("please")


def stopped_on_request(run: Path) -> None:
    assert (status(run)["status"], status(run)["signal"]) == ("preempted", "stop-request")
    assert [row["step"] for row in rows(run)] == list(range(1, len(rows(run)) + 1))


def start(*command: str, **more) -> subprocess.Popen:
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"} | more.pop("env", {}), **more)


def supervisor(*command: str, **more) -> subprocess.Popen:
    return start(*SUPERVISE[:-1], "--backoff", "0.1", "--", *command, **more)


def test_ranks_end_with_a_killed_agent(recipe_file, tmp_path):
    """torchrun is killed, as the system does when memory is short: its rank ends, though it sleeps, the supervisor starts again, and each
    step is there once. With a watchdog, two ranks, and the numbers of a run without: test_supervise.py."""
    run, log = tmp_path / "run", open(tmp_path / "log", "w")
    flags = [*QUICK, f"--run.directory={run}", "--health.watchdog=false"]
    fault = {"MEGACPT_FAULT": f"sleep:point=step.begin,step=4,once={tmp_path}/1"}
    child = supervisor(*torchrun(1), recipe_file(), *flags, stderr=log, env=fault)
    wait_until(has_steps(run, 3), alive=[child.pid])
    kill_agent(child.pid)
    assert child.wait(LONG_SECONDS) == 0, (tmp_path / "log").read_text()
    assert status(run)["status"] == "finished" and [row["step"] for row in rows(run)] == list(range(1, 9))


@pytest.mark.parametrize("watchdog", ["true", "false"])
def test_ranks_end_with_a_killed_supervisor(recipe_file, tmp_path, watchdog):
    """And the next one waits for them."""
    run, log = tmp_path / "run", open(tmp_path / "log", "w")
    flags = [*QUICK, f"--run.directory={run}", f"--health.watchdog={watchdog}"]
    endless = supervisor(*PLAIN, recipe_file(), *flags, *LONG, "--checkpoint.every_steps=2", stderr=log)
    wait_until(has_steps(run, 3), alive=[endless.pid])
    below = descendants(endless.pid)
    endless.kill()
    endless.wait()
    wait_until(lambda: not any(module.process_state(pid) for pid in below))
    last = rows(run)[-1]["step"]
    assert last >= 3  # whether they could still save and release it before they were killed is a matter of milliseconds
    again = supervisor(*PLAIN, recipe_file(), *flags, *LONG, f"--run.stop_at_step={last + 2}", stderr=log)
    assert again.wait(LONG_SECONDS) == 0, (tmp_path / "log").read_text()
    assert [row["step"] for row in rows(run)] == list(range(1, last + 3))


def test_a_closed_terminal_ends_nothing(recipe_file, tmp_path):
    """Supervisor and ranks have a terminal that is closed in the middle: SIGHUP and EIO. The run goes on, and its events say so."""
    run = tmp_path / "run"
    command = [*SUPERVISE, *PLAIN, recipe_file(), *QUICK, *LONG, f"--run.directory={run}"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execv(sys.executable, command)
    wait_until(has_steps(run, 1), alive=[pid])
    os.close(terminal)
    ask_to_stop(run)
    assert exit_code_of(pid) == 0
    stopped_on_request(run)
    assert len(events(run, "console_lost")) == 1


def test_a_hangup_of_the_launcher_ends_nothing(recipe_file, tmp_path):
    """launch/torchrun.sh without a supervisor, in a terminal that is closed; torchrun's own default hands SIGHUP on and ends."""
    run, script = tmp_path / "run", str(Path(__file__).parents[2] / "launch/torchrun.sh")
    more = {"PYTHON": sys.executable, "NPROC": "1"}
    child = start("bash", script, recipe_file(), *QUICK, *LONG, f"--run.directory={run}", env=more)
    wait_until(has_steps(run, 1), alive=[child.pid])
    for pid in [child.pid, *descendants(child.pid)]:
        os.kill(pid, signal.SIGHUP)
    ask_to_stop(run)
    assert child.wait(LONG_SECONDS) == 0
    stopped_on_request(run)


def test_a_reader_that_leaves_ends_nothing(recipe_file, tmp_path):
    """megacpt train … 2>&1 | head -2"""
    run = tmp_path / "run"
    words = [*PLAIN, recipe_file(), *QUICK, *LONG, f"--run.directory={run}"]
    child = start(*words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    child.stdout.readline()
    child.stdout.close()
    wait_until(has_steps(run, 1), alive=[child.pid])
    ask_to_stop(run)
    assert child.wait(LONG_SECONDS) == 0
    stopped_on_request(run)
    assert "Broken pipe" in events(run, "console_lost")[0]["error"]


def test_a_verb_that_prints_into_a_closed_pipe_has_not_done_its_work(recipe_file):
    """As `seq 1000000 | head -1` has it: 141, without a word."""
    read, write = os.pipe()
    os.close(read)
    child = start(
        sys.executable, "-m", "megacpt", "check", recipe_file(), stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    _, said = child.communicate(timeout=LONG_SECONDS)
    assert (child.returncode, said) == (128 + signal.SIGPIPE, "")
