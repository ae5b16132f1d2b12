"""A multiple-choice task of our own in lm-evaluation-harness, offline."""

import json
import os
import subprocess
import sys
from pathlib import Path

from samples import TEXTS

TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""


def run_lm_eval(model: Path, work: Path) -> float:
    """Accuracy on six made-up questions, offline."""
    (work / "tasks").mkdir()
    questions = [{"question": t, "choices": ["data", "order"], "answer": i % 2} for i, t in enumerate(TEXTS[:6])]
    (work / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (work / "tasks/local.yaml").write_text(TASK.format(data=work / "q.jsonl"))
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={model},dtype=float32",
        "--tasks",
    ]
    command += [
        "local_choice",
        "--include_path",
        str(work / "tasks"),
        "--device",
        "cpu",
        "--output_path",
        str(work / "result"),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(work / "home")}
    out = subprocess.run(command, capture_output=True, text=True, env=os.environ | offline, cwd=work)
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(next((work / "result").rglob("results*.json")).read_text())["results"]["local_choice"]["acc,none"]
