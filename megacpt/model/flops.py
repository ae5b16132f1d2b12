"""Floating-point operations of training, forward and backward, recomputation not counted.

Matrix products: 6 per parameter and token (all matrices but the embedding's look-up). Attention: 12 heads d per pair
of query and key and layer. Two conventions: PaLM's (Chowdhery et al. 2022, appendix B) counts all S^2 pairs of a row;
the exact one counts the pairs that a causal mask inside documents leaves. Peaks are dense bf16, from data sheets.
"""

from megacpt.family.base import ModelConfig

PEAK_FLOPS = {  # substring of the device's name: dense bf16 FLOP/s
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "H200": 989.4e12,
    "H800": 989.4e12,
    "GH200": 989.4e12,
    "A100": 312e12,
    "A800": 312e12,
    "B200": 2250e12,
    "B300": 2250e12,
    "GB200": 2500e12,
    "L40S": 362e12,
    "A10": 125e12,
}


def matmul_flops_per_token(config: ModelConfig) -> int:
    """Forward and backward of all matrix products with weights."""
    multiplied = ("matmul", "lookup") if config.tie_word_embeddings else ("matmul",)  # tied, the table is the head too
    return 6 * sum(p.size for p in config.parameters if p.role in multiplied)


def attention_flops_per_pair(config: ModelConfig) -> int:
    """Forward and backward of one query with one key, over all heads and layers."""
    return 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim


def step_flops(config: ModelConfig, tokens: int, seq_len: int, pairs: int) -> tuple[int, int]:
    """(PaLM convention, exact) of a step.

    Args:
        pairs: visible pairs of query and key, each query's own key included.
    """
    products, pair = matmul_flops_per_token(config) * tokens, attention_flops_per_pair(config)
    return products + pair * tokens * seq_len, products + pair * pairs
