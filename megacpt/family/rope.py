"""The rotary embedding of a model, as config.json says it."""

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RopeConfig:
    """Base and scaling of the rotary embedding; `fields` are those of the type, as in transformers."""

    theta: float = 10000.0
    type: str = "default"
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def longest(self) -> int | None:
        """The context length that the scaling is made for, None if it names none."""
        original = self.fields.get("original_max_position_embeddings")
        return math.floor(original * self.fields["factor"]) if original else None
