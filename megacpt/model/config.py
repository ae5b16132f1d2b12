"""config.json of a model, read and written: what all families have in common. Imports no torch.

Both spellings of the rotary embedding are read, transformers 4's (`rope_theta`, `rope_scaling`) and 5's
(`rope_parameters`), and written back as they came. What would change the computation and is not known is refused.
"""

import fnmatch
import math
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from megacpt.config.load import nearest
from megacpt.config.recipe import Model
from megacpt.config.stage import Parallel, Rope, Stage
from megacpt.errors import ConfigError
from megacpt.family.base import ModelConfig as ModelConfig
from megacpt.family.base import Parameter
from megacpt.family.families import family_of
from megacpt.family.rope import RopeConfig
from megacpt.family.shapes import ARCHITECTURES
from megacpt.files import JsonError, read_object

_ROPE_FIELDS = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
}
_WHOLE = {
    "vocab_size": 2**31 - 1,
    "hidden_size": 2**20,
    "intermediate_size": 2**24,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 2**16,
    "num_key_value_heads": 2**16,
    "head_dim": 2**16,
    "max_position_embeddings": 2**31 - 1,
}
"""Whole numbers from 1 to this."""
_BETWEEN = {
    "rms_norm_eps": (1e-30, 1.0),
    "initializer_range": (1e-30, 1e3),
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


def number_problems(raw: dict[str, Any], where: str = "") -> list[str]:
    """What is no number in a config.json, wherever it stands (JSON of Python knows NaN and Infinity), and what lies outside the bounds in
    which a model can be computed."""
    problems = []
    for key, value in raw.items():
        name = f"{where}{key}"
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"{name} = {value}: must be a finite number.")
        elif isinstance(value, list | dict):
            inside = value if isinstance(value, dict) else {str(i): item for i, item in enumerate(value)}
            problems += number_problems(inside, f"{name}.")
        elif value is None or where not in ("", "rope_scaling.", "rope_parameters."):
            continue
        elif most := None if where else _WHOLE.get(key):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                problems.append(f"{name} = {value!r}: must be a positive integer, at most {most}.")
        elif key in _BETWEEN:
            low, high = _BETWEEN[key]
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                problems.append(f"{name} = {value!r}: must be a number from {low:g} to {high:g}.")
    return problems


def read_config(path: str | Path) -> ModelConfig:
    """config.json, or the folder that holds it.

    Raises:
        ConfigError: all that is missing, unknown or not trained here, at once.
    """
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    try:
        raw = read_object(file)
    except FileNotFoundError:
        raise ConfigError([f"{file}: no such file. A Hugging Face directory holds config.json."], "the model") from None
    except (OSError, JsonError) as error:
        raise ConfigError([f"{file}: cannot be read: {error}"], "the model") from None
    return parse_config(raw, str(file))


def parse_config(raw: dict[str, Any], source: str) -> ModelConfig:
    """As `read_config`, from the content."""
    problems = []
    if not isinstance(raw, dict):
        raise ConfigError([f"{source}: is a {type(raw).__name__}, not an object."], "the model")
    family, own = family_of(raw, source), raw
    problems += family.problems(raw)
    raw = family.complete(raw)
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    problems += [f"{key}: is required, a positive integer." for key in required if raw.get(key) is None]
    numbers = number_problems(own)
    of_rope = [problem for problem in numbers if problem.startswith("rope_") and "finite" not in problem]
    problems += [problem for problem in numbers if problem not in of_rope]
    told = {re.split("[ :]", problem)[0] for problem in problems}
    problems += [problem for problem in _wrong_values(raw) if problem.split(" ")[0] not in told]
    if problems:
        raise ConfigError(problems + of_rope, source)
    problems += of_rope
    heads, hidden = raw["num_attention_heads"], raw["hidden_size"]
    kv_heads = raw.get("num_key_value_heads") or heads
    head_dim = raw.get("head_dim") or hidden // heads
    if heads % kv_heads:
        problems.append(f"num_key_value_heads = {kv_heads}: does not divide num_attention_heads = {heads}.")
    if not raw.get("head_dim") and hidden % heads:
        problems.append(f"hidden_size = {hidden}: is no multiple of num_attention_heads = {heads}.")
    if head_dim % 2:
        problems.append(f"head_dim = {head_dim}: rotary embedding needs an even one.")
    longest = raw.get("max_position_embeddings") or family.defaults["max_position_embeddings"]
    rope = _parse_rope(raw, longest, problems)
    if problems:
        raise ConfigError(problems, source)
    return ModelConfig(
        raw["vocab_size"],
        hidden,
        raw["intermediate_size"],
        raw["num_hidden_layers"],
        heads,
        kv_heads,
        head_dim,
        float(raw.get("rms_norm_eps") or 1e-6),
        longest,
        bool(raw.get("tie_word_embeddings", False)),
        float(raw.get("initializer_range") or 0.02),
        rope,
        own,
        family,
    )


def what_matters(config: ModelConfig) -> dict[str, Any]:
    """What of a config.json decides what is computed from given weights, by its names there."""
    ours = {each.name: getattr(config, each.name) for each in fields(config)}
    for name in ("raw", "rope", "initializer_range", "family"):
        del ours[name]
    rope = {"rope_theta": config.rope.theta, "rope_type": config.rope.type, **config.rope.fields}
    return ours | rope | {"model_type": config.model_type, "eos_token_id": config.eos_token_id}


def _wrong_values(raw: dict[str, Any]) -> list[str]:
    """Values that are of no use where they stand. None is the default where transformers takes it for that."""
    count = lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0
    positive = ("a positive integer", lambda value: count(value) and value > 0)
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    kinds = {key: (False, *positive) for key in required}
    kinds |= {key: (True, *positive) for key in ("num_key_value_heads", "head_dim", "max_position_embeddings")}
    number = ("a number that is finite and not negative", lambda value: _is_number(value) and value >= 0)
    kinds |= {key: (False, *number) for key in ("rms_norm_eps", "initializer_range") if key in raw}
    kinds["tie_word_embeddings"] = (True, "true or false", lambda value: isinstance(value, bool))
    tokens = lambda value: bool(value) and all(map(count, value)) if isinstance(value, list) else count(value)
    kinds["eos_token_id"] = (True, "a token's id, or a list of at least one", tokens)
    kinds |= {key: (True, "a string", lambda value: isinstance(value, str)) for key in ("dtype", "torch_dtype")}
    return [
        f"{key} = {raw.get(key)!r}: must be {what}."
        for key, (optional, what, fits) in kinds.items()
        if not (fits(raw.get(key)) or (optional and raw.get(key) is None))
    ]


def _is_number(value: Any) -> bool:
    """Whether it is one, and a float can hold it."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300


def config_of(model: Model) -> ModelConfig:
    """The model that a recipe's `[model]` names, with its change of the rotary embedding.

    Raises:
        ConfigError: if there is none, or it is not trained here.
    """
    if model.architecture:
        if model.architecture not in ARCHITECTURES:
            raise ConfigError([f"model.architecture = {model.architecture}: possible are {', '.join(ARCHITECTURES)}."])
        config = parse_config(ARCHITECTURES[model.architecture], model.architecture)
    else:
        config = read_config(model.pretrained or model.config or "")
    if model.expect and not model.architecture:
        _compare(config, config_of(Model(architecture=model.expect)), model.expect)
    return change_rope(config, model.rope)


def _compare(config: ModelConfig, expected: ModelConfig, name: str) -> None:
    names = (
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    differ = [
        f"{key} is {getattr(config, key)}, model.expect = {name} has {getattr(expected, key)}."
        for key in names
        if getattr(config, key) != getattr(expected, key)
    ]
    if differ:
        raise ConfigError(differ)


def _parse_rope(raw: dict[str, Any], longest: int, problems: list[str]) -> RopeConfig:
    """Both spellings; where both stand they must say the same, because readers differ in which one they believe."""
    spellings = {}
    if raw.get("rope_parameters") is not None:
        spellings["rope_parameters"] = raw["rope_parameters"]
    if raw.get("rope_scaling") is not None or not spellings:
        spellings["rope_scaling"] = raw.get("rope_scaling") or {}
    wrong = [name for name, given in spellings.items() if not isinstance(given, dict)]
    if wrong:
        problems.append(f"{wrong[0]} = {spellings[wrong[0]]!r}: must be an object.")
        return RopeConfig()
    theta = raw.get("rope_theta")
    if theta is None:
        theta = spellings.get("rope_parameters", {}).get("rope_theta")
    found = [_parse_spelling(name, given, theta, longest, problems) for name, given in spellings.items()]
    if not problems and any(other != found[0] for other in found):
        problems.append(
            f"rope_parameters {raw['rope_parameters']} and rope_theta {raw.get('rope_theta')} with rope_scaling {raw['rope_scaling']} say "
            "different things, and readers differ in which one they believe. Remove the one that is not meant."
        )
    elif not problems and raw.get("rope_theta") not in (None, found[0].theta):
        problems.append(
            f"rope_theta = {raw['rope_theta']!r} and rope_parameters.rope_theta = {found[0].theta!r} differ. Remove the wrong one."
        )
    return found[0]


def _parse_spelling(name: str, given: dict[str, Any], top_theta: Any, longest: int, problems: list[str]) -> RopeConfig:
    given = dict(given)
    own_theta = given.pop("rope_theta", None)
    theta = own_theta if own_theta is not None else 10000.0 if top_theta is None else top_theta
    kinds = [kind for kind in (given.pop("rope_type", None), given.pop("type", None)) if kind is not None]
    if len(set(map(str, kinds))) > 1:
        problems.append(
            f"{name}: rope_type = {kinds[0]!r} and type = {kinds[1]!r} differ, and readers differ in which one they believe. Remove one."
        )
    kind = kinds[0] if kinds else "default"
    if not isinstance(kind, str):
        problems.append(f"{name}.rope_type = {kind!r}: must be a string.")
        return RopeConfig()
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        problems.append(f"{name}.partial_rotary_factor: only 1.0 is trained.")
    if kind not in _ROPE_FIELDS:
        reason = (
            " Its frequencies depend on the length of the input, so packed training has no defined value for them."
            if (kind == "dynamic")
            else ""
        )
        problems.append(f"{name}.rope_type = {kind!r}: is not trained.{reason} {nearest(kind, list(_ROPE_FIELDS))}")
        return RopeConfig()
    required, optional = _ROPE_FIELDS[kind]
    if kind == "yarn":
        given.setdefault("original_max_position_embeddings", longest)
    fields = {key: value for key, value in given.items() if value is not None}
    for key in required:
        if key not in fields:
            problems.append(f"{name}.{key}: is required for rope_type {kind!r}.")
    for key, value in fields.items():
        if key not in required + optional:
            problems.append(f"{name}.{key}: unknown for rope_type {kind!r}. {nearest(key, [*required, *optional])}")
        elif not (isinstance(value, bool) if key == "truncate" else _is_number(value)):
            problems.append(
                f"{name}.{key} = {value!r}: must be a {'boolean' if key == 'truncate' else 'number, and finite'}."
            )
        elif key == "factor" and value <= 0:
            problems.append(f"{name}.{key} = {value!r}: must be positive.")
    if kind == "llama3" and not problems and fields["low_freq_factor"] >= fields["high_freq_factor"]:
        problems.append(
            f"{name}: low_freq_factor {fields['low_freq_factor']} must be below high_freq_factor "
            f"{fields['high_freq_factor']}."
        )
    if not _is_number(theta) or theta <= 0:
        problems.append(f"rope_theta = {theta!r}: must be a positive, finite number.")
        return RopeConfig()
    return RopeConfig(float(theta), kind, fields)


def change_rope(
    config: ModelConfig, change: Rope | None, seq_len: int = 0, own: ModelConfig | None = None
) -> ModelConfig:
    """The config with a recipe's change of the rotary embedding.

    Args:
        seq_len, own: for a theta by rule: the length it is for, and the checkpoint's config, from which the rule starts, so that many
            small steps end where one jump does.
    Raises:
        ConfigError: if fields of the new type are missing, or a rule meets a scaled embedding.
    """
    if change is None:
        return config
    given = change.model_dump(exclude_none=True)
    if rule := given.pop("rule", None):
        own = own or config
        if given:
            raise ConfigError(
                [f"rope.rule = {rule!r}: decides theta alone; {', '.join(given)} cannot stand beside it."], "the recipe"
            )
        if own.rope.type != "default":
            raise ConfigError(
                [
                    f'rope.rule = {rule!r}: the checkpoint\'s embedding is scaled already ({own.rope.type}). Write rope = "keep".'
                ],
                "the recipe",
            )
        if own.head_dim < 4:
            raise ConfigError([f"rope.rule = {rule!r}: has no value for head_dim = {own.head_dim}."], "the recipe")
        return replace(config, rope=replace(config.rope, theta=ruled_theta(rule, own, seq_len)))
    theta, kind = given.pop("theta", config.rope.theta), given.pop("type", config.rope.type)
    fields = {**(config.rope.fields if kind == config.rope.type else {}), **given}
    problems: list[str] = []
    rope = _parse_rope(
        {"rope_parameters": {"rope_theta": theta, "rope_type": kind, **fields}},
        config.max_position_embeddings,
        problems,
    )
    if problems:
        raise ConfigError([p.replace("rope_parameters", "rope") for p in problems], "the recipe")
    return replace(config, rope=rope)


def ruled_theta(rule: str, own: ModelConfig, seq_len: int) -> float:
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


def frozen_names(patterns: Sequence[str], config: ModelConfig) -> list[str]:
    """Parameters that a stage's `freeze` names.

    Raises:
        ConfigError: for a pattern that fits none, or if nothing would be trained.
    """
    names = list(config.shapes())
    unknown = [pattern for pattern in patterns if not fnmatch.filter(names, pattern)]
    fits = lambda name: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    frozen = [p.name for p in config.parameters if not p.trainable or fits(p.name)]
    problems = [f"freeze: no parameter fits {pattern!r}. {nearest(pattern, names[:3])}" for pattern in unknown]
    if len(frozen) == len(names):
        problems.append("freeze: all parameters are frozen, nothing would be trained.")
    if problems:
        raise ConfigError(problems, "the recipe")
    return frozen


def config_of_stage(config: ModelConfig, stages: Sequence[Stage], index: int) -> ModelConfig:
    """The model's config in a stage: changes of the rotary embedding hold on through later stages.

    Args:
        config: with `[model]`'s own change.
    Raises:
        ConfigError: if the rows are longer than the model's window.
    """
    base = config
    for stage in stages[: index + 1]:
        config = change_rope(config, stage.rope, stage.seq_len, base)
    if problem := window_problem(config, stages[index].seq_len):
        raise ConfigError([f"seq_len = {stages[index].seq_len}: {problem}"], "the recipe")
    return config


def window_problem(config: ModelConfig, longest: int) -> str:
    """Why documents of so many tokens are not those of the model; empty if they are."""
    if config.window is None or longest <= config.window:
        return ""
    given = (
        ""
        if "sliding_window" in config.raw
        else f", the default of {config.model_type} models where config.json names none"
    )
    return (
        f"the model's sliding_window is {config.window}{given}, and a window shorter than the row is not trained. Use at most "
        f'{config.window}, or write "sliding_window": null into config.json if the model was made without one.'
    )


def export_config(config: ModelConfig, dtype: str, longest: int) -> dict[str, Any]:
    """config.json of an export: what came in, with the rotary embedding, type and length of now.

    Args:
        longest: the longest row that was trained.
    """
    raw = dict(config.raw)
    raw.setdefault("architectures", [config.family.architecture])
    raw["model_type"] = config.model_type
    raw["vocab_size"] = config.vocab_size
    for key in [key for key in ("dtype", "torch_dtype") if key in raw] or ["torch_dtype"]:
        raw[key] = dtype
    if longest > config.max_position_embeddings or "max_position_embeddings" in raw:
        raw["max_position_embeddings"] = max(longest, config.max_position_embeddings)
    before: list[str] = []
    if _parse_rope(config.raw, config.max_position_embeddings, before) != config.rope:
        rope = {"rope_type": config.rope.type, **config.rope.fields}
        new = raw.get("rope_parameters") is not None
        if new:
            raw["rope_parameters"] = {"rope_theta": config.rope.theta, **rope}
        if not new or "rope_theta" in raw:
            raw["rope_theta"] = config.rope.theta
        if not new or "rope_scaling" in raw:
            raw["rope_scaling"] = None if config.rope.type == "default" else rope
    return raw


def shape_problems(config: ModelConfig, parallel: Parallel, vocab_multiple: int) -> list[str]:
    """Why a layout cannot share this model's heads, matrices and vocabulary, with the numbers."""
    tensor = parallel.tensor
    shared = {(_counted(p), units_of(p, vocab_multiple), p.repeated): p for p in config.parameters if not p.is_whole(1)}
    fits = lambda units, repeated, ranks: units % ranks == 0 or (repeated and ranks % units == 0)
    most = min(units for _, units, repeated in shared if not repeated)
    possible = [n for n in range(1, most + 1) if all(fits(units, again, n) for _, units, again in shared)]
    problems = []
    for name, units, repeated in shared:
        if fits(units, repeated, tensor):
            continue
        problems.append(
            f"parallel.tensor = {tensor}: {name} = {units} can neither be divided by it nor repeated to it. "
            f"Use {', '.join(map(str, possible))}."
            if repeated
            else f"parallel.tensor = {tensor}: does not divide the model's {name} = {units}."
        )
    return problems


def _counted(parameter: Parameter) -> str:
    return "the padded vocabulary" if parameter.split == "vocab" else parameter.counted


def units_of(parameter: Parameter, vocab_multiple: int) -> int:
    """What tensor ranks share out of a parameter: heads, features, rows of the padded vocabulary."""
    return parameter.padded(vocab_multiple)[0] if parameter.split == "vocab" else parameter.units
