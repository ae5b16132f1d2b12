"""Values of a config.json, whatever the family: which can be computed with. JSON as Python reads it knows NaN and Infinity."""

import math
from collections.abc import Mapping
from typing import Any, cast

from megacpt.errors import Problem

_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
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
_BETWEEN = {"rms_norm_eps": (1e-30, 1.0), "initializer_range": (1e-30, 1e3)}
_TYPES = {"tie_word_embeddings": (bool, "true or false"), "dtype": (str, "a string"), "torch_dtype": (str, "a string")}


def value_problems(raw: Mapping[str, Any]) -> list[Problem]:
    """What is wrong with the values of keys that all families have, and every number that is not finite, wherever it stands. The rotary
    embedding's are looked at where they are read."""
    problems = [Problem(key, None, "is required, a positive integer.") for key in _REQUIRED if raw.get(key) is None]
    for key, value in raw.items():
        if key in ("rope_theta", "rope_scaling", "rope_parameters"):
            continue
        if not_finite := _not_finite(key, value):
            problems += not_finite
        elif value is None and key not in _BETWEEN:  # transformers takes null for absent, but not of these
            continue
        elif most := _WHOLE.get(key):
            if type(value) is not int or not 1 <= value <= most:
                problems.append(Problem(key, value, f"must be a positive integer, at most {most}."))
        elif key in _BETWEEN:
            low, high = _BETWEEN[key]
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                problems.append(Problem(key, value, f"must be a number from {low:g} to {high:g}."))
        elif key in _TYPES:
            kind, name = _TYPES[key]
            if not isinstance(value, kind):
                problems.append(Problem(key, value, f"must be {name}."))
        elif key == "eos_token_id":
            tokens = cast(list[Any], value) if isinstance(value, list) else [value]
            if not tokens or any(type(token) is not int or token < 0 for token in tokens):
                problems.append(Problem(key, value, "must be a token's id, or a list of at least one."))
    return problems


def _not_finite(where: str, value: Any) -> list[Problem]:
    if isinstance(value, float) and not math.isfinite(value):
        return [Problem(where, value, "must be a finite number.")]
    inside = dict(enumerate(cast(list[Any], value))) if isinstance(value, list) else value
    if not isinstance(inside, dict):
        return []
    return [
        problem for key, item in cast(dict[Any, Any], inside).items() for problem in _not_finite(f"{where}.{key}", item)
    ]
