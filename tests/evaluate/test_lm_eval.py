"""An export evaluated by lm-evaluation-harness with a task of our own, offline (docs/after.md)."""

import pytest
import transformers
from local_task import run_lm_eval
from ranks import on_ranks
from samples import tiny_config, without_names

from megacpt.cli import run

pytest.importorskip("lm_eval", reason="needs lm-eval, which the extra dev installs")


def test_an_export_runs_in_lm_eval(tmp_path, tokenizer_dir, recipe_file):
    raw = without_names(tiny_config())
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**raw)).save_pretrained(tmp_path / "hf")
    transformers.AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(tmp_path / "hf")
    recipe = recipe_file(model={"pretrained": str(tmp_path / "hf")})
    assert on_ranks(1, run, ["train", recipe, "--run.stop_at_step=2"]) == [0]
    assert run(["export", str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 0
    assert 0 <= run_lm_eval(tmp_path / "out", tmp_path, by_command_line=False) <= 1
