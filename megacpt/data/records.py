"""A record of a jsonl or parquet file becomes a document: its text, the weight of each part of it, its label and its item.

    {"text": "…"}                                                                    --text-field: every token has weight 1
    {"prompt": "…", "completion": "…"}                                               --prompt-field, --completion-field: 0, then 1
    {"segments": [{"text": "…", "weight": 0}, {"text": "…", "weight": 1}, …]}        --segments-field: as it says

A document's text is that of its parts one behind the other, with nothing between them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1e6
"""Of a part that has any: what lies outside is a mistake, and their sums stay exact enough in float64."""


@dataclass(frozen=True)
class Fields:
    """Which fields of a record are read. The text is either one field, a prompt and a completion, or a list of segments.

    Attributes:
        label: a string that is kept for each document. item: a string or an integer; documents that follow one another with the same
            value are one item, one without a value (null) is an item of its own.
    """

    text: str = "text"
    label: str | None = None
    segments: str | None = None
    prompt: str | None = None
    completion: str | None = None
    item: str | None = None

    @property
    def of_text(self) -> tuple[str, ...]:
        if self.segments is not None:
            return (self.segments,)
        if self.prompt is not None and self.completion is not None:
            return self.prompt, self.completion
        return (self.text,)

    @property
    def flags(self) -> dict[str, str]:
        """The command-line flag of each field that is read."""
        given = {
            "--text-field": self.text if self.of_text == (self.text,) else None,
            "--segments-field": self.segments,
            "--prompt-field": self.prompt,
            "--completion-field": self.completion,
            "--domain-field": self.label,
            "--item-field": self.item,
        }
        return {name: flag for flag, name in given.items() if name is not None}


class Part(NamedTuple):
    """Characters of a document up to `end`, from where the part before ends."""

    end: int
    weight: float


@dataclass(frozen=True, slots=True)
class Document:
    """Attributes:
    parts: () where every token has weight 1. label: "" without. item: None where the document is one of its own.
    """

    text: str
    parts: tuple[Part, ...] = ()
    label: str = ""
    item: str | int | None = None


@dataclass(frozen=True)
class BadLine:
    """A record that could not be read. `line` is counted from the piece's begin, 1-based; rows of a parquet file too."""

    path: str
    line: int
    reason: str


class Unreadable(ValueError):
    """What is wrong with a record."""


def read_record(record: Mapping[str, Any], fields: Fields, path: str, line: int) -> Document | BadLine:
    """The document of a record that has all the fields; a document without text is none."""
    try:
        label = "" if fields.label is None else _text(record[fields.label], f"field {fields.label!r}")
        item = None if fields.item is None else _item(record[fields.item], fields.item)
        if fields.segments is not None:
            return _of_segments(record[fields.segments], fields.segments, label, item)
        texts = [_text(record[name], f"field {name!r}") for name in fields.of_text]
    except Unreadable as error:
        return BadLine(path, line, str(error))
    if len(texts) == 1:
        return Document(texts[0], (), label, item)
    prompt, completion = texts
    if not completion:  # nothing to learn
        return Document("", (), label, item)
    return Document(prompt + completion, _joined([prompt, completion], [0.0, 1.0]), label, item)


def _of_segments(segments: Any, field: str, label: str, item: str | int | None) -> Document:
    if isinstance(segments, UnicodeDecodeError):
        _text(segments, f"field {field!r}")
    if not isinstance(segments, Sequence) or isinstance(segments, str):
        raise Unreadable(f"field {field!r} is a {type(segments).__name__}, not a list of segments")
    texts, weights = [], []
    for number, segment in enumerate(segments):
        where = f"field {field!r}, segment {number}"
        if not isinstance(segment, Mapping) or set(segment) != {"text", "weight"}:
            found = f"has the keys {', '.join(map(repr, segment))}" if isinstance(segment, Mapping) else "is no object"
            raise Unreadable(f'{where} {found}; it must be {{"text": …, "weight": …}}')
        texts.append(_text(segment["text"], f"{where}: text"))
        weights.append(_weight(segment["weight"], where))
    return Document("".join(texts), _joined(texts, weights), label, item)


def _joined(texts: Sequence[str], weights: Sequence[float]) -> tuple[Part, ...]:
    """The parts; () where all weigh 1. An empty one has no characters, but the last of all says what the end of text weighs."""
    if all(weight == 1 for weight in weights):
        return ()
    parts, end = [], 0
    for text, weight in zip(texts, weights, strict=True):
        end += len(text)
        parts.append(Part(end, weight))
    return tuple(parts)


def _weight(value: Any, where: str) -> float:
    """true and false are 1 and 0."""
    if not isinstance(value, int | float):
        raise Unreadable(f"{where}: weight is a {type(value).__name__}, not a number")
    if value != 0 and not LEAST_WEIGHT <= value <= MOST_WEIGHT:
        wrong = "is not finite" if isinstance(value, float) and not math.isfinite(value) else "is out of range"
        raise Unreadable(f"{where}: weight {value} {wrong}; 0, or from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}")
    return float(value)


def _item(value: Any, field: str) -> str | int | None:
    if isinstance(value, str | UnicodeDecodeError):
        return _text(value, f"field {field!r}")
    if isinstance(value, bool) or not isinstance(value, int | None):
        raise Unreadable(f"field {field!r} is a {type(value).__name__}, not a string, an integer or null")
    return value


def _text(value: Any, where: str) -> str:
    if isinstance(value, UnicodeDecodeError):
        raise Unreadable(f"{where}: invalid UTF-8: {value.reason} at byte {value.start}")
    if not isinstance(value, str):
        raise Unreadable(f"{where} is a {type(value).__name__}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON may spell half a surrogate pair
        raise Unreadable(f"invalid Unicode: {error.reason} at character {error.start}") from None
    return value
