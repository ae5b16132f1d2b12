"""Llama 2 and 3 (Touvron et al. 2023, arXiv 2307.09288; 2407.21783), and the table that its relatives share."""

from collections.abc import Collection
from typing import Any

from megacpt.family.base import (
    ATTENTION_OUTPUT,
    DOWN,
    FIRST_NORM,
    GATE_AND_UP,
    QUERIES_KEYS_VALUES,
    SECOND_NORM,
    Family,
    ModelConfig,
    Parameter,
)


def decoder(config: ModelConfig, biases: Collection[str] = (), head_norms: bool = False) -> list[Parameter]:
    """The table of a pre-norm decoder with grouped queries and a gated MLP.

    Args:
        biases: of q, k, v, those whose product has one.
        head_norms: whether queries and keys are normalised head by head before the rotary embedding.
    """
    h = config.hidden_size
    embedding = Parameter("model.embed_tokens.weight", (config.vocab_size, h), "vocab", "lookup")
    table = [embedding]
    for layer in range(config.num_hidden_layers):
        table += _layer(config, layer, biases, head_norms)
    table.append(_norm("model.norm.weight", h))
    if not config.tie_word_embeddings:
        table.append(Parameter(config.family.head, (config.vocab_size, h), "vocab", "matmul"))
    return table


def _layer(config: ModelConfig, layer: int, biases: Collection[str], head_norms: bool) -> list[Parameter]:
    h, f, d = config.hidden_size, config.intermediate_size, config.head_dim
    heads = {"q": "num_attention_heads", "k": "num_key_value_heads", "v": "num_key_value_heads"}
    prefix, table = f"model.layers.{layer}.", list[Parameter]()
    for letter, counted in heads.items():
        rows, name = getattr(config, counted) * d, f"{prefix}self_attn.{letter}_proj."
        place: Any = {
            "layer": layer,
            "unit": d,
            "counted": counted,
            "repeated": letter != "q",
            "step": QUERIES_KEYS_VALUES,
        }
        table.append(Parameter(name + "weight", (rows, h), "column", "matmul", **place))
        if letter in biases:
            table.append(Parameter(name + "bias", (rows,), "column", "bias", "zeros", decay=False, **place))
    width = config.num_attention_heads * d
    out: Any = {"layer": layer, "unit": d, "counted": heads["q"], "step": ATTENTION_OUTPUT}
    table.append(Parameter(prefix + "self_attn.o_proj.weight", (h, width), "row", "matmul", "residual", **out))
    if head_norms:
        name = prefix + "self_attn.{}_norm.weight"
        table += [_norm(name.format(letter), d, layer, QUERIES_KEYS_VALUES, heads[letter]) for letter in "qk"]
    mlp: Any = {"layer": layer, "counted": "intermediate_size"}
    return [
        *table,
        Parameter(prefix + "mlp.gate_proj.weight", (f, h), "column", "matmul", step=GATE_AND_UP, **mlp),
        Parameter(prefix + "mlp.up_proj.weight", (f, h), "column", "matmul", step=GATE_AND_UP, **mlp),
        Parameter(prefix + "mlp.down_proj.weight", (h, f), "row", "matmul", "residual", step=DOWN, **mlp),
        _norm(prefix + "input_layernorm.weight", h, layer, FIRST_NORM),
        _norm(prefix + "post_attention_layernorm.weight", h, layer, SECOND_NORM),
    ]


def _norm(name: str, width: int, layer: int | None = None, step: int = 0, counted: str = "") -> Parameter:
    return Parameter(name, (width,), "replicated", "norm", "ones", decay=False, layer=layer, step=step, counted=counted)


LLAMA = Family(
    "llama", "LlamaForCausalLM", decoder, {"max_position_embeddings": 2048}, {"sliding_window": None}
)  # transformers' LlamaForCausalLM ignores a window, other engines do not
