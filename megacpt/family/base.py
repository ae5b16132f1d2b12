"""The table of a model's parameters, from which shapes, placement, layout rules, initialisation, decay, FLOPs, memory and export derive.

What depends on a parameter's name anywhere else belongs into a column of this table.
"""

import functools
import itertools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from megacpt.errors import Problem, show_value
from megacpt.family.rope import RopeConfig, parse_rope, write_rope
from megacpt.family.values import value_problems

FIRST_NORM, QUERIES_KEYS_VALUES, ATTENTION_OUTPUT, SECOND_NORM, GATE_AND_UP, DOWN = STEPS = range(6)
"""Of a layer, in the order of its forward."""


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
        step: when the layer's forward comes to it, one of `STEPS`: what a step multiplies is kept for the gradients of its weights.
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
    step: int = 0
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

    def shared_units(self, vocab_multiple: int) -> int:
        """What tensor ranks share out of it: heads, features, rows of the padded vocabulary."""
        return self.padded(vocab_multiple)[0] if self.split == "vocab" else self.units

    def padded(self, vocab_multiple: int) -> tuple[int, ...]:
        """The shape in training: rows of a vocabulary are filled up to a multiple."""
        if self.split != "vocab":
            return self.shape
        return (-(-self.shape[0] // vocab_multiple) * vocab_multiple, *self.shape[1:])

    def is_whole(self, ranks: int) -> bool:
        """Whether each of so many tensor ranks holds all of it."""
        return self.split == "replicated" or (self.repeated and ranks > self.units)


@dataclass(frozen=True)
class Stored:
    """A tensor of a Hugging Face file: a parameter, or the rows of several, one below the other."""

    name: str
    parts: tuple[Parameter, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    def rows(self, name: str) -> range:
        """Those of a part."""
        ends = itertools.accumulate(part.shape[0] for part in self.parts)
        return next(range(end - p.shape[0], end) for p, end in zip(self.parts, ends, strict=True) if p.name == name)


@dataclass(frozen=True)
class Family:
    """A kind of model, named by `model_type` in config.json.

    Attributes:
        architecture: transformers' class, for an export whose source names none.
        parameters: the table of a model of this family, in the order of the model.
        defaults: what transformers' config class takes for keys that a file leaves out.
        only: keys that would change the computation, with the one value that is trained; null is taken as absent.
        windowed: whether `sliding_window` limits what a token sees.
        fused: modules that lie in one tensor of a file, by the name that they have there together; its rows follow the table's order.
        rope_types: scalings of the rotary embedding that transformers' class computes as we do.
        head: the head's name, which a file of tied embeddings may still hold.
        derived: ends of names of tensors that files of old versions hold and that follow from config.json.
    """

    model_type: str
    architecture: str
    parameters: "Callable[[ModelConfig], list[Parameter]]"
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    only: Mapping[str, Any] = field(default_factory=dict[str, Any])
    windowed: bool = False
    fused: Mapping[str, Collection[str]] = field(default_factory=dict[str, Collection[str]])
    rope_types: Collection[str] = ("default", "linear", "llama3", "yarn")
    head: str = "lm_head.weight"
    derived: tuple[str, ...] = ("rotary_emb.inv_freq",)

    def complete(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """A file's keys with the defaults of those that it leaves out."""
        return {**self.defaults, **raw}

    def read(self, raw: dict[str, Any]) -> "tuple[ModelConfig | None, list[Problem]]":
        """What a config.json of this family says: the model's shape, or all that is wrong with it."""
        whole = self.complete(raw)
        problems = [*value_problems(whole), *self._refusals(raw)]
        given = whole.get("max_position_embeddings") or self.defaults["max_position_embeddings"]
        rope, wrong = parse_rope(raw, given, self.rope_types)
        if problems:
            return None, problems + wrong
        heads, hidden = whole["num_attention_heads"], whole["hidden_size"]
        config = ModelConfig(
            vocab_size=whole["vocab_size"],
            hidden_size=hidden,
            intermediate_size=whole["intermediate_size"],
            num_hidden_layers=whole["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=whole.get("num_key_value_heads") or heads,
            head_dim=whole.get("head_dim") or hidden // heads,
            rms_norm_eps=float(whole.get("rms_norm_eps", 1e-6)),
            max_position_embeddings=given,
            tie_word_embeddings=bool(whole.get("tie_word_embeddings", False)),
            initializer_range=float(whole.get("initializer_range", 0.02)),
            rope=rope,
            raw=raw,
            family=self,
        )
        problems = config.head_problems() + wrong
        return (None if problems else config), problems

    def write(self, config: "ModelConfig") -> dict[str, Any]:
        """config.json of a model: the file that it came from, with the shape and the rotary embedding of now."""
        raw = {"model_type": self.model_type, **config.raw, "vocab_size": config.vocab_size}
        raw.setdefault("architectures", [self.architecture])
        given = config.max_position_embeddings
        if "max_position_embeddings" in raw or given != self.defaults["max_position_embeddings"]:
            raw["max_position_embeddings"] = given
        if parse_rope(raw, given, self.rope_types)[0] != config.rope:
            write_rope(raw, config.rope)
        return raw

    def _refusals(self, raw: Mapping[str, Any]) -> list[Problem]:
        """What a file asks for and is not trained."""
        found = [
            Problem(key, raw[key], f"only {show_value(only)} is trained in {self.model_type} models.")
            for key, only in {**_ONLY, **self.only}.items()
            if raw.get(key, only) not in (only, None)
        ]
        types = raw.get("layer_types")
        other = sorted(set(map(str, cast(list[Any], types))) - {"full_attention"}) if isinstance(types, list) else types
        if other:
            found.append(Problem("layer_types", other, "only layers of full attention are trained."))
        window = raw.get("sliding_window")
        if self.windowed and window is not None and (type(window) is not int or window < 1):
            found.append(Problem("sliding_window", window, "must be a positive integer, or null for none."))
        return found


_ONLY: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "attention_dropout": 0,
    "quantization_config": None,
    "partial_rotary_factor": 1.0,
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
        return cast(list[int], eos)[0] if isinstance(eos, list) else eos

    @property
    def dtype(self) -> str | None:
        """The type that the file names, in either spelling."""
        return self.raw.get("dtype") or self.raw.get("torch_dtype")

    @property
    def window(self) -> int | None:
        """Tokens that a token sees, itself included; None without a limit."""
        return self.family.complete(self.raw).get("sliding_window") if self.family.windowed else None

    def head_problems(self) -> list[Problem]:
        """Why the heads do not share out what they must."""
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        problems: list[Problem] = []
        if heads % kv_heads:
            problems.append(Problem("num_key_value_heads", kv_heads, f"does not divide num_attention_heads = {heads}."))
        if not self.family.complete(self.raw).get("head_dim") and self.hidden_size % heads:
            problems.append(
                Problem("hidden_size", self.hidden_size, f"is no multiple of num_attention_heads = {heads}.")
            )
        if self.head_dim % 2:
            problems.append(Problem("head_dim", self.head_dim, "a rotary embedding needs an even one."))
        return problems

    def window_problem(self, longest: int) -> str:
        """Why documents of so many tokens are not those of the model; empty if they are."""
        if self.window is None or longest <= self.window:
            return ""
        named = "sliding_window" in self.raw
        whose = "" if named else f", the default of {self.model_type} models where config.json names none"
        return (
            f"the model's sliding_window is {self.window}{whose}, and a window shorter than the row is not trained. Use at most "
            f'{self.window}, or write "sliding_window": null into config.json if the model was made without one.'
        )

    @functools.cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """The table."""
        return tuple(self.family.parameters(self))

    @property
    def embedding(self) -> str:
        """Name of the table that tokens are looked up in; the head's too, where they are tied."""
        return next(p.name for p in self.parameters if p.role == "lookup")

    @functools.cached_property
    def stored(self) -> tuple[Stored, ...]:
        """The tensors of its file, in the order of the model."""
        together = {module: name for name, modules in self.family.fused.items() for module in modules}
        found: dict[str, list[Parameter]] = {}
        for parameter in self.parameters:
            *path, module, kind = parameter.name.split(".")
            found.setdefault(".".join([*path, together.get(module, module), kind]), []).append(parameter)
        return tuple(Stored(name, tuple(parts)) for name, parts in found.items())

    def depth(self, parameter: Parameter) -> int:
        """Where forward first meets a parameter: the embedding -1, a layer's its number, what follows the layers their count."""
        if parameter.layer is not None:
            return parameter.layer
        return -1 if parameter.role == "lookup" else self.num_hidden_layers

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
