"""The quickstart as a new user runs it, and its export in lm-evaluation-harness. Slow: with tests/run.sh --full."""

import json
import os
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
    assert 0 <= run_lm_eval(ROOT / "runs/quickstart/export", tmp_path) <= 1
