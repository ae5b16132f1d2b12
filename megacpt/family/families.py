"""The families that are trained, by `model_type`."""

from typing import Any

from megacpt.errors import ConfigError, Problem, nearest, show_value
from megacpt.family.base import Family
from megacpt.family.llama import LLAMA
from megacpt.family.mistral import MISTRAL
from megacpt.family.phi3 import PHI3
from megacpt.family.qwen2 import QWEN2
from megacpt.family.qwen3 import QWEN3

FAMILIES = {family.model_type: family for family in (LLAMA, QWEN2, QWEN3, MISTRAL, PHI3)}
_REFUSED = {
    "a mixture of experts": (
        "mixtral",
        "phimoe",
        "qwen2_moe",
        "qwen3_moe",
        "qwen3_next",
        "deepseek_v2",
        "deepseek_v3",
        "gpt_oss",
        "llama4",
        "llama4_text",
    ),
    "layers with windows of their own": ("ministral", "ministral3", "gemma2", "gemma3", "gemma3_text", "cohere2"),
    "norms and activations of its own": ("gemma",),
}
"""Relatives that people try, by what they have and this trainer has not."""


def family_of(raw: dict[str, Any], source: str) -> Family:
    """The family that a config.json names; Llama where it names none.

    Raises:
        ConfigError: if it is none of those that are trained.
    """
    name = raw.get("model_type", "llama")
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    what = next((what for what, names in _REFUSED.items() if name in names), None)
    advice = f"It has {what}. Trained are {', '.join(FAMILIES)}." if what else nearest(str(name), list(FAMILIES))
    raise ConfigError([Problem("model_type", None, f"{show_value(name)} is not trained here.", advice)], source)
