"""Qwen3 (arXiv 2505.09388): Llama with a norm over each head of queries and keys before the rotary embedding, and a head_dim of its own."""

from functools import partial

from megacpt.family.base import Family
from megacpt.family.llama import decoder

QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    partial(decoder, head_norms=True),
    defaults={"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
)
