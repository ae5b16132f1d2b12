"""The rotary embedding in config.json: what is written reads back as what was meant, by us and by transformers."""

import copy
import dataclasses
from dataclasses import replace

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from samples import ROPE_LLAMA3, ROPE_YARN, family_config, tiny_config, without_names

from megacpt.errors import ConfigError
from megacpt.family.families import FAMILIES
from megacpt.family.read import exported_config, parse_config
from megacpt.family.rope import Linear, Llama3, RopeConfig, Yarn, change_rope

NUMBER = st.floats(1.0, 1e5)
SCALINGS = st.one_of(
    st.none(),
    st.builds(Linear, NUMBER),
    st.builds(Llama3, NUMBER, st.floats(0.1, 1.0), st.floats(2.0, 8.0), st.integers(1, 1 << 20)),
    st.builds(
        Yarn,
        NUMBER,
        st.integers(1, 1 << 20),
        st.none() | NUMBER,
        NUMBER,
        NUMBER,
        st.none() | NUMBER,
        st.none() | NUMBER,
        st.booleans(),
    ),
)
SPELLINGS = {
    "none": {},
    "4": {"rope_theta": 10000.0, "rope_scaling": None},
    "5": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "both": {"rope_theta": 10000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "yarn that leaves its original length out": {"rope_scaling": {"type": "yarn", "factor": 2.0}},
}


def spelled(name: str, **changes) -> dict:
    bare = {key: value for key, value in tiny_config().items() if not key.startswith("rope_")}
    return bare | copy.deepcopy(SPELLINGS[name]) | changes


@given(st.sampled_from(sorted(SPELLINGS)), NUMBER, SCALINGS, st.integers(1, 1 << 20))
def test_a_written_config_reads_back_as_the_model_it_is_of(name, theta, scaling, longest):
    config = replace(parse_config(spelled(name), "t"), rope=RopeConfig(theta, scaling))
    again = parse_config(exported_config(config, "float32", longest), "export")
    assert again.rope == config.rope and again.max_position_embeddings == max(64, longest)
    same = {field.name for field in dataclasses.fields(config)} - {"raw", "max_position_embeddings"}
    assert all(getattr(again, key) == getattr(config, key) for key in same)


def test_an_original_length_that_the_file_left_out_stays_what_it_was():
    """Readers take max_position_embeddings for it, which the export of a longer run raises."""
    raw = spelled("yarn that leaves its original length out")
    out = exported_config(parse_config(raw, "t"), "float32", 256)
    assert out["rope_scaling"]["original_max_position_embeddings"] == 64 and out["max_position_embeddings"] == 256
    theirs = transformers.LlamaConfig(**without_names(out)).rope_parameters
    assert theirs["original_max_position_embeddings"] == 64


def test_each_type_has_fields_of_its_own():
    def read(scaling):
        return parse_config(tiny_config(rope_scaling=scaling), "t").rope.scaling

    assert read(None) is None and read({"type": "linear", "factor": 2}) == Linear(2)
    assert read(ROPE_LLAMA3) == Llama3(8.0, 1.0, 4.0, 32)
    assert read(ROPE_YARN | {"beta_fast": 32, "truncate": True}) == Yarn(4.0, 64) == read(ROPE_YARN)
    assert read(ROPE_YARN | {"truncate": False}) != read(ROPE_YARN)
    with pytest.raises(ConfigError, match="truncate = 1: must be true or false"):
        read(ROPE_YARN | {"truncate": 1})


def test_a_change_keeps_what_it_does_not_name():
    config = parse_config(tiny_config(rope_theta=5e5, rope_scaling=ROPE_LLAMA3), "t")
    assert change_rope(config, factor=16.0).rope == RopeConfig(5e5, Llama3(16.0, 1.0, 4.0, 32))
    assert change_rope(config, type="default").rope == RopeConfig(5e5)
    assert change_rope(config, theta=7.0, type="yarn", factor=2.0).rope == RopeConfig(7.0, Yarn(2.0, 64))
    assert change_rope(config) == config
    with pytest.raises(ConfigError) as caught:
        change_rope(config, type="linear", low_freq_factor=1.0)
    assert "rope.factor: is required for rope_type 'linear'" in str(caught.value)
    assert "rope.low_freq_factor = 1.0: unknown for rope_type 'linear'. Possible: factor" in str(caught.value)
    plain = parse_config(tiny_config(), "t")
    with pytest.raises(
        ConfigError, match='rope.rule = "ntk": decides theta alone; theta, factor cannot stand beside it'
    ):
        change_rope(plain, rule="ntk", theta=1e6, factor=2.0, seq_len=128)


def test_all_problems_of_a_file_come_at_once():
    """Of its numbers, of its family and of the rotary embedding."""
    raw = tiny_config(rms_norm_eps=-1, mlp_bias=True, vocab_size=None, partial_rotary_factor=0.5)
    with pytest.raises(ConfigError) as caught:
        parse_config(raw | {"rope_scaling": {"type": "linear"}, "rope_theta": "x"}, "t")
    for text in (
        "rms_norm_eps = -1",
        "mlp_bias",
        "vocab_size: is required",
        "partial_rotary_factor",
        'rope_theta = "x"',
    ):
        assert text in str(caught.value)
    assert len(caught.value.problems) == 6


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_reads_what_it_wrote(name):
    """`read` gives the config or the problems, and `write` its file."""
    config, problems = FAMILIES[name].read(family_config(name))
    assert not problems and config.family.write(config) == config.raw
    nothing, problems = FAMILIES[name].read(family_config(name, num_key_value_heads=3, head_dim=7))
    assert nothing is None and len(problems) == 2
