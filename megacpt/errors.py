"""Errors for users. Each message says what is wrong, the numbers, and the way out; the class carries the exit code."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

UNFINISHED = 3
"""Exit code of a run that was stopped on request, where its end was required."""


class MegacptError(ValueError):
    """Something the user can fix. The command line prints it without a traceback and leaves with `exit_code`."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, as data: callers filter, place and count problems; the text is made last, by `str`.

    Attributes:
        where: the key, flag or file that is concerned; empty where the text says it.
        value: what stands there; None where that is no single value.
        text: what is wrong, with the numbers, as a sentence.
        remedy: the way out, as a sentence.
    """

    where: str
    value: Any
    text: str
    remedy: str = ""

    def inside(self, place: str) -> "Problem":
        """The same of a key that stands under another."""
        return replace(self, where=f"{place}.{self.where}" if self.where else place)

    def __str__(self) -> str:
        shown = "" if self.value is None else f" = {show_value(self.value)}"
        place = f"{self.where}{shown}: " if self.where else ""
        return " ".join(part for part in (place + self.text, self.remedy) if part)


def show_value(value: Any) -> str:
    """A value as TOML and JSON write it, cut where it is long."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, int) and value.bit_length() > 256:
        return (
            f"a number of about {round(value.bit_length() * 0.30103)} digits"  # Python refuses to write far longer ones
        )
    text = f'"{value}"' if isinstance(value, str) else str(value)
    text = text if text.isprintable() else text.encode("unicode_escape").decode()
    return text if len(text) <= 200 else f"{text[:200]}… ({len(text)} characters)"


def nearest(word: str, choices: Sequence[str]) -> str:
    """'Did you mean …?' when one is near, else the list."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    listed = ", ".join(choices)
    return f"Did you mean {close[0]!r}? Possible: {listed}." if close else f"Possible: {listed}."


class ConfigError(MegacptError):
    """All problems of a recipe or of the arguments at once.

    Args:
        problems: what is wrong; a plain string is a problem that names its place itself.
        title: what was being read.
    """

    def __init__(self, problems: Sequence[Problem | str], title: str = "the recipe"):
        self.problems = [p if isinstance(p, Problem) else Problem("", None, p) for p in problems]
        count = "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"
        super().__init__("\n".join([f"{count} in {title}:", *(f"  {problem}" for problem in self.problems)]))
        self.title = title

    def __reduce__(self):
        return ConfigError, (self.problems, self.title)  # crosses process borders


class DataError(MegacptError):
    """Prepared data, or text to be prepared, is damaged or is not what it claims to be."""

    exit_code = 76


class CheckpointError(MegacptError):
    """A checkpoint or a model directory is damaged, incomplete or of another kind."""

    exit_code = 76


class GateError(MegacptError):
    """A stage ended without passing its gates, and its recipe says stop. The state is saved; a resume asks them again.

    Args:
        complaints: one line for each thing that is not as it must be.
    """

    def __init__(self, stage: str, step: int, complaints: list[str]):
        super().__init__(
            f"stage {stage} did not pass its gates at step {step} (saved):\n  "
            + "\n  ".join(complaints)
            + "\nMake the stage longer (its tokens), or change its on_fail or the gates, and start again: it resumes here."
        )


class SaveError(MegacptError):
    """A checkpoint, or another file, could not be written where the run cannot go on without it. Started again, it resumes from the
    last checkpoint."""

    exit_code = 75


class LeaseError(MegacptError):
    """A run directory belongs to another job. It may be free later."""

    exit_code = 75


class ReplicaError(MegacptError):
    """Ranks that must hold the same weights do not: memory or arithmetic of one of them is wrong. The last checkpoint is from before.

    Args:
        problems: one line for each tensor, with the ranks.
    """

    exit_code = 75

    def __init__(self, step: int, problems: list[str]):
        self.step, self.problems = step, problems
        more = f"\n  … {len(problems) - 20} more" if len(problems) > 20 else ""
        super().__init__(
            f"weights differ after step {step} between ranks that must hold the same:\n  "
            + "\n  ".join(problems[:20])
            + more
            + "\nNothing of it was saved. Take the node out and start again: the run resumes from its last checkpoint."
        )


class NumbersError(MegacptError):
    """Losses or gradients stay bad and going back no longer helps, or weights are not finite and are not given out."""
