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


API = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
model, folder = sys.argv[1:]
found = lm_eval.simple_evaluate(
    "hf", model_args=f"pretrained={model},dtype=float32", tasks=["local_choice"], device="cpu",
    task_manager=TaskManager(include_path=folder, include_defaults=False),
)
print("accuracy", found["results"]["local_choice"]["acc,none"])
"""
"""Without the index of all tasks that the harness brings: reading it takes longer than all else."""


def run_lm_eval(model: Path, work: Path, by_command_line: bool) -> float:
    """Accuracy on six made-up questions, offline; from the harness's command line or from its Python interface."""
    tasks = work / "tasks"
    tasks.mkdir()
    questions = [{"question": t, "choices": ["data", "order"], "answer": i % 2} for i, t in enumerate(TEXTS[:6])]
    (work / "q.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (tasks / "local.yaml").write_text(TASK.format(data=work / "q.jsonl"))
    command = [sys.executable, "-c", API, str(model), str(tasks)]
    if by_command_line:
        words = ["--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--device", "cpu"]
        words += ["--tasks", "local_choice", "--include_path", str(tasks), "--output_path", str(work / "result")]
        command = [sys.executable, "-m", "lm_eval", *words]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(work / "home")}
    out = subprocess.run(command, capture_output=True, text=True, env=os.environ | offline, cwd=work)
    assert out.returncode == 0, out.stderr[-3000:]
    if not by_command_line:
        return float(out.stdout.rpartition("accuracy ")[2])
    found = json.loads(next((work / "result").rglob("results*.json")).read_text())
    return found["results"]["local_choice"]["acc,none"]
