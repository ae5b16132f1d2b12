"""The rotary embedding of a model: read from config.json, written into it, and changed.

config.json has two spellings, transformers 4's (`rope_theta`, `rope_scaling`) and 5's (`rope_parameters`). Where both stand they must say
the same, because readers differ in which one they believe.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from megacpt.errors import ConfigError, Problem, nearest, show_value

if TYPE_CHECKING:
    from megacpt.family.base import ModelConfig


@dataclass(frozen=True)
class Linear:
    """All frequencies are divided (Chen et al. 2023, arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True)
class Llama3:
    """Low frequencies are divided, high ones stay (Llama 3.1's reference code)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: float


@dataclass(frozen=True)
class Yarn:
    """YaRN (Peng et al. 2023, arXiv 2309.00071). Without `attention_factor` it follows from the factor and both `mscale`."""

    factor: float
    original_max_position_embeddings: float
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


_TYPES = {"linear": Linear, "llama3": Llama3, "yarn": Yarn}
_BETWEEN = {
    "rope_theta": (1.0, 1e15),
    "factor": (1.0, 1e6),
    "original_max_position_embeddings": (1, 2**31 - 1),
    "low_freq_factor": (1e-6, 1e6),
    "high_freq_factor": (1e-6, 1e6),
    "attention_factor": (1e-6, 1e6),
    "beta_fast": (1e-6, 1e6),
    "beta_slow": (1e-6, 1e6),
    "mscale": (0.0, 1e6),
    "mscale_all_dim": (0.0, 1e6),
}
"""Bounds in which an embedding can be computed."""


@dataclass(frozen=True)
class RopeConfig:
    """Base and scaling of the rotary embedding."""

    theta: float = 10000.0
    scaling: Linear | Llama3 | Yarn | None = None

    @property
    def type(self) -> str:
        """As config.json calls it."""
        return next((name for name, kind in _TYPES.items() if isinstance(self.scaling, kind)), "default")

    @property
    def fields(self) -> dict[str, Any]:
        """Those of the scaling that are not its defaults, by their names in config.json."""
        own = dataclasses.fields(self.scaling) if self.scaling else ()
        values = {field.name: getattr(self.scaling, field.name) for field in own}
        return {field.name: values[field.name] for field in own if values[field.name] != field.default}

    @property
    def longest(self) -> int | None:
        """The context length that the scaling is made for, None if it names none."""
        if not isinstance(self.scaling, Llama3 | Yarn):
            return None
        return math.floor(self.scaling.original_max_position_embeddings * self.scaling.factor)


def parse_rope(raw: Mapping[str, Any], longest: int, types: Collection[str]) -> tuple[RopeConfig, list[Problem]]:
    """The embedding that a config.json names, in either spelling or both.

    Args:
        longest: the file's max_position_embeddings, which a YaRN without an original length stretches.
        types: of scaling, those that the family has.
    Returns:
        It, and what is wrong with the file; with problems it is not the file's.
    """
    spellings: dict[str, Any] = {}
    problems: list[Problem] = []
    if raw.get("rope_parameters") is not None:
        spellings["rope_parameters"] = raw["rope_parameters"]
    if raw.get("rope_scaling") is not None or not spellings:
        spellings["rope_scaling"] = raw.get("rope_scaling") or {}
    wrong = [name for name, given in spellings.items() if not isinstance(given, dict)]
    if wrong:
        return RopeConfig(), [Problem(name, spellings[name], "must be an object.") for name in wrong]
    theta = raw.get("rope_theta")
    if theta is None:
        theta = spellings.get("rope_parameters", {}).get("rope_theta")
    found = [_parse_spelling(name, given, theta, longest, types, problems) for name, given in spellings.items()]
    if not problems and any(other != found[0] for other in found):
        text = (
            f"{raw['rope_parameters']} and rope_theta {raw.get('rope_theta')} with rope_scaling {raw['rope_scaling']} say different "
            "things, and readers differ in which one they believe."
        )
        problems.append(Problem("rope_parameters", None, text, "Remove the one that is not meant."))
    elif not problems and raw.get("rope_theta") not in (None, found[0].theta):
        text = f"differs from rope_parameters.rope_theta = {show_value(found[0].theta)}."
        problems.append(Problem("rope_theta", raw["rope_theta"], text, "Remove the wrong one."))
    return found[0], problems


def _parse_spelling(
    name: str, given: Mapping[str, Any], top_theta: Any, longest: int, types: Collection[str], problems: list[Problem]
) -> RopeConfig:
    fields = {key: value for key, value in given.items() if value is not None}
    where, theta = f"{name}.rope_theta", fields.pop("rope_theta", None)
    if theta is None:
        where, theta = "rope_theta", 10000.0 if top_theta is None else top_theta
    kinds = [fields.pop(key) for key in ("rope_type", "type") if key in fields]
    if len(set(map(str, kinds))) > 1:
        text = f"rope_type = {kinds[0]!r} and type = {kinds[1]!r} differ, and readers differ in which one they believe."
        problems.append(Problem(name, None, text, "Remove one."))
    if fields.pop("partial_rotary_factor", 1.0) != 1.0:
        problems.append(Problem(f"{name}.partial_rotary_factor", None, "only 1.0 is trained."))
    found = _number_problems({where: theta})
    scaling, wrong = _parse_scaling(name, kinds[0] if kinds else "default", fields, longest, types)
    problems += found + wrong
    return RopeConfig() if found else RopeConfig(float(theta), scaling)


def _parse_scaling(
    name: str, kind: Any, fields: Mapping[str, Any], longest: int, types: Collection[str]
) -> tuple[Linear | Llama3 | Yarn | None, list[Problem]]:
    if not isinstance(kind, str):
        return None, [Problem(f"{name}.rope_type", kind, "must be a string.")]
    if kind not in types:
        reason = (
            " Its frequencies depend on the length of the input, so packed training has no defined value for them."
            if kind in ("dynamic", "longrope", "su")
            else ""
        )
        return None, [Problem(f"{name}.rope_type", kind, f"is not trained.{reason}", nearest(kind, list(types)))]
    made = _TYPES.get(kind)
    if made is Yarn:
        fields = {"original_max_position_embeddings": longest, **fields}
    known = {field.name: field.default for field in dataclasses.fields(made)} if made else {}
    problems = [
        Problem(f"{name}.{key}", None, f"is required for rope_type {kind!r}.")
        for key, default in known.items()
        if default is dataclasses.MISSING and key not in fields
    ]
    problems += [
        Problem(
            f"{name}.{key}",
            fields[key],
            f"unknown for rope_type {kind!r}.",
            nearest(key, list(known)) if known else "It has no fields.",
        )
        for key in fields
        if key not in known
    ]
    problems += _number_problems({f"{name}.{key}": value for key, value in fields.items() if key in known})
    if made is None or problems:
        return None, problems
    scaling = made(**fields)
    if isinstance(scaling, Llama3) and scaling.low_freq_factor >= scaling.high_freq_factor:
        text = f"must be below high_freq_factor = {scaling.high_freq_factor}."
        problems.append(Problem(f"{name}.low_freq_factor", scaling.low_freq_factor, text))
    return scaling, problems


def _number_problems(values: Mapping[str, Any]) -> list[Problem]:
    """Values, by their place, that are of no use for the field of that name."""
    problems: list[Problem] = []
    for where, value in values.items():
        bounds = _BETWEEN.get(where.rpartition(".")[2])
        if bounds is None:
            if not isinstance(value, bool):
                problems.append(Problem(where, value, "must be true or false."))
        elif isinstance(value, bool) or not isinstance(value, int | float) or not bounds[0] <= value <= bounds[1]:
            problems.append(Problem(where, value, f"must be a number from {bounds[0]:g} to {bounds[1]:g}."))
    return problems


def write_rope(raw: dict[str, Any], rope: RopeConfig) -> None:
    """Writes every spelling that a config.json has anew, transformers 4's if it has none: a reader believes any of them."""
    scaling = {"rope_type": rope.type, **rope.fields}
    new = raw.get("rope_parameters") is not None
    if new:
        raw["rope_parameters"] = {"rope_theta": rope.theta, **scaling}
    if not new or "rope_theta" in raw:
        raw["rope_theta"] = rope.theta
    if not new or "rope_scaling" in raw:
        raw["rope_scaling"] = None if rope.scaling is None else scaling


def change_rope(
    config: "ModelConfig",
    *,
    theta: float | None = None,
    type: str | None = None,
    rule: str | None = None,
    seq_len: int = 0,
    checkpoint_config: "ModelConfig | None" = None,
    **fields: Any,
) -> "ModelConfig":
    """The config with another rotary embedding. What is not given stays; fields of another type go with their type.

    Args:
        rule: theta by `theta_by_rule`, for rows of `seq_len`, from the theta and length of `checkpoint_config` (default `config`), so that
            many small steps end where one jump does.
        fields: of the scaling, None for one that is not given.
    Raises:
        ConfigError: if fields of the new type are missing or unknown, or a rule meets a scaled embedding.
    """
    given = {key: value for key, value in fields.items() if value is not None}
    if rule:
        own = checkpoint_config or config
        also = [key for key, value in {"theta": theta, "type": type, **given}.items() if value is not None]
        if also:
            text = f"decides theta alone; {', '.join(also)} cannot stand beside it."
            raise ConfigError([Problem("rope.rule", rule, text, "Remove one.")])
        if own.rope.scaling:
            text = f"the checkpoint's embedding is scaled already ({own.rope.type})."
            raise ConfigError([Problem("rope.rule", rule, text, 'Write rope = "keep".')])
        if own.head_dim < 4:
            raise ConfigError([Problem("rope.rule", rule, f"has no value for head_dim = {own.head_dim}.")])
        return replace(config, rope=replace(config.rope, theta=theta_by_rule(rule, own, seq_len)))
    kind = type or config.rope.type
    kept = config.rope.fields if kind == config.rope.type else {}
    scaling, problems = _parse_scaling(
        "rope", kind, {**kept, **given}, config.max_position_embeddings, config.family.rope_types
    )
    theta = config.rope.theta if theta is None else theta
    problems += _number_problems({"rope.rope_theta": theta})
    if problems:
        raise ConfigError(problems)
    return replace(config, rope=RopeConfig(float(theta), scaling))


def theta_by_rule(rule: str, own: "ModelConfig", seq_len: int) -> float:
    """theta s^(d / (d - 2)), the NTK-aware rule, and twice that for ntk2, which ProLong's ablation preferred (arXiv 2410.02660); the
    checkpoint's own theta for lengths that it was made for."""
    stretch, d = seq_len / own.max_position_embeddings, own.head_dim
    if stretch <= 1:
        return own.rope.theta
    return own.rope.theta * stretch ** (d / (d - 2)) * (2 if rule == "ntk2" else 1)


def least_theta(seq_len: int) -> float:
    """The theta below which an unscaled embedding cannot tell distances of this length (Xu et al. 2024, arXiv 2405.14591, fit of table 2;
    the authors call the bound not very strict)."""
    return 0.0424 * seq_len**1.628
