"""The table of each family against transformers, and what is refused by name."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from samples import family_config, tiny_config, without_names

from megacpt.config.load import load_recipe
from megacpt.config.model import config_in_stage, shape_problems
from megacpt.config.sections.parallel import Parallel
from megacpt.config.sections.stage import Stage
from megacpt.errors import ConfigError
from megacpt.family.families import FAMILIES
from megacpt.family.read import exported_config, parse_config
from megacpt.family.shapes import ARCHITECTURES
from megacpt.model.flops import matmul_flops_per_token
from megacpt.plan.check import check

TIED = [(name, tied) for name in FAMILIES for tied in (False, True)]


def skeleton(raw: dict):
    """transformers' model without memory."""
    config = transformers.AutoConfig.for_model(raw["model_type"], **without_names(raw))
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name, tied", TIED)
def test_the_table_names_what_transformers_has(name, tied):
    raw = family_config(name, tie_word_embeddings=tied)
    theirs = {key: tuple(p.shape) for key, p in skeleton(raw).named_parameters()}
    config = parse_config(raw, "t")
    assert {stored.name: stored.shape for stored in config.stored} == theirs


@pytest.mark.parametrize("name, tied", TIED)
def test_the_flops_are_those_of_its_linear_layers(name, tied):
    """6 for each weight of each product, the head included where it is the embedding."""
    raw = family_config(name, tie_word_embeddings=tied)
    linear = [m for m in skeleton(raw).modules() if isinstance(m, torch.nn.Linear)]
    assert matmul_flops_per_token(parse_config(raw, "t")) == 6 * sum(m.weight.numel() for m in linear)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_key_that_is_absent_means_what_the_class_means(name):
    """Every default that we read, from transformers' own config class."""
    sizes = {"vocab_size": 401, "hidden_size": 4096, "intermediate_size": 56, "num_hidden_layers": 2}
    raw = {"model_type": name, "num_attention_heads": 32, **sizes}
    ours, theirs = parse_config(raw, "t"), transformers.AutoConfig.for_model(name, **without_names(raw))
    for key in (
        "num_key_value_heads",
        "rms_norm_eps",
        "max_position_embeddings",
        "tie_word_embeddings",
        "initializer_range",
    ):
        assert getattr(ours, key) == getattr(theirs, key), key
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 128)
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.window == (theirs.sliding_window if name in ("mistral", "phi3") else None)
    assert {**ours.family.defaults, **raw} == ours.family.complete(raw)
    assert all(getattr(theirs, key) == value for key, value in ours.family.defaults.items())


def test_what_each_parameter_is():
    table = {p.name.removeprefix("model.layers.1."): p for p in parse_config(family_config("qwen3"), "t").parameters}
    qwen2 = {p.name.removeprefix("model.layers.1."): p for p in parse_config(family_config("qwen2"), "t").parameters}

    def describe(p):
        return (p.split, p.role, p.init, p.decay, p.layer, p.unit, p.units)

    assert describe(table["self_attn.q_proj.weight"]) == ("column", "matmul", "normal", True, 1, 16, 4)
    assert describe(table["self_attn.k_norm.weight"]) == ("replicated", "norm", "ones", False, 1, 1, 16)
    assert describe(table["self_attn.o_proj.weight"]) == ("row", "matmul", "residual", True, 1, 16, 4)
    assert describe(table["mlp.down_proj.weight"]) == ("row", "matmul", "residual", True, 1, 1, 56)
    assert describe(qwen2["self_attn.v_proj.bias"]) == ("column", "bias", "zeros", False, 1, 8, 2)
    assert describe(table["model.embed_tokens.weight"]) == ("vocab", "lookup", "normal", True, None, 1, 401)
    assert [qwen2["self_attn.k_proj.bias"].is_whole(n) for n in (1, 2, 4)] == [False, False, True]
    assert not qwen2["self_attn.q_proj.bias"].is_whole(8) and table["self_attn.q_norm.weight"].is_whole(1)
    assert table["lm_head.weight"].padded(128) == (512, 32) and table["mlp.up_proj.weight"].padded(128) == (56, 32)


def problems(raw: dict) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw, "config.json")
    return str(caught.value)


@pytest.mark.parametrize(
    "name, changes, text",
    [
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window = true: only false is trained in qwen2 models"),
        ("qwen3", {"use_sliding_window": True}, "use_sliding_window = true: only false is trained in qwen3 models"),
        ("qwen2", {"attention_bias": False}, "attention_bias = false: only true is trained in qwen2 models"),
        ("qwen3", {"attention_bias": True}, "attention_bias = true: only false"),
        (
            "qwen3",
            {"layer_types": ["full_attention", "sliding_attention"]},
            "['sliding_attention']: only layers of full",
        ),
        ("llama", {"layer_types": ["chunked_attention"] * 2}, "['chunked_attention']: only layers of full"),
        ("llama", {"layer_types": "sliding_attention"}, 'layer_types = "sliding_attention"'),
        ("llama", {"sliding_window": 4096}, "sliding_window = 4096: only null is trained in llama models"),
        ("mistral", {"sliding_window": "4096"}, 'sliding_window = "4096": must be a positive integer, or null'),
        ("mistral", {"sliding_window": 0}, "sliding_window = 0: must be a positive integer, or null"),
        ("mistral", {"num_local_experts": 8}, "num_local_experts = 8"),
        ("phi3", {"sliding_window": -1}, "sliding_window = -1: must be a positive integer, or null"),
        ("phi3", {"resid_pdrop": 0.1}, "resid_pdrop = 0.1: only 0 is trained in phi3 models"),
        ("phi3", {"partial_rotary_factor": 0.75}, "partial_rotary_factor = 0.75: only 1.0 is trained in phi3 models"),
        (
            "phi3",
            {"rope_scaling": {"type": "su", "long_factor": [1.0]}},
            '"su": is not trained. Its frequencies depend on',
        ),
        (
            "phi3",
            {"rope_scaling": {"type": "longrope"}},
            '"longrope": is not trained. Its frequencies depend on the length',
        ),
        ("phi3", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, '"yarn": is not trained. Possible: default.'),
        ("phimoe", {}, '"phimoe" is not trained here. It has a mixture of experts'),
        ("gemma", {}, '"gemma" is not trained here. It has norms and activations of its own'),
        ("qwen3_moe", {}, '"qwen3_moe" is not trained here. It has a mixture of experts. Trained are llama, qwen2, '),
        ("qwen2_moe", {}, '"qwen2_moe" is not trained here. It has a mixture of experts'),
        ("mixtral", {}, '"mixtral" is not trained here. It has a mixture of experts'),
        ("gemma3_text", {}, "It has layers with windows of their own"),
        ("qwen", {}, '"qwen" is not trained here. Did you mean \'qwen'),
        (None, {}, "model_type: null is not trained here"),
        ({"a": 1}, {}, "model_type: {'a': 1} is not trained here"),
    ],
)
def test_what_is_not_trained_is_refused_by_name(name, changes, text):
    assert text in problems(tiny_config() | {"model_type": name} | changes)


def test_full_layers_and_windows_that_are_off_are_read():
    full = {"layer_types": ["full_attention"] * 2, "use_sliding_window": False, "sliding_window": None}
    for name in FAMILIES:
        assert parse_config(family_config(name) | full, "t").window is None


def stage(seq_len: int) -> Stage:
    return Stage(name="s", tokens=1, seq_len=seq_len, batch_tokens=seq_len, mixture={"a": 1.0})


def test_rows_longer_than_mistrals_window_are_refused():
    """An absent window is 4,096, null is none; a window longer than the row changes nothing."""
    absent = {k: v for k, v in family_config("mistral").items() if k != "sliding_window"}
    config = parse_config(absent, "t")
    assert config.window == 4096 and config_in_stage(config, [stage(4096)], 0) == config
    with pytest.raises(
        ConfigError, match="seq_len = 4097: .* is 4096, the default of mistral models where config.json names"
    ):
        config_in_stage(config, [stage(4097)], 0)
    named = parse_config(absent | {"sliding_window": 100}, "t")
    with pytest.raises(ConfigError, match="sliding_window is 100, and a window .* Use at most 100, or write"):
        config_in_stage(named, [stage(64), stage(128)], 1)
    none = parse_config(absent | {"sliding_window": None}, "t")
    assert none.window is None and config_in_stage(none, [stage(1 << 20)], 0) == none
    assert parse_config(family_config("qwen2", sliding_window=8), "t").window is None


def test_check_says_which_stage_is_longer_than_the_window(recipe_file, tmp_path):
    path = recipe_file()
    (tmp_path / "config.json").write_text(json.dumps(family_config("mistral", sliding_window=48)))
    found = check(load_recipe(path, []), 1).problems
    assert any(str(p).startswith("stages.s.seq_len = 64: the model's sliding_window is 48") for p in found), found


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_is_carried_through_whole(name):
    raw = family_config(name, more={"a": 1})
    assert exported_config(parse_config(raw, "t"), "float32", 8) == raw
    bare = {k: v for k, v in raw.items() if k != "architectures"}
    out = exported_config(parse_config(bare, "t"), "float32", 8)
    assert out["architectures"] == raw["architectures"] and out["model_type"] == name
    assert type(skeleton(out)).__name__ == raw["architectures"][0]


def test_the_layout_rules_name_the_config_key_and_what_fits_all():
    config = parse_config(family_config("qwen2"), "t")
    assert shape_problems(config, Parallel(tensor=4), 128) == []  # 2 key heads, repeated
    (features,) = shape_problems(replace(config, intermediate_size=54), Parallel(tensor=4), 128)
    assert str(features) == "parallel.tensor = 4: does not divide the model's intermediate_size = 54. Use 1, 2."
    found = shape_problems(config, Parallel(tensor=3), 128)
    assert len(found) == 4 and any(
        "num_key_value_heads = 2 can neither be divided by it nor repeated to it. Use 1, 2, 4." in p
        for p in map(str, found)
    )
    assert any("the padded vocabulary = 512" in str(p) for p in found)


def test_the_pages_list_all_families_and_named_shapes():
    def read(name):
        return (Path(__file__).parents[2] / "docs" / name).read_text()

    assert all(name in read("recipe.md") for name in ARCHITECTURES)
    assert all(f"\n| `{name}` |" in read("families.md") for name in FAMILIES)
