"""Text, shapes and ranks that tests share."""

import copy
import random
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
