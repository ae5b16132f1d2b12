import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from samples import ROPE_LLAMA3, ROPE_YARN, tiny_config, without_names

import megacpt.model.hf as hf
from megacpt.config.stage import Rope
from megacpt.errors import CheckpointError, ConfigError
from megacpt.model.build import build_model
from megacpt.model.config import ARCHITECTURES, change_rope, export_config, parse_config, read_config
from megacpt.model.hf import Weights, check_names, load_pretrained
from megacpt.model.llama import ModelOptions


def problems(raw) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw, "config.json")
    return str(caught.value)


V5 = {k: v for k, v in tiny_config().items() if k not in ("rope_theta", "rope_scaling")} | {
    "rope_parameters": {"rope_theta": 500000.0, **ROPE_LLAMA3}
}


def test_both_spellings_of_the_rotary_embedding():
    v4 = tiny_config(rope_theta=500000.0, rope_scaling=ROPE_LLAMA3)
    assert parse_config(v4, "x").rope == parse_config(V5, "x").rope
    legacy = tiny_config(
        rope_theta=500000.0, rope_scaling={("type" if k == "rope_type" else k): v for k, v in ROPE_LLAMA3.items()}
    )
    assert parse_config(legacy, "x").rope == parse_config(V5, "x").rope


@pytest.mark.parametrize(
    "raw", [V5, tiny_config(rope_scaling=ROPE_YARN), tiny_config(), tiny_config(bos_token_id=[1, 2], extra={"a": 1})]
)
def test_an_unchanged_config_is_carried_through_whole(raw):
    assert export_config(parse_config(raw, "x"), "float32", 8) == raw


@pytest.mark.parametrize("raw", [V5, tiny_config()])
def test_a_changed_rope_is_written_in_the_spelling_it_came_in_and_read_by_transformers(raw):
    config = change_rope(
        parse_config(raw, "x"), Rope(theta=123.0, type="yarn", factor=2.0, original_max_position_embeddings=64)
    )
    out = export_config(config, "bfloat16", 128)
    assert ("rope_parameters" in out) == ("rope_parameters" in raw) and out["max_position_embeddings"] == 128
    assert parse_config(out, "y").rope == config.rope
    theirs = transformers.LlamaConfig(**out).rope_parameters
    assert (theirs["rope_theta"], theirs["rope_type"], theirs["factor"]) == (123.0, "yarn", 2.0)


def test_dynamic_scaling_and_unknown_fields_are_refused_with_the_reason():
    text = problems(tiny_config(rope_scaling={"rope_type": "dynamic", "factor": 2.0}))
    assert "depend on the length of the input" in text
    text = problems(tiny_config(rope_scaling=ROPE_LLAMA3 | {"low_freq_facto": 1.0, "factor": "8"}))
    assert "Did you mean 'low_freq_factor'?" in text and "factor = '8': must be a number" in text
    assert "low_freq_factor: is required" in problems(tiny_config(rope_scaling={"rope_type": "llama3", "factor": 2.0}))


@pytest.mark.parametrize(
    "changes, text",
    [
        (
            {"model_type": "mixtral"},
            "model_type = 'mixtral': is not trained here. It has a mixture of experts. Trained are llama, qwen2, ",
        ),
        ({"attention_bias": True}, "only False is trained"),
        ({"hidden_act": "gelu"}, "only 'silu'"),
        ({"num_key_value_heads": 3}, "does not divide num_attention_heads = 4"),
        ({"hidden_size": 30}, "is no multiple of num_attention_heads"),
        ({"vocab_size": "9"}, "must be a positive integer"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_what_would_change_the_computation_is_refused(changes, text):
    assert text in problems(tiny_config(**changes))


def test_parameter_counts_of_the_named_shapes():
    counts = {name: parse_config(raw, name).num_parameters() for name, raw in ARCHITECTURES.items()}
    assert counts == {
        "llama3.2-1b": 1_235_814_400,
        "llama3.2-3b": 3_212_749_824,
        "llama3-8b": 8_030_261_248,
        "llama3.1-8b": 8_030_261_248,
        "llama3.1-70b": 70_553_706_496,
        "llama3.1-405b": 405_853_388_800,
        "qwen2.5-7b": 7_615_616_512,
        "qwen3-0.6b": 596_049_920,
        "qwen3-8b": 8_190_735_360,
        "mistral-7b-v0.3": 7_248_023_552,
    }


@pytest.fixture
def directory(tmp_path):
    """A Hugging Face directory that transformers wrote, in several shards."""
    torch.manual_seed(0)
    raw = without_names(tiny_config())
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**raw))
    model.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    return tmp_path / "hf"


def test_import_fills_every_parameter_and_zeroes_the_padding(directory, mesh):
    config = read_config(directory)
    model = build_model(config, mesh, torch.float32, ModelOptions())
    load_pretrained(model, config, directory)
    theirs = transformers.LlamaForCausalLM.from_pretrained(directory).state_dict()
    for name, parameter in model.named_parameters():
        true = config.shapes()[name][0]
        assert torch.equal(parameter._local_tensor[:true], theirs[name])
        assert not parameter._local_tensor[true:].any()
    assert model.model.embed_tokens.weight.shape[0] == 512


def test_names_and_shapes_come_at_once(directory):
    tensors = {k: v for f in directory.glob("*.safetensors") for k, v in load_file(f).items()}
    for file in directory.glob("model*"):
        file.unlink()
    tensors["extra.bias"] = torch.zeros(2)
    tensors["model.norm.weight"] = torch.zeros(3)
    del tensors["lm_head.weight"]
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        check_names(Weights(directory), read_config(directory))
    text = str(caught.value)
    assert (
        "lm_head.weight [401, 32] is missing" in text
        and "model.norm.weight is [3]" in text
        and "extra.bias [2] is no part" in text
    )


def test_pickles_are_refused_with_the_way_out(directory):
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="holds no model.safetensors"):
        Weights(directory)
    torch.save({}, directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="a pickle, which can run code.*safe_serialization=True"):
        Weights(directory)


def test_an_index_that_leaves_its_folder_or_names_what_is_missing_is_refused(directory):
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = next(iter(index["weight_map"]))
    for wrong, text in (("../x.safetensors", "not a file of its own folder"), ("none.safetensors", "is missing")):
        path.write_text(json.dumps({"weight_map": index["weight_map"] | {first: wrong}}))
        with pytest.raises(CheckpointError, match=text):
            Weights(directory)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="not an index"):
        Weights(directory)


def test_a_truncated_file_is_named(directory):
    file = sorted(directory.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        check_names(Weights(directory), read_config(directory))


def test_an_interrupted_export_leaves_no_output(directory, tmp_path, monkeypatch):
    config = read_config(directory)

    def fail(*args, **kwargs):
        raise OSError("disk")

    monkeypatch.setattr(hf, "save_file", fail)
    with pytest.raises(OSError):
        hf.write_pretrained(
            tmp_path / "out",
            config,
            directory,
            lambda name: torch.zeros(config.shapes()[name]),
            dict.fromkeys(config.shapes(), "float32"),
            64,
        )
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    shutil.rmtree(directory)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match="exists"):
        hf.write_pretrained(tmp_path / "out", config, tmp_path, None, {}, 64)


def test_import_needs_one_file_beside_the_models_own_share(tmp_path):
    """Eight files of 32 MB as bfloat16, 512 MB of fp32 masters: the peak stays within masters + one file + slack."""
    raw = tiny_config(
        vocab_size=512,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=3,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    config = parse_config(raw, "x")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text(json.dumps(raw))
    hf.write_pretrained(
        tmp_path / "out",
        config,
        tmp_path / "hf",
        lambda name: torch.ones(config.shapes()[name]),
        dict.fromkeys(config.shapes(), "bfloat16"),
        64,
        max_shard_bytes=32 << 20,
    )
    files = [f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors")]
    code = """
import resource, sys, torch
from megacpt.config.layout import Layout
from megacpt.model.build import build_model
from megacpt.model.config import read_config
from megacpt.model.hf import load_pretrained
from megacpt.model.llama import ModelOptions
from megacpt.parallel.mesh import build_mesh, start_process_group
start_process_group(torch.device("cpu"))
config = read_config(sys.argv[1])
model = build_model(config, build_mesh(Layout(), torch.device("cpu")), torch.float32, ModelOptions())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
load_pretrained(model, config, sys.argv[1])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    grown, masters = int(out.stdout), 4 * config.num_parameters()
    assert len(files) > 5 and sum(files) > 3 * max(files)
    assert grown < masters + max(files) + (24 << 20), (grown, masters, max(files))


def test_theta_by_rule_does_not_depend_on_the_number_of_steps():
    """ProLong's 8e6 at 64K from 5e5 at 8K (NTK rule twice, arXiv 2410.02660): in one jump and in three stages."""
    from megacpt.config.stage import Stage
    from megacpt.errors import ConfigError
    from megacpt.model.config import config_of_stage, least_theta

    own = parse_config(
        {"model_type": "llama", "vocab_size": 128, "hidden_size": 256, "intermediate_size": 8, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 8192, "rope_theta": 5e5,
         "architectures": ["LlamaForCausalLM"]}, "t",
    )  # fmt: skip
    make = lambda n, rope: Stage(name=f"s{n}", tokens=1, seq_len=n, batch_tokens=n, mixture={"a": 1.0}, rope=rope)
    jump = config_of_stage(own, [make(65536, Rope(rule="ntk2"))], 0)
    steps = [make(n, Rope(rule="ntk2")) for n in (8192, 16384, 32768, 65536)]
    assert jump.rope.theta == pytest.approx(8.27e6, rel=0.01) and config_of_stage(own, steps, 3) == jump
    assert config_of_stage(own, steps, 0) == own
    assert least_theta(131072) == pytest.approx(9.1e6, rel=0.05)
    with pytest.raises(ConfigError, match="scaled already"):
        scaled = parse_config(ARCHITECTURES["llama3.1-8b"], "t")
        config_of_stage(scaled, [make(262144, Rope(rule="ntk"))], 0)
