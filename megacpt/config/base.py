"""What every section of a recipe is made of: strict frozen models, token quantities, words that stand for a value, and what a resume
may change."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import core_schema

from megacpt.config.quantity import parse_tokens

Tokens = Annotated[
    int,
    BeforeValidator(parse_tokens),
    WithJsonSchema({"type": ["integer", "string"], "pattern": "^[0-9][0-9_]*(\\.[0-9]+)? *(K|M|B|T|Ki|Mi|Gi|Ti)?$"}),
]
Positive = Annotated[float, Field(gt=0, le=1e12)]  # sums and products of a few stay finite
NotNegative = Annotated[float, Field(ge=0, le=1e12)]
ClipNorm = Annotated[float, Field(ge=1e-9, le=1e12)]  # norms over it stay within fp32
Share = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Seconds = Annotated[float, Field(gt=0, le=31_536_000)]  # a year: clocks overflow far beyond
Betas = Annotated[tuple[Beta, Beta], Field(strict=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]  # it is part of file names
PositiveInt = Annotated[int, Field(ge=1, le=2**31 - 1)]
NotNegativeInt = Annotated[int, Field(ge=0, le=2**62)]
DType = Literal["bfloat16", "float32", "float64"]


KeyPath = tuple[str | int, ...]
"""Where a key stands: ("stages", 0, "seq_len")."""

Resume = Literal["free", "unfinished stages", "later stages", "frozen"]
"""What a resume may change: anything; keys of stages that have not ended; keys of stages that have not begun; nothing."""


@dataclass(frozen=True)
class OnResume:
    """Metadata of a key that a resume treats otherwise than the rest of its section."""

    rule: Resume


@dataclass(frozen=True)
class _Word:
    """A value that a word may stand for.

    Attributes:
        kept: whether the value is the word itself; None otherwise.
    """

    word: str
    kept: ClassVar[bool]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        read = self.word if self.kept else None
        as_it_is = core_schema.plain_serializer_function_ser_schema(lambda value: value) if self.kept else None
        return core_schema.no_info_wrap_validator_function(
            lambda value, inner: read if value == self.word else inner(value), handler(source), serialization=as_it_is
        )

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> dict[str, Any]:
        schema = handler(core["schema"])
        choices = [choice for choice in schema.get("anyOf", [schema]) if choice.get("type") != "null"]
        return {"anyOf": [*choices, {"const": self.word}]}


class NoneAsWord(_Word):
    """None is written as this word: it is decided later from the world size, the device or the checkpoint."""

    kept = False


class KeptWord(_Word):
    """The word stands beside the values and is kept, because None means that the key is not given."""

    kept = True


def _usable_path(text: str) -> str:
    """Raises ValueError for what no file system takes."""
    longest = max((len(part.encode()) for part in text.split("/")), default=0)
    if not text or longest > 255 or len(text.encode()) > 4000:
        raise ValueError(
            f"is no path: it has {len(text.encode())} bytes, the longest part {longest}; file systems take 1 to 4000, and 255 in a part"
        )
    return text


FilePath = Annotated[str, AfterValidator(_usable_path)]


class Section(BaseModel):
    """Strict: no coercion. Frozen. Unknown keys are errors, and so are numbers that are none: inf and nan.

    A subclass names its heading in the reference, and what a resume may change of it; where it does not say the latter, the key that
    holds it does.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )
    heading: ClassVar[str] = ""
    resume: ClassVar[Resume | None] = None

    def __init_subclass__(cls, heading: str = "", resume: Resume | None = None, **config: Any):
        super().__init_subclass__(**config)
        cls.heading, cls.resume = heading, resume
