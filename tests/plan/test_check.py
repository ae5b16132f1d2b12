"""Illegal layouts are refused before a process starts, with the numbers; what `check` says of pipelines; its picture."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from samples import tiny_config

from megacpt.cli import run
from megacpt.config.load import load_recipe
from megacpt.config.model import load_model_config
from megacpt.family.shapes import ARCHITECTURES
from megacpt.model.split import plan_pipeline
from megacpt.plan.check import check
from megacpt.plan.describe import describe
from megacpt.plan.memory import rank_parameters


@pytest.mark.parametrize(
    "world_size, flags, expected",
    [
        (8, "tensor=8", "does not divide the model's num_attention_heads = 4"),
        (3, "tensor=3", "num_key_value_heads = 2 can neither be divided by it nor repeated to it. Use 1, 2, 4."),
        (3, "tensor=3", "does not divide the model's intermediate_size = 56"),
        (3, "tensor=3", "does not divide the model's the padded vocabulary = 512"),
        (8, "pipeline=8", "2 layers leave stage"),
        (2, "pipeline=2 virtual_stages=4", "pipeline 2 x virtual_stages 4 = 8 stages: 2 layers leave stage"),
        (
            2,
            "pipeline=2 stage_layers=[2,1]",
            "2 stages with 3 layers; pipeline 2 x virtual_stages 1 are 2 stages, and the model has 2",
        ),
        (2, "pipeline=2 schedule=zb-v", 'virtual_stages = 1: schedule "zb-v" has 2 a rank. Set that'),
        (2, "pipeline=2 virtual_stages=2 schedule=zb-h1", 'schedule "zb-h1" has 1 a rank'),
        (2, "pipeline=2 max_in_flight=1", "keeps 2 stage activations on a rank, max_in_flight is 1"),
        (2, "pipeline=2 virtual_stages=2 contiguous_micro_batches=1", "at least parallel.pipeline = 2"),
        (2, "contiguous_micro_batches=2", 'belongs to schedule = "interleaved"; schedule is "1f1b"'),
        (3, "context=3", "parallel.micro_batch_tokens = 64: must be a multiple of 2 chunks a context rank"),
        (6, "tensor=4", "tensor 4 x context 1 x pipeline 1 x data_replicate 1 = 4 does not divide the world size 6"),
        (8, "data_shard=2 pipeline=2", "data_shard 2 = 4, but the world size is 8"),
        (
            4,
            "data_replicate=3",
            "= 3 does not divide the world size 4. Start a multiple of 3 processes or lower a degree.",
        ),
        (1, "micro_batch_tokens=96", "must be a multiple of stages.s.seq_len = 64. Nearest: 64, 128."),
    ],
)
def test_illegal_layouts(recipe_file, world_size, flags, expected):
    flags = ["--parallel.micro_batch_tokens=64", *(f"--parallel.{flag}" for flag in flags.split())]
    problems = check(load_recipe(recipe_file(), flags), world_size).problems
    assert any(expected in str(problem) for problem in problems), problems


def test_all_problems_come_at_once(recipe_file):
    flags = ["--parallel.tensor=3", "--parallel.micro_batch_tokens=100", "--data.a.paths=['/nowhere']"]
    assert len(check(load_recipe(recipe_file(), flags), 4).problems) >= 5


def test_pipeline_lines_for_every_number_of_micro_batches_of_a_ramp(recipe_file):
    flags = [
        "--parallel.pipeline=2",
        "--parallel.micro_batch_tokens=64",
        '--stages.s.batch_tokens=[["0", 64], ["512", 320]]',
    ]
    lines = describe(check(load_recipe(recipe_file(), flags), 2).facts)
    assert any(line == "pipeline 1f1b, layers of the 2 stages: 1, 1" for line in lines)
    assert any(line.startswith("  1 micro-batches: bubble 100.0%, at most 1 stage") for line in lines)
    assert any(line.startswith("  5 micro-batches: bubble 20.0%, at most 2 stage") for line in lines)


def test_gradient_bytes_of_both_reductions(recipe_file):
    lines = describe(check(load_recipe(recipe_file(), ["--parallel.micro_batch_tokens=64"]), 4).facts)
    assert any('precision.reduce = "micro_batch": "step" keeps' in line for line in lines)


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_of_the_ranks_are_those_of_the_model(tied):
    from megacpt.config.sections.parallel import Parallel
    from megacpt.family.read import parse_config

    config = parse_config(tiny_config(num_hidden_layers=6, tie_word_embeddings=tied), "test")
    whole = config.num_parameters() + (512 - 401) * 32 * (1 if tied else 2)
    assert rank_parameters(config, plan_pipeline(6, Parallel()), Parallel(), 128) == [whole]
    split = Parallel(pipeline=3, virtual_stages=2)
    ranks = rank_parameters(config, plan_pipeline(6, split), split, 128)
    assert sum(ranks) == whole + (512 * 32 if tied else 0) and len(ranks) == 3


def test_the_picture_has_a_box_for_every_action(recipe_file, tmp_path):
    flags = [
        "--parallel.pipeline=2",
        "--parallel.virtual_stages=2",
        "--parallel.schedule=zb-v",
        "--parallel.micro_batch_tokens=64",
    ]
    assert (
        run(["check", recipe_file(), "--world-size", "2", "--schedule-picture", str(tmp_path / "s.svg"), *flags]) == 0
    )
    root = ElementTree.parse(tmp_path / "s.svg").getroot()
    titles = [element.text for element in root.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 3 * 4 * 4 and "backward for the weights, stage 3, micro-batch 2" in titles


def test_an_expected_shape_is_compared_with_the_checkpoint(recipe_file, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    problems = check(load_recipe(recipe_file(), ["--model.expect=llama3.1-8b"]), 1).problems
    assert any(
        'model.expect = "llama3.1-8b": hidden_size is 32, and that shape has 4096' in str(problem)
        for problem in problems
    )
    (tmp_path / "config.json").write_text(json.dumps(ARCHITECTURES["llama3.2-1b"]))
    recipe = load_recipe(recipe_file(), ["--model.expect=llama3.2-1b"])
    (tmp_path / "config.json").write_text(json.dumps(ARCHITECTURES["llama3.2-1b"]))
    assert load_model_config(recipe.model).num_hidden_layers == 16


def test_the_environment_that_orders_all_streams_is_refused(recipe_file):
    import os

    out = subprocess.run(
        [sys.executable, "-m", "megacpt", "train", recipe_file()],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_DEVICE_MAX_CONNECTIONS": "1"},
    )
    assert out.returncode == 2 and "CUDA_DEVICE_MAX_CONNECTIONS = 1" in out.stderr


def test_problems_and_facts_as_json(recipe_file, capsys):
    """What `check` prints as text is data first: the same run as JSON, and problems with their places and values."""
    assert run(["check", recipe_file(), "--json", "--world-size", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    facts = found["facts"]
    assert found["problems"] == [] and facts["world_size"] == 2 and facts["layouts"][0]["layout"]["data_shard"] == 2
    (stage,) = facts["stages"]
    assert (stage["tokens"], stage["steps"], stage["micro_batches"]) == (2048, 8, 1)
    assert facts["tokens"] == sum(domain["taken"] for domain in facts["domains"]) == 2048
    assert set(stage["memory"]) == {"rank", "parts"} and sum(stage["memory"]["parts"].values()) > 0

    assert run(["check", recipe_file(), "--json", "--stages.s.batch_tokens=200"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert found["facts"] is None
    wrong = {
        "where": "stages.s.batch_tokens",
        "value": 200,
        "text": "must be a multiple of seq_len = 64.",
        "remedy": "Nearest: 192, 256.",
    }
    assert wrong in found["problems"]


def test_problems_name_the_key_that_holds_the_layout_or_the_change(recipe_file):
    """What the model refuses is placed under the stage that asks for it, as data: no text is edited."""
    flags = [
        "--stages.s.parallel.tensor=3",
        '--stages.s.rope={type="llama3"}',
    ]
    wheres = [problem.where for problem in check(load_recipe(recipe_file(), flags), 3).problems]
    assert "stages.s.parallel.tensor" in wheres
    flags = ['--stages.s.freeze=["nothing.*"]']
    (problem,) = check(load_recipe(recipe_file(), flags), 1).problems
    assert problem.where == "stages.s.freeze" and "no parameter fits 'nothing.*'" in problem.text
