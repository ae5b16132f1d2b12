"""Text, shapes and ranks that tests share."""

import copy
import json
import random
from pathlib import Path
from typing import Any

_random = random.Random(0)
_WORDS = "the of and to in def return self for if import class while data order token model loss rank mesh".split()
TEXTS = [" ".join(_random.choice(_WORDS) for _ in range(_random.choice([1, 3, 10, 40, 120, 300]))) for _ in range(400)]

ROPE_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
ROPE_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def without_names(raw: dict[str, Any]) -> dict[str, Any]:
    """A copy for transformers' LlamaConfig, which changes the dictionaries that it is given."""
    return copy.deepcopy({k: v for k, v in raw.items() if k not in ("architectures", "model_type", "torch_dtype")})


def tiny_config(**changes: Any) -> dict[str, Any]:
    """config.json of a Llama with grouped queries and a vocabulary that is no multiple of anything."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 401,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    } | changes


def family_config(model_type: str, **changes: Any) -> dict[str, Any]:
    """As `tiny_config`, of a family. Qwen3's heads are wider than hidden / heads, as in its published models."""
    own = {
        "qwen2": {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False, "sliding_window": 32},
        "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16},
        "phi3": {"architectures": ["Phi3ForCausalLM"], "pad_token_id": None, "original_max_position_embeddings": 64},
        "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 4096},
    }
    return tiny_config() | {"model_type": model_type} | own.get(model_type, {}) | changes


def make_tokenizer(directory: Path) -> Path:
    """A byte-level BPE tokenizer of 400 entries, EOS 0, as a Hugging Face directory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|end_of_text|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end_of_text|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def make_data(directory: Path, tokenizer: Path) -> Path:
    """Prepared domains `a` and `b` in a folder."""
    from megacpt.data.prepare import Options, prepare

    for name, texts in (("a", TEXTS[::2]), ("b", TEXTS[1::2])):
        with open(directory / f"{name}.jsonl", "w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
        prepare([str(directory / f"{name}.jsonl")], str(directory / name), Options(str(tokenizer)), workers=1)
    return directory


def write_recipe(directory: Path, prepared: Path, tokenizer: Path, **sections: Any) -> str:
    """The path of a tiny recipe; keyword arguments replace whole sections."""
    import tomli_w

    (directory / "config.json").write_text(json.dumps(tiny_config()))
    recipe = {
        "run": {"name": "t", "directory": str(directory / "run"), "seed": 3},
        "model": {"config": str(directory / "config.json"), "tokenizer": str(tokenizer)},
        "parallel": {"micro_batch_tokens": 128},
        "packing": {"directory": str(directory / "packing")},
        "log": {"peak_tflops": 1.0},
        "health": {"watchdog": False},
        "data": {name: {"paths": [str(prepared / name)], "holdout_documents": 5} for name in "ab"},
        "validation": [{"domains": ["a", "b"], "every_tokens": 1024}],
        "stages": [
            {
                "name": "s",
                "tokens": 2048,
                "seq_len": 64,
                "batch_tokens": 256,
                "mixture": {"a": 0.7, "b": 0.3},
                "lr": {"shape": "wsd", "peak": 1e-3, "min": 1e-4, "warmup_tokens": 512, "decay_tokens": 512},
            }
        ],
    } | sections
    path = directory / "recipe.toml"
    path.write_text(tomli_w.dumps(recipe))
    return str(path)


def rate_at(recipe, clock, number: int) -> float:
    """The learning rate of a step."""
    from megacpt.config.merge import schedule_in
    from megacpt.optim.schedule import rate_of_step

    step = clock.step(number)
    return rate_of_step(schedule_in(recipe, recipe.stages[step.stage]), clock, step)
