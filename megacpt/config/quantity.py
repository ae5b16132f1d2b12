"""Token quantities: integers, or strings in which K M B T are powers of ten and Ki Mi Gi Ti powers of two."""

import re
from decimal import Decimal, InvalidOperation

from megacpt.errors import show_value

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
MOST_TOKENS = 10**18
"""All tokens of a run can be counted in 64 bits."""
_PATTERN = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?)\s*([A-Za-z]*)")


def parse_tokens(value: int | str) -> int:
    """'4Mi' -> 4194304, '2.5B' -> 2500000000, 8192 -> 8192.

    Raises:
        ValueError: for anything that is not a whole, non-negative number of tokens, at most `MOST_TOKENS`.
    """
    tokens = _whole_tokens(value)
    if tokens > MOST_TOKENS:
        raise ValueError(f"{show_value(value)} is more than {MOST_TOKENS:.0e} tokens, the most that can be counted.")
    return tokens


def _whole_tokens(value: int | str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(
            f"{show_value(value)} is not a token quantity. Write an integer or a string such as '500M' or '4Mi'."
        )
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"{show_value(value)} tokens: must not be negative.")
        return value
    match = _PATTERN.fullmatch(value.strip())
    if match is None or match.group(2) not in _UNITS:
        raise ValueError(
            f"{show_value(value)} is not a token quantity. Write digits and one of K M B T (powers of ten) or Ki Mi Gi Ti "
            "(powers of two), for example '500M' or '4Mi'."
        )
    try:
        tokens = Decimal(match.group(1).replace("_", "")) * _UNITS[match.group(2)]
    except InvalidOperation as error:
        raise ValueError(f"{show_value(value)} is not a number.") from error
    if tokens < MOST_TOKENS and tokens != int(tokens):
        raise ValueError(f"{show_value(value)} is {tokens} tokens, not a whole number.")
    return int(min(tokens, 2 * MOST_TOKENS))


def show_tokens(tokens: int) -> str:
    """The shortest exact form: 2000000 -> '2M', 4194304 -> '4Mi', 8192 -> '8Ki', 4097 -> '4097'."""
    for unit in ("T", "Ti", "B", "Gi", "M", "Mi", "K", "Ki"):
        size = _UNITS[unit]
        if tokens and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)
