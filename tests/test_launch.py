"""Launch files: recipes that check, templates that parse, and a Slurm job on stand-ins of srun and scontrol."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from shared import LONG_SECONDS, wait_until

from megacpt.config.load import load_recipe
from megacpt.plan.check import check, schedule_svg
from megacpt.plan.describe import describe

ROOT = Path(__file__).parents[1]
RECIPES = {
    "llama31_8b_8gpu_8k": (8, "data 1 x 8, pipeline 1, context 1, tensor 1"),
    "llama31_8b_32gpu_128k": (32, "data 1 x 4, pipeline 1, context 8, tensor 1"),
    "llama31_8b_zh_code_64gpu": (64, "data 1 x 64, pipeline 1, context 1, tensor 1"),
    "llama31_70b_256gpu": (256, "data 1 x 8, pipeline 4, context 1, tensor 8"),
    "llama31_405b_8192gpu": (8192, "data 1 x 64, pipeline 16, context 1, tensor 8"),
    "llama31_405b_16384gpu": (16384, "data 1 x 128, pipeline 16, context 1, tensor 8"),
    "llama3_8b_8k_to_128k": (64, "data 1 x 64, pipeline 1, context 1, tensor 1"),
    "synE_8b_64gpu": (64, "data 1 x 64, pipeline 1, context 1, tensor 1"),
    "ziya_vocabulary_32gpu": (32, "data 1 x 32, pipeline 1, context 1, tensor 1"),
    "domain_adaptation": (64, "data 1 x 64, pipeline 1, context 1, tensor 1"),
    "new_language": (64, "data 1 x 64, pipeline 1, context 1, tensor 1"),
    "llama3_phases_405b_16384gpu": (16384, "data 1 x 128, pipeline 16, context 1, tensor 8"),
    "llama31_405b_16384gpu_128k": (16384, "data 1 x 8, pipeline 16, context 16, tensor 8"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_pass_check_without_files(name):
    world_size, layout = RECIPES[name]
    recipe = load_recipe(str(ROOT / f"launch/recipes/{name}.toml"))
    report = check(recipe, world_size, files=False)
    assert not report.problems and f"layout {layout} on {world_size} processes" in describe(report.facts)
    if "405b" in name or "70b" in name:
        picture = schedule_svg(recipe, world_size, files=False)
        assert picture.count("<title>") > 1000
    if "405b" in name:  # Llama 3 paper, table 4, and the split of section 3.3.2
        assert any(
            line.strip() == "pipeline interleaved, layers of the 128 stages: 0, 126 x 1, 0"
            for line in describe(report.facts)
        )


def test_every_recipe_is_in_the_list():
    found = {path.stem for path in (ROOT / "launch/recipes").glob("*.toml")}
    assert found == {*RECIPES, "quickstart", "quickstart_base"}


@pytest.mark.parametrize("name", ["torchrun.sh", "slurm.sbatch", "quickstart.sh", "environment.sh"])
def test_scripts_are_bash(name):
    subprocess.run(["bash", "-n", str(ROOT / "launch" / name)], check=True)


@pytest.mark.parametrize("given, expected", [({}, "32"), ({"CUDA_DEVICE_MAX_CONNECTIONS": "16"}, "16")])
def test_torchrun_sh_gives_a_process_queues_for_its_streams(tmp_path, given, expected):
    python = tmp_path / "python"
    python.write_text('#!/usr/bin/env bash\necho "$CUDA_DEVICE_MAX_CONNECTIONS"\n')
    python.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_DEVICE_MAX_CONNECTIONS"}
    environment |= {"PYTHON": str(python), "NPROC": "1"} | given
    command = ["bash", str(ROOT / "launch/torchrun.sh"), "recipe.toml"]
    assert subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip() == expected


def test_the_job_set_is_whole():
    job = yaml.safe_load((ROOT / "launch/k8s.yaml").read_text())
    (group,) = job["spec"]["replicatedJobs"]
    pods = group["template"]["spec"]
    (container,) = pods["template"]["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert all(isinstance(value, str) for value in environment.values())
    assert pods["parallelism"] == pods["completions"] == int(environment["NNODES"])
    assert (
        environment["RENDEZVOUS"].split(":")[0]
        == f"{job['metadata']['name']}-{group['name']}-0-0.{job['metadata']['name']}"
    )
    assert pods["template"]["spec"]["terminationGracePeriodSeconds"] > int(environment["SHUTDOWN_TIMEOUT"])
    world_size = int(environment["NNODES"]) * int(environment["NPROC"])
    assert container["command"][:2] == ["bash", "launch/torchrun.sh"]
    report = check(load_recipe(str(ROOT / container["command"][2]), container["args"]), world_size, files=False)
    assert not report.problems
    mounted = {volume["name"] for volume in pods["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == mounted


def test_what_the_image_copies_is_there():
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY"):
            assert all((ROOT / source).exists() for source in line.split()[1:-1]), line


def test_a_slurm_job_saves_and_requeues(recipe_file, tmp_path):
    """SIGUSR1 to the batch script, as ten minutes before the end: checkpoint, status preempted, back into the queue."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    stand_ins = {
        "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',  # one node: this one
        "sinfo": "echo localhost idle",
        "squeue": "echo RUNNING",
        "scontrol": f'if [ "$1" = show ]; then echo localhost; else echo "$*" >> {tmp_path}/scontrol.log; fi',
    }
    for name, body in stand_ins.items():
        (bin_folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (bin_folder / name).chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not re.match("RANK|WORLD_SIZE|LOCAL_RANK|MASTER_", k)}
    environment |= {
        "PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHON": sys.executable, "NPROC": "1", "SHUTDOWN_TIMEOUT": "600",
        "SLURM_JOB_NODELIST": "n", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": "7",
    }  # fmt: skip
    path = recipe_file()
    command = [
        "bash",
        "launch/slurm.sbatch",
        path,
        "--stages.s.tokens=1B",
        "--validation=[]",
        "--checkpoint.every_steps=100000",
    ]
    job = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    metrics = tmp_path / "run/metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2, alive=[job.pid])
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=LONG_SECONDS)
    assert job.returncode == 0, output
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "preempted"
    assert (tmp_path / "scontrol.log").read_text() == "requeue 7\n"
    assert list((tmp_path / "run/checkpoints").glob("step-*"))


def test_no_collective_is_redundant():
    """Counts and bytes of every collective of a step equal the formula in the benchmark's head."""
    command = [sys.executable, str(ROOT / "launch/bench/collectives.py"), "--layouts", "tp2 cp2 pp2"]
    out = subprocess.run(command, capture_output=True, text=True)
    rows = [line.split(" | ") for line in out.stdout.splitlines()[2:]]
    assert out.returncode == 0 and {row[1] for row in rows} == {"tp", "cp", "fsdp", "pp"}, out.stderr
    assert all(row[2] == row[3] and row[4] == row[5].removesuffix(" |") for row in rows)
