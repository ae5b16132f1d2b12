"""An export evaluated by lm-evaluation-harness with a task of our own, offline (docs/after.md)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from samples import TEXTS, tiny_config, without_names

from megacpt.cli import run

pytest.importorskip("lm_eval", reason="needs lm-eval, which the extra dev installs")

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


def test_an_export_runs_in_lm_eval(tmp_path, tokenizer_dir, recipe_file):
    raw = without_names(tiny_config())
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**raw)).save_pretrained(tmp_path / "hf")
    transformers.AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(tmp_path / "hf")
    recipe = recipe_file(model={"pretrained": str(tmp_path / "hf")})
    out = subprocess.run(
        [sys.executable, "-m", "megacpt", "train", recipe, "--run.stop_at_step=2"], capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    assert run(["export", str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 0
    assert 0 <= run_lm_eval(tmp_path / "out", tmp_path) <= 1


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
