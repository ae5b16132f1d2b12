"""Models that a recipe can name, as the config.json of each."""

from typing import Any


def _llama3(hidden: int, ffn: int, layers: int, heads: int, factor: float, tied: bool) -> dict[str, Any]:
    """A Llama 3.1 or 3.2 of this size."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "initializer_range": 0.02,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }


def _qwen(kind: int, hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    """A base model of Qwen2.5 (kind 2) or Qwen3."""
    return {
        "architectures": [f"Qwen{kind}ForCausalLM"],
        "model_type": f"qwen{kind}",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "sliding_window": None,
        "use_sliding_window": False,
    } | more


_MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 32768,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rope_theta": 1000000.0,
    "sliding_window": None,
}

_PHI_4 = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "vocab_size": 100352,
    "hidden_size": 5120,
    "intermediate_size": 17920,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 10,
    "hidden_act": "silu",
    "max_position_embeddings": 16384,
    "original_max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": 100257,
    "eos_token_id": 100265,
    "rope_theta": 250000.0,
    "rope_scaling": None,
    "sliding_window": None,
}

# Llama 3 paper, Table 3; scaling factors from the models' config.json (32 for 3.2; Llama 3 itself has none). Qwen2.5 (arXiv 2412.15115),
# Qwen3 (2505.09388, table 1), Mistral and Phi-4 (2412.08905): as their config.json.
ARCHITECTURES = {
    "llama3.2-1b": _llama3(2048, 8192, 16, 32, 32.0, True),
    "llama3.2-3b": _llama3(3072, 8192, 28, 24, 32.0, True),
    "llama3-8b": _llama3(4096, 14336, 32, 32, 8.0, False) | {"max_position_embeddings": 8192, "rope_scaling": None},
    "llama3.1-8b": _llama3(4096, 14336, 32, 32, 8.0, False),
    "llama3.1-70b": _llama3(8192, 28672, 80, 64, 8.0, False),
    "llama3.1-405b": _llama3(16384, 53248, 126, 128, 8.0, False),
    "qwen2.5-7b": _qwen(2, 3584, 18944, 28, 28, 4, vocab_size=152064, max_position_embeddings=131072),
    "qwen3-0.6b": _qwen(3, 1024, 3072, 28, 16, 8, head_dim=128, tie_word_embeddings=True, attention_bias=False),
    "qwen3-8b": _qwen(3, 4096, 12288, 36, 32, 8, head_dim=128, attention_bias=False),
    "mistral-7b-v0.3": _MISTRAL_7B,
    "phi-4": _PHI_4,
}
