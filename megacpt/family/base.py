"""The table of a model's parameters, from which shapes, placement, layout rules, initialisation, decay, FLOPs, memory and export derive.

What depends on a parameter's name anywhere else belongs into a column of this table.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megacpt.family.rope import RopeConfig


@dataclass(frozen=True)
class Parameter:
    """One tensor of a model, under its Hugging Face name.

    Attributes:
        shape: without vocabulary padding.
        split: what tensor parallelism cuts: column and vocab rows (dimension 0), row columns (dimension 1).
        role: matmul (a matrix product of every token), lookup (a table of rows), norm, bias, adapter.
        init: from scratch: normal with the config's range, residual (normal, divided by sqrt(2 layers): it ends a residual branch), ones,
            zeros.
        decay: whether weight decay acts on it.
        layer: whose it is, None outside the layers.
        unit: rows (or columns) that stay together: a head.
        counted: the key of config.json that counts the units; of a norm inside attention, the heads that it normalises one by one.
        repeated: with more ranks than units every rank holds all of it and uses one unit; its gradients are then summed over the ranks.
        trainable: False for what never changes.
    """

    name: str
    shape: tuple[int, ...]
    split: Literal["column", "row", "vocab", "replicated"]
    role: Literal["matmul", "lookup", "norm", "bias", "adapter"]
    init: Literal["normal", "residual", "ones", "zeros"] = "normal"
    decay: bool = True
    layer: int | None = None
    unit: int = 1
    counted: str = ""
    repeated: bool = False
    trainable: bool = True

    @property
    def units(self) -> int:
        """Parts that tensor parallelism deals out."""
        return self.shape[1 if self.split == "row" else 0] // self.unit

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def padded(self, vocab_multiple: int) -> tuple[int, ...]:
        """The shape in training: rows of a vocabulary are filled up to a multiple."""
        if self.split != "vocab":
            return self.shape
        return (-(-self.shape[0] // vocab_multiple) * vocab_multiple, *self.shape[1:])

    def is_whole(self, ranks: int) -> bool:
        """Whether each of so many tensor ranks holds all of it."""
        return self.split == "replicated" or (self.repeated and ranks > self.units)


@dataclass(frozen=True)
class Family:
    """A kind of model, named by `model_type` in config.json.

    Attributes:
        architecture: transformers' class, for an export whose source names none.
        parameters: the table of a model of this family, in the order of the model.
        defaults: what transformers' config class takes for keys that a file leaves out.
        only: keys that would change the computation, with the one value that is trained; null is taken as absent.
        windowed: whether `sliding_window` limits what a token sees.
    """

    model_type: str
    architecture: str
    parameters: "Callable[[ModelConfig], list[Parameter]]"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, Any] = field(default_factory=dict)
    windowed: bool = False

    def complete(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """A file's keys with the defaults of those that it leaves out."""
        return {**self.defaults, **raw}

    def problems(self, raw: Mapping[str, Any]) -> list[str]:
        """What a file asks for and is not trained."""
        found = [
            f"{key} = {raw[key]!r}: only {only!r} is trained in {self.model_type} models."
            for key, only in {**_ONLY, **self.only}.items()
            if raw.get(key, only) not in (only, None)
        ]
        types = raw.get("layer_types")
        other = sorted({str(kind) for kind in types} - {"full_attention"}) if isinstance(types, list) else types
        if other:
            found.append(f"layer_types: {other!r}: only layers of full attention are trained.")
        window = raw.get("sliding_window")
        if self.windowed and window is not None and (type(window) is not int or window < 1):
            found.append(f"sliding_window = {window!r}: must be a positive integer, or null for none.")
        return found


_ONLY: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "attention_dropout": 0,
    "quantization_config": None,
    "use_sliding_window": False,
    "num_experts": None,
    "num_local_experts": None,
}


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a model. `raw` is the file it came from, carried through to the export."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    initializer_range: float
    rope: RopeConfig
    raw: dict[str, Any]
    family: Family

    @property
    def model_type(self) -> str:
        return self.family.model_type

    @property
    def eos_token_id(self) -> int | None:
        eos = self.raw.get("eos_token_id")
        return eos[0] if isinstance(eos, list) else eos

    @property
    def dtype(self) -> str | None:
        """The type that the file names, in either spelling."""
        return self.raw.get("dtype") or self.raw.get("torch_dtype")

    @property
    def window(self) -> int | None:
        """Tokens that a token sees, itself included; None without a limit."""
        return self.family.complete(self.raw).get("sliding_window") if self.family.windowed else None

    @functools.cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """The table."""
        return tuple(self.family.parameters(self))

    @property
    def embedding(self) -> str:
        """Name of the table that tokens are looked up in; the head's too, where they are tied."""
        return next(p.name for p in self.parameters if p.role == "lookup")

    @property
    def has_head_norms(self) -> bool:
        """Whether queries and keys are normalised head by head."""
        return any(p.role == "norm" and p.counted for p in self.parameters)

    def padded_vocab(self, multiple: int) -> int:
        return -(-self.vocab_size // multiple) * multiple

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter by Hugging Face name, in the order of the model, without vocabulary padding."""
        return {p.name: p.shape for p in self.parameters}

    def num_parameters(self) -> int:
        return sum(p.size for p in self.parameters)
