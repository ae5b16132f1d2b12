"""The benchmarks run whole, on small shapes: what a GPU will run."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "only",
    [["adamw", "attention"], pytest.param(["rms_norm", "cross_entropy", "embedding"], marks=pytest.mark.full)],
    ids=str,
)
def test_the_kernel_benchmark_runs_and_writes_its_table(tmp_path, only):
    command = [
        sys.executable,
        "-m",
        "megacpt_kernels.bench",
        "--tiny",
        "--csv",
        str(tmp_path / "k.csv"),
        "--only",
        *only,
    ]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout + out.stderr
    rows = list(csv.DictReader(open(tmp_path / "k.csv")))
    assert [row["op"] for row in rows[:2]] == ["copy", "matmul"] and len(rows) > 5
    assert all(float(row["median_us"]) > 0 for row in rows[2:])
    errors = [float(row["max_rel_err"]) for row in rows if row["max_rel_err"] not in ("", "nan")]
    assert errors and max(errors) < 1e-5


def test_a_wrong_kernel_fails_the_benchmark(monkeypatch, capsys):
    from megacpt_kernels import bench

    monkeypatch.setattr(bench, "grad_norm", lambda grads: grads[0].abs().sum())
    monkeypatch.setattr(sys, "argv", ["bench", "--tiny", "--only", "adamw"])
    with pytest.raises(SystemExit, match="grad_norm : relative error .* against float64"):
        bench.main()


def test_the_step_benchmark_runs(tmp_path):
    command = [
        "bash",
        str(ROOT / "launch/bench_train.sh"),
        "--tiny",
        "--steps",
        "1",
        "--programs",
        "megacpt",
        "--csv",
        str(tmp_path / "s"),
    ]
    environment = os.environ | {"PYTHON": sys.executable}
    out = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert out.returncode == 0 and "share of the kernels' time" in out.stdout, out.stdout + out.stderr
    assert float(next(csv.DictReader(open(tmp_path / "s")))["tokens_per_second"]) > 0
