"""What every section of a recipe is made of: strict frozen models, token quantities, words that stand for a value."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import core_schema

from megacpt.config.quantity import parse_tokens

Tokens = Annotated[
    int,
    BeforeValidator(parse_tokens),
    WithJsonSchema({"type": ["integer", "string"], "pattern": "^[0-9][0-9_]*(\\.[0-9]+)? *(K|M|B|T|Ki|Mi|Gi|Ti)?$"}),
]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
ClipNorm = Annotated[float, Field(ge=1e-9)]  # norms over it stay within fp32
Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Seconds = Annotated[float, Field(gt=0, le=31_536_000)]  # a year: clocks overflow far beyond
Betas = Annotated[tuple[Beta, Beta], Field(strict=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Count = Annotated[int, Field(ge=1)]
DType = Literal["bfloat16", "float32", "float64"]


class OrWord:
    """A value that a word may stand for: the word is read as None."""

    def __init__(self, word: str):
        self.word = word

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return core_schema.no_info_before_validator_function(lambda v: None if v == self.word else v, handler(source))

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        schema = handler(core)
        choices = [choice for choice in schema.get("anyOf", [schema]) if choice.get("type") != "null"]
        return {"anyOf": [*choices, {"const": self.word}]}


class Section(BaseModel):
    """Strict: no coercion. Frozen. Unknown keys are errors, and so are numbers that are none: inf and nan."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )
