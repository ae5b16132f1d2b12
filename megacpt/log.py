"""Plain lines to stderr from rank 0, so that stdout stays free for results. A console that has gone, as when its terminal was closed or the
reader of a pipe has left, ends nothing: what would be printed there is lost, and `lost` says why."""

import os
import sys
import time

lost: str | None = None
"""Why nothing is printed any more."""


def is_rank0() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def info(message: str) -> None:
    """One line, with the time, from rank 0 only."""
    if is_rank0():
        say(f"[{time.strftime('%H:%M:%S')}] {printable(message)}")


def say(line: str) -> None:
    """To stderr, if anybody still reads it."""
    global lost
    try:
        print(line, file=sys.stderr, flush=True)
    except (OSError, ValueError) as error:  # EPIPE, EIO of a closed terminal, a closed file
        lost = lost or str(error)
        _to_nowhere()


def _to_nowhere() -> None:
    """From now on stderr is /dev/null: what was not written would fail again at the interpreter's end, and change its exit code."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, sys.stderr.fileno())
    except (OSError, ValueError):
        sys.stderr = open(os.devnull, "w")
    finally:
        os.close(nowhere)


def printable(text: str) -> str:
    """Without what could command a terminal: names in files and recipes are other people's text."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def warn(message: str) -> None:
    info(f"warning: {message}")


def duration(seconds: float) -> str:
    """3725 -> '1h02m', 65 -> '1m05s', 9.3 -> '9s'."""
    seconds = int(max(0, seconds))
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


def short_number(value: float) -> str:
    """1234567 -> '1.23M'; for people, not for files."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.4g}"
