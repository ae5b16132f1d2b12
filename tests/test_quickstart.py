"""The quickstart as a new user runs it, and its export in lm-evaluation-harness (slow: --full); and one that is stopped."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from local_task import run_lm_eval

ROOT = Path(__file__).parents[1]


@pytest.mark.full
def test_the_quickstart_and_its_export_in_lm_eval(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    begin = time.monotonic()
    out = subprocess.run(["bash", "launch/quickstart.sh"], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-2000:]
    print(f"quickstart: {time.monotonic() - begin:.0f} s")
    for said in ("gain: -", "ETA", "loaded with transformers", "tensorboard --logdir"):
        assert said in out.stdout + out.stderr, said
    events = [json.loads(line) for line in (ROOT / "runs/quickstart/events.jsonl").read_text().splitlines()]
    losses = [event["losses"] for event in events if event["kind"] == "validation"]
    assert losses[-1]["code"] < losses[0]["code"] - 1
    assert 0 <= run_lm_eval(ROOT / "runs/quickstart/export", tmp_path, by_command_line=True) <= 1


@pytest.mark.parametrize("code", [3, 75])
def test_a_quickstart_that_is_stopped_shows_no_result(tmp_path, code):
    """A stand-in of Python that says what it was called for; the second training is stopped on request, or fails."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    python = tmp_path / "python"
    python.write_text(
        f'#!/usr/bin/env bash\necho "$*" >> {tmp_path}/calls\n'
        f'[[ "$*" == "-m megacpt train launch/recipes/quickstart.toml --require finished" ]] && exit {code}\nexit 0\n'
    )
    python.chmod(0o755)
    (tmp_path / "launch/environment.sh").write_text(f'megacpt_environment() {{ VENV_PYTHON="{python}"; }}\n')
    out = subprocess.run(["bash", str(tmp_path / "launch/quickstart.sh")], capture_output=True, text=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert out.returncode == code and "not finished, so nothing is exported" in out.stderr
    assert "-m megacpt export runs/base --output runs/base/export" in calls
    assert (
        calls[-1].startswith("-m megacpt train launch/recipes/quickstart.toml")
        and "5. what came of it" not in out.stdout
    )
