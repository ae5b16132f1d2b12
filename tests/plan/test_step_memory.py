"""The memory of a step by formula, against steps of the real program that were counted tensor by tensor, and against the cards of the
recipes."""

import fnmatch
from dataclasses import replace
from pathlib import Path

import pytest
from ranks import on_ranks
from samples import tiny_config
from tolerances import MEMORY_FORMULA

from megacpt.cli import run
from megacpt.config.layout import Layout, resolve_layout
from megacpt.config.load import load_recipe
from megacpt.config.merge import parallel_in, reduction_under
from megacpt.config.sections.parallel import Parallel
from megacpt.config.trainable import Trainable
from megacpt.family.read import parse_config
from megacpt.family.shapes import ARCHITECTURES
from megacpt.plan import memory
from megacpt.plan.check import check, fullest_step, over_memory
from megacpt.plan.memory import CARD_GIB, GIB, RESERVE_GIB, Job, kept_bytes, peak, peak_of_rank

RECIPES = Path(__file__).parents[2] / "launch/recipes"
LLAMA_13B = ARCHITECTURES["llama3-8b"] | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
    "vocab_size": 39424,
}
WORLDS = {  # the model and the fewest GPUs of 80 GB that each recipe is for
    "domain_adaptation": ("llama3.1-8b", 8),
    "llama31_405b_16384gpu": ("llama3.1-405b", 16384),
    "llama31_405b_16384gpu_128k": ("llama3.1-405b", 16384),
    "llama31_405b_8192gpu": ("llama3.1-405b", 8192),
    "llama31_70b_256gpu": ("llama3.1-70b", 256),
    "llama31_8b_32gpu_128k": ("llama3.1-8b", 32),
    "llama31_8b_8gpu_8k": ("llama3.1-8b", 8),
    "llama31_8b_zh_code_64gpu": ("llama3.1-8b", 64),
    "llama3_8b_8k_to_128k": ("llama3-8b", 64),
    "llama3_phases_405b_16384gpu": ("llama3.1-405b", 16384),
    "new_language": ("llama3.1-8b", 64),
    "synE_8b_64gpu": ("llama3-8b", 64),
    "ziya_vocabulary_32gpu": (LLAMA_13B, 32),
}


def job_of(recipe: str, mode: str, micro_batches: int) -> Job:
    model, world_size = WORLDS[recipe]
    loaded = load_recipe(str(RECIPES / f"{recipe}.toml"), [f"--parallel.activation_checkpointing={mode}"])
    stage = loaded.stages[0]
    parallel = parallel_in(loaded, stage)
    config = parse_config(ARCHITECTURES[model], model)
    layout = resolve_layout(parallel, world_size)
    return Job(config, parallel, layout, stage.seq_len, micro_batches, reduction_under(loaded, parallel))


# GiB of the real train_step at true shapes: tests/counted_step.py (torch 2.13).
COUNTED = [
    ("llama31_405b_16384gpu", "none", 16, 1, 71.88),
    ("llama31_405b_16384gpu", "none", 16, 15, 64.65),
    ("llama31_405b_16384gpu_128k", "none", 16, 0, 63.76),
    ("llama31_405b_8192gpu", "none", 32, 1, 89.50),
    ("llama31_70b_256gpu", "none", 12, 0, 47.75),
    ("llama31_70b_256gpu", "none", 12, 1, 44.17),
    ("llama31_8b_8gpu_8k", "none", 2, 0, 58.17),
    ("llama31_8b_8gpu_8k", "full", 2, 0, 26.30),
]


@pytest.mark.parametrize("recipe, mode, micro_batches, rank, counted", COUNTED)
def test_the_formula_is_what_was_counted(recipe, mode, micro_batches, rank, counted):
    found = peak_of_rank(job_of(recipe, mode, micro_batches), rank).gib
    assert abs(found / counted - 1) < MEMORY_FORMULA


def training(job: Job, patterns: list[str]) -> Job:
    """The job without what the patterns name, which was never trained."""
    names = frozenset(job.config.shapes())
    names = names.difference(*(fnmatch.filter(names, pattern) for pattern in patterns))
    return replace(job, trainable=Trainable(names, names))


EVERY_SECOND = [f"model.layers.{i}.{part}.*" for i in range(0, 32, 2) for part in ("self_attn", "mlp")]
LOWER_HALF = ["model.embed_tokens.weight", *(f"model.layers.{i}.*" for i in range(16))]
BUT_THE_ENDS = ["model.layers.*", "model.norm.weight"]
FROZEN = [  # as above, of stages that freeze
    ("none", EVERY_SECOND, 32, 46.98),
    ("none", LOWER_HALF, 32, 31.51),
    ("none", BUT_THE_ENDS, 32, 35.79),
    ("full", BUT_THE_ENDS, 32, 14.76),
    ("none", LOWER_HALF[:5], 8, 13.26),
    ("none", ["*.mlp.*"], 8, 18.35),
]


def frozen_job(mode: str, patterns: list[str], layers: int) -> Job:
    job = job_of("llama31_8b_8gpu_8k", mode, 2)
    return training(replace(job, config=replace(job.config, num_hidden_layers=layers)), patterns)


@pytest.mark.parametrize("mode, patterns, layers, counted", FROZEN)
def test_the_formula_is_what_was_counted_of_a_stage_that_freezes(mode, patterns, layers, counted):
    """And without knowing of it the formula is far off."""
    job = frozen_job(mode, patterns, layers)
    assert abs(peak(job).gib / counted - 1) < MEMORY_FORMULA
    assert peak(replace(job, trainable=None)).gib > 1.2 * counted


@pytest.mark.full
@pytest.mark.parametrize("mode, patterns, layers, counted", [case for case in FROZEN if case[2] == 8])
def test_what_was_counted_is_counted_again(mode, patterns, layers, counted):
    from counted_step import counted_peak

    (found,) = on_ranks(1, counted_peak, frozen_job(mode, patterns, layers), 0)
    assert round(found / GIB, 2) == counted


def test_what_is_frozen_has_bytes_of_its_own():
    """A model of 8B on 8 ranks, half of the layers frozen: 2 bytes a weight, and neither moments nor gradients."""
    job = frozen_job("none", LOWER_HALF, 32)
    whole, held = job.config.num_parameters(), sum(p.size for p in job.config.parameters if p.name in job.held)
    parts = peak(job).parts
    assert parts["weights"] == (4 * held + 2 * (whole - held)) / 8 and parts["moments"] == 8 * held / 8
    thawed = replace(job, trainable=Trainable(job.trained, frozenset(job.config.shapes())))
    parts = peak(thawed).parts
    assert parts["weights"] == 4 * whole / 8 and parts["moments"] == 8 * whole / 8
    assert peak(replace(job, exact=False)).parts["weights"] == 4 * whole / 8


def test_the_comparison_sees_a_layer_that_forgets_a_tensor(monkeypatch):
    """The twin: without the product of gate and up every row of many activations is off."""
    right = kept_bytes
    monkeypatch.setattr(
        memory,
        "kept_bytes",
        lambda job, mode=None, layer=None: right(job, mode, layer) - 2 * job.tokens * job.features[2],
    )
    for recipe, mode, micro_batches, rank, counted in COUNTED[:4]:
        assert abs(peak_of_rank(job_of(recipe, mode, micro_batches), rank).gib / counted - 1) > MEMORY_FORMULA


def test_a_layer_of_405b_keeps_what_was_read_off_its_functions():
    """508.5 MiB a layer and micro-batch at tensor 8, 737 MiB for 8B with selective checkpointing; to the byte, what a layer really
    keeps: tests/model/test_memory.py."""
    assert kept_bytes(job_of("llama31_405b_8192gpu", "none", 1)) / 2**20 == pytest.approx(508.5, abs=0.05)
    assert kept_bytes(job_of("llama31_8b_8gpu_8k", "selective", 1)) / 2**20 == pytest.approx(737, abs=0.05)
    assert kept_bytes(job_of("llama31_8b_8gpu_8k", "full", 1)) == 2 * 8192 * 4096


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("tensor, context", [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_the_formula_is_the_promise_that_a_layer_keeps(mode, tensor, context):
    """The one of tests/model/test_memory.py, which is counted on the layers."""
    import importlib.util

    path = Path(__file__).parents[1] / "model/test_memory.py"
    specification = importlib.util.spec_from_file_location("layers_memory", path)
    layers = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(layers)
    config = parse_config(tiny_config(), "test")
    parallel = Parallel(tensor=tensor, context=context, micro_batch_tokens=layers.TOKENS, activation_checkpointing=mode)
    job = Job(config, parallel, Layout(context=context, tensor=tensor), 64, 1, "step", width=4)
    assert kept_bytes(job) == layers.promised(mode, tensor, context)


@pytest.mark.parametrize("recipe", WORLDS)
def test_every_recipe_fits_its_cards(recipe):
    """80 GB, with the reserve to spare, at the widest step of each stage."""
    model, world_size = WORLDS[recipe]
    loaded = load_recipe(str(RECIPES / f"{recipe}.toml"))
    config = parse_config(ARCHITECTURES[model] if isinstance(model, str) else model, recipe)
    for stage in loaded.stages:
        _, need = fullest_step(loaded, stage, world_size, config)
        assert need.gib + RESERVE_GIB <= CARD_GIB, (stage.name, need.gib, str(need))


def test_every_recipe_is_measured():
    assert {path.stem for path in RECIPES.glob("*.toml")} == {*WORLDS, "quickstart", "quickstart_base"}


def test_check_says_what_would_bring_a_stage_under_its_card():
    recipe = load_recipe(
        str(RECIPES / "llama31_405b_8192gpu.toml"), ["--parallel.activation_checkpointing=none"]
    )  # as it was shipped once
    (problem,) = check(recipe, 8192, files=False, card_gib=CARD_GIB).problems
    assert str(problem).startswith("stages.train: pipeline rank 1 needs 90.1 GiB (activations 70.0, gradients 11.9")
    assert 'It fits with activation_checkpointing = "selective" (67.2 GiB)' in str(problem)
    assert not check(recipe, 8192, files=False, card_gib=139.8).problems  # an H200
    assert not check(recipe, 8192, files=False).problems


def test_what_is_advised_fits():
    """Every remedy, applied to the recipe, passes; a job that nothing helps says so."""
    job = job_of("domain_adaptation", "none", 2)
    wide = replace(job, parallel=job.parallel.model_copy(update={"micro_batch_tokens": 16384}))
    assert peak(wide).gib > CARD_GIB
    text = str(over_memory("adapt", wide, peak(wide), CARD_GIB))
    assert "It fits with micro_batch_tokens = 8192 (58.0 GiB)" in text
    fitting = replace(wide, parallel=wide.parallel.model_copy(update={"micro_batch_tokens": 8192}), micro_batches=4)
    assert round(peak(fitting).gib, 1) == 58.0
    tiny_card = str(over_memory("adapt", wide, peak(wide), 12.0))
    assert "It fits" not in tiny_card and "more ranks" in tiny_card


def test_a_split_backward_holds_what_its_weights_wait_for():
    """zb-h1 keeps gradients of features beside the inputs: more than 1F1B on the last rank, freed by the last action."""
    base = job_of("llama31_70b_256gpu", "none", 8)
    one = replace(
        base, parallel=base.parallel.model_copy(update={"virtual_stages": 1, "contiguous_micro_batches": None})
    )
    split = replace(one, parallel=one.parallel.model_copy(update={"schedule": "zb-h1"}))
    assert peak_of_rank(split, 3).gib > peak_of_rank(one, 3).gib
    walk = memory._Walk(split, 3)
    for action in split.plan.schedule(8).ranks[3]:
        walk.begin(action.kind, action.stage)
        walk.end(action.kind, action.stage)
    assert walk.activations == 0


def test_the_line_of_the_command(recipe_file, capsys):
    path = recipe_file()
    assert run(["check", path]) == 0
    assert "memory of a card from stage s on: at most 0.0 GiB on pipeline rank 0" in capsys.readouterr().out
