"""Mistral (arXiv 2310.06825): Llama whose tokens see a window. Within the window it is Llama; longer rows are refused. A file that leaves
`sliding_window` out has the class's own, 4,096; null is none."""

from megacpt.family.base import Family
from megacpt.family.llama import decoder

MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    decoder,
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    windowed=True,
)
