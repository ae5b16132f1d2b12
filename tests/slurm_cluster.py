"""A real Slurm of one node on this machine, with a configuration, keys, ports and folders of its own: munged, slurmctld, slurmd."""

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "sinfo")

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={work}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={work}/state
SlurmdSpoolDir={work}/spool
SlurmctldPidFile={work}/slurmctld.pid
SlurmdPidFile={work}/slurmd.pid
SlurmctldLogFile={work}/slurmctld.log
SlurmdLogFile={work}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,requeue_delay=1
KillWait=30
MinJobAge=600
ReturnToService=2
SlurmdTimeout=600
MpiDefault=none
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes={host} Default=YES PriorityTier=1 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes={host} PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """What this machine lacks for it; nothing where all is there."""
    lacking = [name for name in NEEDED if not shutil.which(name, path=_path())]
    if lacking:
        return f"needs Slurm and munge on the machine ({', '.join(lacking)} not found; Debian: slurm-wlm munge)"
    return "" if os.getuid() == 0 else "needs root: slurmd starts tasks of users"


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def cluster(work: Path):
    """Yields the environment with which its commands are called. Its daemons end with it."""
    work.mkdir(mode=0o755)
    for name in ("state", "spool"):
        (work / name).mkdir()
    controller, daemon = _free_ports(2)
    host = socket.gethostname().split(".")[0]
    facts = {"host": host, "controller": controller, "daemon": daemon, "work": work, "cpus": os.cpu_count()}
    (work / "slurm.conf").write_text(CONF.format(**facts))
    (work / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nIgnoreSystemd=yes\n")
    key = work / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "RANK", "WORLD_SIZE", "LOCAL_"))}
    environment |= {"PATH": _path(), "SLURM_CONF": str(work / "slurm.conf")}
    munged = [
        "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={work}/munge.socket",
        f"--pid-file={work}/munged.pid", f"--log-file={work}/munged.log", f"--seed-file={work}/munged.seed", "--num-threads=2",
    ]  # fmt: skip
    daemons = []
    try:
        for words in (munged, ["slurmctld", "-D", "-c"], ["slurmd", "-D", "-N", host]):
            said = open(work / f"{words[0]}.out", "w")
            daemons.append(subprocess.Popen(words, env=environment, stdout=said, stderr=said, start_new_session=True))
        until(lambda: node_state(environment) == "idle", 120, lambda: _logs(work))
        yield environment
    finally:
        for job in output(environment, "squeue", "--noheader", "--format=%i").split():
            output(environment, "scancel", "--signal=KILL", "--full", job)
            output(environment, "scancel", job)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and output(environment, "squeue", "--noheader"):
            time.sleep(0.2)
        for signal_name, seconds in (("terminate", 15.0), ("kill", 5.0)):
            for each in reversed(daemons):
                if each.poll() is None:
                    getattr(each, signal_name)()
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline and any(each.poll() is None for each in daemons):
                time.sleep(0.1)
        for pid in _left_over(environment["SLURM_CONF"]):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _left_over(conf: str) -> list[int]:
    """Processes of this cluster's jobs that nobody ends any more."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"SLURM_CONF={conf}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return [pid for pid in found if pid != os.getpid()]


def until(ready, seconds: float, told) -> None:
    """Waits for what must come, up to a deadline; `told()` says what there is instead."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, told()
        time.sleep(0.2)


def node_state(environment: dict[str, str]) -> str:
    return output(environment, "sinfo", "--noheader", "--format=%t")


def output(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip()


def _logs(work: Path) -> str:
    return "\n".join(
        f"== {path.name}\n{path.read_text()[-3000:]}"
        for path in sorted(work.glob("*.*"))
        if "log" in path.name or "out" in path.name
    )
