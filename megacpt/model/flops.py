"""Floating-point operations of training, forward and backward, recomputation not counted.

Matrix products: 6 per parameter and token (all matrices but the embedding's look-up). Attention: 12 heads d per pair
of query and key and layer. What a stage that freezes does not compute is not counted. Two conventions: PaLM's (Chowdhery et al. 2022,
appendix B) counts all S^2 pairs of a row; the exact one counts the pairs that a causal mask inside documents leaves. Peaks are dense bf16,
from data sheets.
"""

from collections.abc import Collection

from megacpt.family.base import QUERIES_KEYS_VALUES, ModelConfig

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


def step_flops(
    config: ModelConfig, tokens: int, seq_len: int, pairs: int, trained: Collection[str] | None = None
) -> tuple[int, int]:
    """(PaLM convention, exact) of a step.

    Args:
        pairs: visible pairs of query and key, each query's own key included.
        trained: names of the parameters that are trained; default all. A product is made for its weight's gradient if that is trained, and
            for its input's if anything before it is.
    """
    trained = frozenset(config.shapes()) if trained is None else trained
    lowest = min((config.depth(p), p.step) for p in config.parameters if p.name in trained)
    products = sum(
        p.size * (2 + 2 * (p.name in trained) + 2 * (lowest < (config.depth(p), p.step)))
        for p in config.parameters
        if p.role == "matmul"
    )
    if config.tie_word_embeddings:  # the table is the head, too
        table = next(p for p in config.parameters if p.name == config.embedding)
        products += table.size * (2 + 2 * (table.name in trained) + 2)
    backward = sum(lowest <= (layer, QUERIES_KEYS_VALUES) for layer in range(config.num_hidden_layers))
    pair = config.num_attention_heads * config.head_dim * (4 * config.num_hidden_layers + 8 * backward)
    return products * tokens + pair * tokens * seq_len, products * tokens + pair * pairs
