import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from references import as_ours
from safetensors.torch import load_file, save_file
from samples import ROPE_LLAMA3, ROPE_YARN, family_config, tiny_config, without_names

import megacpt.model.hf as hf
from megacpt.config.model import with_rope
from megacpt.config.sections.model import Rope
from megacpt.errors import CheckpointError, ConfigError, NumbersError
from megacpt.family.base import Stored
from megacpt.family.read import exported_config, parse_config, read_config
from megacpt.family.shapes import ARCHITECTURES
from megacpt.model.build import build_model
from megacpt.model.decoder import ModelOptions
from megacpt.model.hf import PretrainedReader, SafetensorsReader, load_pretrained


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
    assert exported_config(parse_config(raw, "x"), "float32", 8) == raw


@pytest.mark.parametrize("raw", [V5, tiny_config()])
def test_a_changed_rope_is_written_in_the_spelling_it_came_in_and_read_by_transformers(raw):
    config = with_rope(
        parse_config(raw, "x"), Rope(theta=123.0, type="yarn", factor=2.0, original_max_position_embeddings=64)
    )
    out = exported_config(config, "bfloat16", 128)
    assert ("rope_parameters" in out) == ("rope_parameters" in raw) and out["max_position_embeddings"] == 128
    assert parse_config(out, "y").rope == config.rope
    theirs = transformers.LlamaConfig(**out).rope_parameters
    assert (theirs["rope_theta"], theirs["rope_type"], theirs["factor"]) == (123.0, "yarn", 2.0)


BOTH = tiny_config(
    rope_theta=10000.0,
    rope_scaling={"rope_type": "linear", "factor": 2.0},
    rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    dtype="float32",
)


@pytest.mark.parametrize("change", [Rope(theta=5e5, factor=8.0), Rope(type="default", theta=7.0)])
def test_no_spelling_of_an_export_stays_behind(change):
    """Where config.json holds both, transformers believes the older one: all are written anew."""
    raw = {key: value for key, value in BOTH.items()}
    config = with_rope(parse_config(raw, "x"), change)
    out = exported_config(config, "bfloat16", 128)
    assert parse_config(out, "y").rope == config.rope and out["dtype"] == out["torch_dtype"] == "bfloat16"
    theirs = transformers.LlamaConfig(**without_names(out)).rope_parameters
    assert theirs["rope_theta"] == config.rope.theta and theirs["rope_type"] == config.rope.type
    assert theirs.get("factor") == config.rope.fields.get("factor")


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"rope_theta": 5e5}, "say different things"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "say different things"),
        ({"rope_scaling": None, "rope_theta": 3.0}, "rope_theta = 3.0: differs from rope_parameters.rope_theta = 10000.0"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "rope_type": "default"}}, "and type = 'linear' differ"),
        ({"rope_parameters": "default"}, "rope_parameters = \"default\": must be an object"),
        ({"rope_parameters": None, "rope_scaling": [1]}, "rope_scaling = [1]: must be an object"),
    ],
)  # fmt: skip
def test_spellings_that_contradict_each_other_are_refused(changes, text):
    assert text in problems(BOTH | changes)
    assert parse_config(BOTH, "x").rope.fields == {"factor": 2.0}


def test_dynamic_scaling_and_unknown_fields_are_refused_with_the_reason():
    text = problems(tiny_config(rope_scaling={"rope_type": "dynamic", "factor": 2.0}))
    assert "depend on the length of the input" in text
    text = problems(tiny_config(rope_scaling=ROPE_LLAMA3 | {"low_freq_facto": 1.0, "factor": "8"}))
    assert "Did you mean 'low_freq_factor'?" in text and 'factor = "8": must be a number' in text
    assert "low_freq_factor: is required" in problems(tiny_config(rope_scaling={"rope_type": "llama3", "factor": 2.0}))


@pytest.mark.parametrize(
    "changes, text",
    [
        (
            {"model_type": "mixtral"},
            'model_type: "mixtral" is not trained here. It has a mixture of experts. Trained are llama, qwen2, ',
        ),
        ({"attention_bias": True}, "only false is trained"),
        ({"hidden_act": "gelu"}, 'only "silu"'),
        ({"num_key_value_heads": 3}, "does not divide num_attention_heads = 4"),
        ({"hidden_size": 30}, "is no multiple of num_attention_heads"),
        ({"vocab_size": "9"}, "must be a positive integer"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_what_would_change_the_computation_is_refused(changes, text):
    assert text in problems(tiny_config(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        *({key: value} for key in ("rms_norm_eps", "initializer_range")
          for value in (None, "1e-5", [1], True, -1.0, float("nan"), float("inf"), 10**400)),
        *({key: value} for key in ("head_dim", "num_key_value_heads", "max_position_embeddings")
          for value in ("8", 8.0, 0, -8, True, [8])),
        *({"eos_token_id": value} for value in ([], "1", -1, [1, "2"], True, 1.0)),
        *({"tie_word_embeddings": value} for value in ("false", 0, [])),
        *({"torch_dtype": value} for value in (5, ["float32"])),
        *({"rope_parameters": value} for value in ("default", [1])),
        *({"rope_theta": value} for value in ("1e4", True, 0, float("nan"), float("inf"))),
        *({"rope_scaling": {"rope_type": "linear", "factor": value}} for value in (True, 0, -1.0, float("nan"), "2")),
        {"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}},
    ],
    ids=str,
)  # fmt: skip
def test_values_of_another_kind_are_refused_with_their_key(changes):
    (key,) = changes
    assert key in problems(tiny_config(**changes))


@pytest.mark.parametrize(
    "key", ["head_dim", "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings", "eos_token_id"]
)
def test_null_is_the_default_where_transformers_takes_it_for_that(key):
    parse_config(tiny_config(**{key: None}), "x")


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
        "phi-4": 14_659_507_200,
    }


@pytest.fixture
def directory(tmp_path):
    """A Hugging Face directory that transformers wrote, in several shards."""
    torch.manual_seed(0)
    raw = without_names(tiny_config())
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**raw))
    model.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    return tmp_path / "hf"


def in_one_file(directory) -> dict[str, torch.Tensor]:
    """Writes the shards as one file, and returns what is in it."""
    shards = sorted(directory.glob("*.safetensors"))
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    for path in [*shards, directory / "model.safetensors.index.json"]:
        path.unlink()
    save_file(tensors, directory / "model.safetensors")
    return tensors


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
        PretrainedReader(directory, read_config(directory))
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
        SafetensorsReader(directory)
    torch.save({}, directory / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="a pickle, which can run code.*safe_serialization=True"):
        SafetensorsReader(directory)


def test_an_index_that_leaves_its_folder_or_names_what_is_missing_is_refused(directory):
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = next(iter(index["weight_map"]))
    for wrong, text in (("../x.safetensors", "not a file of its own folder"), ("none.safetensors", "is missing")):
        path.write_text(json.dumps({"weight_map": index["weight_map"] | {first: wrong}}))
        with pytest.raises(CheckpointError, match=text):
            SafetensorsReader(directory)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="not an index"):
        SafetensorsReader(directory)


@pytest.mark.parametrize(
    "weight_map, text",
    [
        ({"lm_head.weight": "b.safetensors"}, "b.safetensors: does not hold 'lm_head.weight'"),
        ([], "weight_map is no object of file names"),
        ({"lm_head.weight": 5}, "weight_map is no object of file names"),
    ],
)
def test_an_index_that_says_what_is_not_so_is_an_error_of_ours(directory, weight_map, text):
    """A tensor that another shard holds, and a weight_map of other types."""
    tensors = in_one_file(directory)
    save_file({"x": torch.zeros(1)}, directory / "b.safetensors")
    (directory / "model.safetensors").rename(directory / "a.safetensors")
    if isinstance(weight_map, dict):
        weight_map = dict.fromkeys(tensors, "a.safetensors") | weight_map
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError) as error:
        PretrainedReader(directory, read_config(directory))
    assert text in str(error.value)


@pytest.mark.parametrize("differs", [False, True])
def test_a_head_beside_tied_embeddings(directory, mesh, differs):
    """The same values are the same model; others would be dropped without a word."""
    config = json.loads((directory / "config.json").read_text()) | {"tie_word_embeddings": True}
    (directory / "config.json").write_text(json.dumps(config))
    tensors = in_one_file(directory)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if differs:
        tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, directory / "model.safetensors")
    if not differs:
        PretrainedReader(directory, read_config(directory))
        return
    with pytest.raises(
        CheckpointError, match=r'lm_head.weight is not model.embed_tokens.weight.*"tie_word_embeddings": false'
    ):
        PretrainedReader(directory, read_config(directory))
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    PretrainedReader(directory, read_config(directory))  # the way out


def test_an_export_carries_the_tokenizer_that_was_trained_with(directory, tmp_path):
    """A base with a tokenizer.json, trained with a folder that has only a tokenizer.model, and the other way round; and one file of two."""
    import made_tokenizers as made

    from megacpt.data.tokenizer import Tokenizer
    from megacpt.model.hf import copy_side_files

    fast, pieces = made.llama3(tmp_path / "fast"), made.chatml_on_llama2(tmp_path / "pieces")
    for base, tokenizer in ((fast, pieces), (pieces, fast)):
        shutil.copy(directory / "config.json", base / "config.json")
        target = tmp_path / f"export-{tokenizer.name}"
        target.mkdir()
        (target / "added_tokens.json").write_text('{"stale": 7}')  # of an earlier start in the same folder
        copy_side_files(base, tokenizer, target)
        theirs, ours = transformers.AutoTokenizer.from_pretrained(target), Tokenizer(tokenizer)
        for text in made.PROBES:
            assert theirs(text, add_special_tokens=False).input_ids == ours.encode_batch([text])[0]
        assert theirs.eos_token_id == ours.eos_id and (target / "config.json").exists()
    shutil.copy(fast / "tokenizer.json", pieces / "tokenizer.json")
    copy_side_files(fast, pieces / "tokenizer.model", tmp_path / "one")
    assert {p.name for p in (tmp_path / "one").glob("tokenizer.*")} == {"tokenizer.model"}


def test_a_bare_sentencepiece_model_is_exported_as_it_was_read(directory, tmp_path):
    """A .model of any name and nothing beside it: transformers needs a tokenizer_config.json to read it as we did."""
    import made_tokenizers as made

    from megacpt.data.tokenizer import Tokenizer
    from megacpt.model.hf import copy_side_files

    made.pieces(tmp_path / "t")
    (tmp_path / "t/tokenizer.model").rename(tmp_path / "t/llama.model")
    ours = Tokenizer(tmp_path / "t/llama.model")
    copy_side_files(directory, tmp_path / "t/llama.model", tmp_path / "export")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    for text in made.PROBES:
        assert theirs(text, add_special_tokens=False).input_ids == ours.encode_batch([text])[0]
        assert theirs(text).input_ids == [ours.bos_id, *ours.encode_batch([text])[0]]
    assert theirs.eos_token_id == ours.eos_id


@pytest.mark.parametrize("generation", [{"eos_token_id": [7, 9], "bos_token_id": 5, "top_p": 0.9}, None])
def test_an_export_with_another_tokenizer_names_its_eos_and_bos(directory, tmp_path, generation):
    (directory / "generation_config.json").unlink(missing_ok=True)
    if generation:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    config = read_config(directory)
    read = PretrainedReader(directory, config).read
    dtypes = dict.fromkeys(config.shapes(), "float32")
    for name, tokens in (("own", None), ("other", {"eos_token_id": 9, "bos_token_id": 3})):
        hf.write_pretrained(tmp_path / name, config, directory, read, dtypes, 64, tokens=tokens)
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "other")
    assert theirs.bos_token_id == 3 and theirs.eos_token_id == (generation["eos_token_id"] if generation else 9)
    assert transformers.AutoConfig.from_pretrained(tmp_path / "other").eos_token_id == 9
    assert read_config(tmp_path / "own").eos_token_id == config.eos_token_id
    if generation:
        assert json.loads((tmp_path / "own/generation_config.json").read_text()) == generation


def test_a_truncated_file_is_named(directory):
    file = sorted(directory.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        PretrainedReader(directory, read_config(directory))


def test_what_a_killed_export_leaves_is_removed_by_the_next(directory, tmp_path, monkeypatch):
    config = read_config(directory)
    write = lambda name: hf.write_pretrained(
        tmp_path / name,
        config,
        directory,
        lambda tensor: torch.zeros(config.shapes()[tensor]),
        dict.fromkeys(config.shapes(), "float32"),
        64,
    )
    child = os.fork()
    if child == 0:
        hf.save_file = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        write("out")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [path.name.partition("--")[0] for path in tmp_path.glob(".tmp-*")] == [".tmp-out"]
    write("another")
    assert not list(tmp_path.glob(".tmp-*")) and (tmp_path / "another/model.safetensors").is_file()


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
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".tmp-*"))
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
from megacpt.family.read import read_config
from megacpt.model.hf import load_pretrained
from megacpt.model.decoder import ModelOptions
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
    from megacpt.config.model import config_in_stage
    from megacpt.config.sections.stage import Stage
    from megacpt.errors import ConfigError
    from megacpt.family.rope import least_theta

    own = parse_config(
        {"model_type": "llama", "vocab_size": 128, "hidden_size": 256, "intermediate_size": 8, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 8192, "rope_theta": 5e5,
         "architectures": ["LlamaForCausalLM"]}, "t",
    )  # fmt: skip
    make = lambda n, rope: Stage(name=f"s{n}", tokens=1, seq_len=n, batch_tokens=n, mixture={"a": 1.0}, rope=rope)
    jump = config_in_stage(own, [make(65536, Rope(rule="ntk2"))], 0)
    steps = [make(n, Rope(rule="ntk2")) for n in (8192, 16384, 32768, 65536)]
    assert jump.rope.theta == pytest.approx(8.27e6, rel=0.01) and config_in_stage(own, steps, 3) == jump
    assert config_in_stage(own, steps, 0) == own
    assert least_theta(131072) == pytest.approx(9.1e6, rel=0.05)
    with pytest.raises(ConfigError, match="scaled already"):
        scaled = parse_config(ARCHITECTURES["llama3.1-8b"], "t")
        config_in_stage(scaled, [make(262144, Rope(rule="ntk"))], 0)


NUMBERS = (
    "rms_norm_eps", "rope_theta", "initializer_range", "head_dim", "num_hidden_layers", "num_key_value_heads", "vocab_size",
    "max_position_embeddings", "hidden_size", "attention_dropout", "something_else",
)  # fmt: skip


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")], ids=str)
@pytest.mark.parametrize("key", [*NUMBERS, *ROPE_LLAMA3, "attention_factor", "beta_fast"])
def test_no_number_of_a_config_is_inf_or_nan(key, value, tmp_path):
    """Wherever it stands, read or carried through: Python's JSON knows Infinity and NaN."""
    if key in NUMBERS:
        raw, name = tiny_config(**{key: value}), key
    else:
        raw, name = tiny_config(rope_scaling=(ROPE_LLAMA3 | {key: value})), f"rope_scaling.{key}"
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=f"{name} = {value}"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"rms_norm_eps": 0},
        {"rms_norm_eps": -1e-5},
        {"rms_norm_eps": 1e-300},
        {"rope_theta": 0},
        {"rope_theta": 1e-300},
        {"head_dim": 0},
        {"head_dim": -8},
        {"num_key_value_heads": 0},
        {"num_hidden_layers": 10**12},
        {"vocab_size": 10**400},
        {"max_position_embeddings": 0},
        {"max_position_embeddings": True},
        {"initializer_range": 0.0},
        {"initializer_range": -0.02},
        {"rope_scaling": {"rope_type": "linear", "factor": 0.0}},
        {"rope_scaling": ROPE_LLAMA3 | {"low_freq_factor": 0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 0, "factor": 4.0}},
    ],
    ids=str,
)
def test_numbers_with_which_nothing_can_be_computed_are_refused(changes):
    text, key = problems(tiny_config(**changes)), next(iter(changes))
    assert key in text and ("must be a positive integer" in text or "must be a number from" in text)


def spoiled(directory, name: str, value: float, count: int):
    """Puts a value into a tensor of a directory; returns the file."""
    for file in sorted(directory.glob("*.safetensors")):
        tensors = load_file(file)
        if name in tensors:
            tensors[name].view(-1)[-count:] = value
            save_file(tensors, file)
            return file
    raise AssertionError(name)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")], ids=str)
def test_weights_that_are_not_finite_are_not_taken_in(directory, mesh, value):
    config = read_config(directory)
    file = spoiled(directory, "model.layers.1.mlp.up_proj.weight", value, 3)
    with pytest.raises(CheckpointError) as caught:
        load_pretrained(build_model(config, mesh, torch.float32, ModelOptions()), config, directory)
    assert f"{file.name}: model.layers.1.mlp.up_proj.weight holds 3 values that are not finite" in str(caught.value)
    assert "up_proj" in str(caught.value) and "norm" not in str(caught.value)


def import_on_two(directory: str, tensor: int) -> str:
    from megacpt.config.layout import Layout
    from megacpt.parallel.mesh import build_mesh

    config = read_config(directory)
    layout = Layout(tensor=2) if tensor else Layout(data_shard=2)
    model = build_model(config, build_mesh(layout, torch.device("cpu")), torch.float32, ModelOptions())
    try:
        load_pretrained(model, config, directory)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("tensor", [0, 1])
def test_what_one_rank_reads_all_ranks_say(directory, tensor):
    """The last three values lie on the last rank alone."""
    from ranks import on_ranks

    spoiled(directory, "model.layers.0.self_attn.o_proj.weight", float("nan"), 3)
    told = on_ranks(2, import_on_two, str(directory), tensor)
    assert told[0] == told[1] and "o_proj.weight holds 3 values that are not finite" in told[0]


def test_a_stored_value_that_the_masters_cannot_hold_is_refused(directory, mesh):
    config, name = read_config(directory), "model.norm.weight"
    tensors = {k: v for f in directory.glob("*.safetensors") for k, v in load_file(f).items()}
    for file in directory.glob("model*"):
        file.unlink()
    tensors[name] = tensors[name].double()
    tensors[name][0] = 1e300
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.norm.weight holds 1 values that are not finite in torch.float32"):
        load_pretrained(build_model(config, mesh, torch.float32, ModelOptions()), config, directory)


@pytest.mark.parametrize(
    "value, dtype, text",
    [
        (float("nan"), "float32", "2 values are not finite"),
        (1e5, "float16", "2 values are above 65504"),
        (1e5, "bfloat16", ""),
    ],
)
def test_weights_that_are_not_finite_are_not_given_out(directory, tmp_path, value, dtype, text):
    """Also where only the type that is written cannot hold them: a float16 of 1e5 is inf."""
    config, name = read_config(directory), "model.layers.0.mlp.down_proj.weight"
    whole = {n: torch.zeros(shape) for n, shape in config.shapes().items()}
    whole[name].view(-1)[:2] = value
    arguments = (tmp_path / "out", config, directory, whole.get, dict.fromkeys(whole, dtype), 64, 1 << 14)
    if not text:
        hf.write_pretrained(*arguments)
        return
    with pytest.raises(NumbersError, match=f"{name}: {text}"):
        hf.write_pretrained(*arguments)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"], "nothing is left"


@pytest.fixture
def fused(tmp_path):
    """(what is in it, by transformers' names; config.json; folder) of a Phi-3 directory in several shards."""
    torch.manual_seed(0)
    raw = family_config("phi3", head_dim=16)
    model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**without_names(raw)))
    model.save_pretrained(tmp_path / "phi3", max_shard_size="40KB")
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}, raw, tmp_path / "phi3"


def imported(raw: dict, folder, mesh) -> dict[str, torch.Tensor]:
    config = read_config(folder)
    model = build_model(config, mesh, torch.float32, ModelOptions())
    load_pretrained(model, config, folder)
    return {name: p._local_tensor[: config.shapes()[name][0]] for name, p in model.named_parameters()}


def test_rows_of_several_parameters_in_one_tensor_come_apart_and_together_again(fused, mesh, tmp_path):
    stored, raw, folder = fused
    ours, wanted = imported(raw, folder, mesh), as_ours(raw, stored)
    assert ours.keys() == wanted.keys() and all(torch.equal(ours[name], wanted[name]) for name in wanted)
    assert ours["model.layers.1.self_attn.k_proj.weight"].shape == (32, 32) and len(ours) > len(stored)
    dtypes = dict.fromkeys(ours, "float32")
    hf.write_pretrained(tmp_path / "out", read_config(folder), folder, ours.get, dtypes, 64, max_shard_bytes=1 << 14)
    files = [load_file(file) for file in (tmp_path / "out").glob("*.safetensors")]
    written = {name: tensor for file in files for name, tensor in file.items()}
    assert len(files) > 5 and written.keys() == stored.keys()
    assert all(torch.equal(written[name], stored[name]) for name in stored)


def test_the_comparison_sees_rows_of_a_neighbour(fused, mesh, monkeypatch):
    """The twin: keys and values exchanged have the shapes of each other."""
    stored, raw, folder = fused
    own = Stored.rows
    monkeypatch.setattr(Stored, "rows", lambda self, name: own(self, name.replace("k_proj", "v_proj")))
    ours, wanted = imported(raw, folder, mesh), as_ours(raw, stored)
    differ = {name for name in wanted if not torch.equal(ours[name], wanted[name])}
    assert differ == {f"model.layers.{i}.self_attn.k_proj.weight" for i in (0, 1)}


def test_what_is_wrong_with_a_file_is_told_by_the_names_that_it_has(fused, mesh):
    """Its own tensors, with its own shapes; but values by parameter."""
    _, raw, folder = fused
    file = spoiled(folder, "model.layers.0.mlp.gate_up_proj.weight", float("nan"), 5)
    with pytest.raises(
        CheckpointError, match=rf"{file.name}: model.layers.0.mlp.up_proj.weight holds 5 values"
    ) as told:
        imported(raw, folder, mesh)
    assert "gate_proj" not in str(told.value)
    config = json.loads((folder / "config.json").read_text()) | {"num_key_value_heads": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"0.self_attn.qkv_proj.weight is \[128, 32\], config.json asks for \[192, 32\]"
    ):
        imported(raw, folder, mesh)
