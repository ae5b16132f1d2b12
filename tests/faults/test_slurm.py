"""Promise 4 on a real Slurm: what asks a job to stop reaches the ranks, which save; the job goes back into the queue and goes on."""

import subprocess
import sys
from pathlib import Path

import pytest
import slurm_cluster
from crash import rows, status
from shared import LONG_SECONDS
from slurm_cluster import cluster, output, until

from megacpt.survive.run_directory import read_status

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(bool(slurm_cluster.missing()), reason=slurm_cluster.missing() or "all there")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("slurm") / "cluster") as environment:
        yield environment


def field(slurm, job: str, name: str) -> str:
    """Of `scontrol show job`."""
    words = output(slurm, "scontrol", "show", "job", job).split()
    return next((word.partition("=")[2] for word in words if word.startswith(f"{name}=")), "")


def submit(slurm, tmp_path, *arguments: str, ranks: int = 1) -> str:
    options = ["--parsable", "--nodes=1", "--gpus-per-node=0", "--time=60", f"--output={tmp_path}/job.log"]
    environment = slurm | {
        "PYTHON": sys.executable,
        "NPROC": str(ranks),
        "SHUTDOWN_TIMEOUT": "600",
        "OMP_NUM_THREADS": "1",
    }
    words = ["sbatch", *options, "launch/slurm.sbatch", *arguments]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def begin_again(slurm, job: str) -> None:
    """Slurm itself lets two minutes pass after a requeue; in the same second it would take the old credential, which is revoked."""
    output(slurm, "scontrol", "update", f"JobId={job}", "StartTime=now+5", "TimeLimit=60")


def cancel(slurm, job: str, told) -> None:
    """The ranks may save; the job does not come back."""
    before = field(slurm, job, "Restarts")
    output(slurm, "scancel", job)

    def ended():
        return field(slurm, job, "JobState") in ("CANCELLED", "FAILED", "COMPLETED")

    until(lambda: ended() and not output(slurm, "squeue", "--noheader"), LONG_SECONDS, told)
    assert field(slurm, job, "Restarts") == before, told()


def trained(run: Path, attempt: int, steps: int):
    """Whether that attempt has made so many steps more than its checkpoint had."""
    facts = read_status(run)

    def newer():
        return [row for row in rows(run) if row["step"] > facts["started_at_step"]]

    return facts.get("attempt") == attempt and (run / "metrics.jsonl").exists() and len(newer()) >= steps


@pytest.mark.parametrize("watchdog", ["true", "false"])
def test_a_job_saves_when_its_end_is_near_or_it_is_to_leave_and_goes_on(slurm, recipe_file, tmp_path, watchdog):
    """USR1 as `--signal` sends it before the time limit, then SIGTERM to the batch script. Both times the ranks save, which they do at no
    other time here, and the job is requeued and resumes there. `--dtype` among the arguments is none of the template's business."""
    run, path = tmp_path / "run", recipe_file()
    flags = ["--stages.s.tokens=1B", "--validation=[]", "--checkpoint.every_steps=1000000", "--log.tensorboard=false"]
    ranks = 2 if watchdog == "true" else 1
    job = submit(slurm, tmp_path, path, *flags, f"--health.watchdog={watchdog}", "--dtype", "float32", ranks=ranks)

    def told():
        return (tmp_path / "job.log").read_text()[-3000:] + output(slurm, "scontrol", "show", "job", job)

    try:
        until(lambda: trained(run, 1, 2), LONG_SECONDS, told)
        minutes = 2 + int(field(slurm, job, "RunTime").split(":")[1])
        output(
            slurm, "scontrol", "update", f"JobId={job}", f"TimeLimit={minutes + 8}"
        )  # less than the 600 s of --signal are left
        until(lambda: field(slurm, job, "Restarts") == "1", LONG_SECONDS, told)
        begin_again(slurm, job)
        assert "launch/slurm.sbatch: exit 0, run preempted" in told()
        until(lambda: trained(run, 2, 2), LONG_SECONDS, told)
        assert status(run)["start"] == "resume" and status(run)["started_at_step"] >= 2
        first = status(run)["started_at_step"]
        output(slurm, "scancel", "--signal=TERM", "--batch", job)
        until(lambda: field(slurm, job, "Restarts") == "2", LONG_SECONDS, told)
        begin_again(slurm, job)
        until(lambda: trained(run, 3, 1), LONG_SECONDS, told)
        assert status(run)["started_at_step"] > first
        steps = [row["step"] for row in rows(run)]  # the run goes on meanwhile
        assert steps == list(range(1, len(steps) + 1)), "each step once"
        assert "Killed" not in told() and "Traceback" not in told()
    finally:
        cancel(slurm, job, told)


def test_a_preempted_job_saves_and_goes_on(slurm, recipe_file, tmp_path):
    """A job of a better partition takes the node: Slurm sends SIGTERM to every process, kills after 30 s, and requeues by itself."""
    run = tmp_path / "run"
    flags = ["--stages.s.tokens=1B", "--validation=[]", "--checkpoint.every_steps=1000000", "--log.tensorboard=false"]
    job = submit(slurm, tmp_path, recipe_file(), *flags)

    def told():
        return (tmp_path / "job.log").read_text()[-3000:] + output(slurm, "scontrol", "show", "job", job)

    try:
        until(lambda: trained(run, 1, 2), LONG_SECONDS, told)
        urgent = ["--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=true"]
        assert output(slurm, "sbatch", "--parsable", *urgent).isdigit()
        until(
            lambda: field(slurm, job, "Restarts") == "1" and field(slurm, job, "JobState") == "PENDING",
            LONG_SECONDS,
            told,
        )
        first = read_status(run)["attempt"]
        begin_again(slurm, job)
        until(lambda: trained(run, first + 1, 1), LONG_SECONDS, told)
        assert status(run)["start"] == "resume" and status(run)["started_at_step"] >= 2, told()
    finally:
        cancel(slurm, job, told)


def test_a_recipe_error_is_not_requeued_and_a_run_that_is_not_there_is_no_traceback(slurm, recipe_file, tmp_path):
    job = submit(slurm, tmp_path, recipe_file(), "--run.start=resume", f"--run.directory={tmp_path}/none")

    def told():
        return (tmp_path / "job.log").read_text() + output(slurm, "scontrol", "show", "job", job)

    until(lambda: field(slurm, job, "JobState") in ("COMPLETED", "FAILED"), LONG_SECONDS, told)
    assert field(slurm, job, "ExitCode") == "2:0" and field(slurm, job, "Restarts") == "0", told()
    after = told().rpartition("attempt 1: ")[2]  # torchrun's own traceback stands before
    assert "launch/slurm.sbatch: exit 2, run unknown" in after and "Traceback" not in after
