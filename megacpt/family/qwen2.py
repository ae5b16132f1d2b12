"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): Llama with biases on queries, keys and values, which no key of config.json names."""

from functools import partial

from megacpt.family.base import Family
from megacpt.family.llama import decoder

QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    partial(decoder, biases="qkv"),
    defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768},
    only={"attention_bias": True},
)
