"""Every Triton kernel compiles for Hopper within its budget, on a machine without a GPU."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="needs Triton (Linux)")


def compiled(*arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "megacpt_kernels.compile_check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_every_kernel_is_within_its_budget_on_hopper():
    out = compiled()
    rows = [line for line in out.stdout.splitlines() if "| sm_90 |" in line]
    assert out.returncode == 0 and len(rows) == 19 and all(row.endswith("| ok |") for row in rows), (
        out.stdout + out.stderr
    )


@pytest.mark.full
def test_on_ampere_and_blackwell_too():
    out = compiled("--arch", "80", "100")
    assert out.returncode == 0 and out.stdout.count("| ok |") == 38, out.stdout + out.stderr


def test_the_budget_can_be_broken():
    """Twin: spills, too much shared memory, too many registers, narrow loads are each named."""
    from dataclasses import replace

    from megacpt_kernels.compile_check import Case, Resources, over_budget

    case = Case("k", None, (), {}, registers=64, loads=2, stores=1)
    good = Resources(registers=64, spills=0, shared=1024, loads=2, stores=1)
    assert over_budget(case, good, 90) == []
    assert over_budget(case, replace(good, spills=180), 80) == ["spills 180 bytes"]
    assert "there are 232448" in over_budget(case, replace(good, shared=240000), 90)[0]
    assert over_budget(case, replace(good, registers=65), 90) == ["65 registers, budget 64"]
    assert "wanted 2 and 1" in over_budget(case, replace(good, loads=0), 90)[0]
    assert over_budget(replace(case, multiplies=True), good, 90) == ["no HGMMA"]
