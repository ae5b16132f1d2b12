"""What a run leaves behind: recipe.toml, run.json, metrics.jsonl, events.jsonl, tb/. Only rank 0 writes."""

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

import megacpt
from megacpt import log
from megacpt.config.load import save_recipe
from megacpt.config.recipe import Recipe
from megacpt.config.run_layout import CHECKPOINTS, EVENTS, METRICS, RECIPE, STATUS, misplaced
from megacpt.errors import ConfigError, LeaseError, MegacptError, SaveError
from megacpt.files import (
    Journal,
    JsonError,
    Record,
    describe_os_error,
    read_object,
    read_records,
    remove_abandoned,
    write_atomically,
)
from megacpt.survive.lease import Lease


class RunDirectory:
    """The folder of a run. While the disk takes nothing, training goes on: rows are kept and written when it does again.

    Args:
        write: whether this rank writes; the others only know the paths.
        attempt: the name of this start.
    """

    def __init__(self, path: str | Path, write: bool, attempt: str = ""):
        self.path, self.write, self.attempt = Path(path), write, attempt
        self.lease: Lease | None = None
        self.checkpoints = self.path / CHECKPOINTS
        self.facts: dict[str, Any] = {}
        self.useful_seconds = 0.0
        """Of steps whose updates the weights hold."""
        self.journals: dict[str, Journal] = {}
        self.disk: dict[str, str] = {}
        """Files that cannot be written at present, and why; it stands in run.json where that can be."""
        self._at = (0, 0)
        """Step and tokens of the last row."""

    def make(self) -> None:
        """Makes the folder and becomes its owner.

        Raises:
            LeaseError: if another job trains in it. ConfigError: if a name in it is taken by something of another kind. OSError.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if problems := misplaced(self.path):
            raise ConfigError(problems)
        lease = Lease(self.path, self.attempt)
        lease.take()
        self.lease = lease
        remove_abandoned(self.path)

    @property
    def lost(self) -> bool:
        """Whether another job has taken the directory over."""
        return self.lease is not None and self.lease.lost

    def fence(self) -> None:
        """Raises LeaseError if another job has taken the directory over; before something is published or removed."""
        if self.lease:
            self.lease.fence()

    def close(self) -> None:
        """The next job may have it."""
        if self.lease:
            self.lease.release()

    def _writes(self) -> bool:
        return self.write and (self.lease is None or self.lease.held())

    def begin(self, recipe: Recipe, facts: dict[str, Any]) -> None:
        """Writes the resolved recipe and run.json with status running; counts the attempt."""
        if not self.write:
            return
        before = read_status(self.path)
        save_recipe(recipe, self.path / RECIPE)
        self.facts = {
            "megacpt": megacpt.__version__,
            "attempt": before.get("attempt", 0) + 1,
            "attempt_id": self.attempt,
            "first_started": before.get("first_started", time.time()),
            **facts,
        }
        self.status("running")

    def change_facts(self, **facts: Any) -> None:
        """What has become different since the start, in run.json and in the manifests."""
        if self.facts:
            self.facts |= facts
            self.status("running")

    def effective(self, seconds: float) -> float | None:
        """Effective training time with one more step: useful seconds over all since the run was first started, by the clock on the wall."""
        self.useful_seconds += seconds
        if not self.facts:
            return None
        return round(min(1.0, self.useful_seconds / max(1e-9, time.time() - self.facts["first_started"])), 4)

    def status(self, status: str, exit_code: int | None = None, **more: Any) -> None:
        """Writes run.json.

        Raises:
            SaveError: if that cannot be done for an end with exit code 0: nobody would know of it.
        """
        if not (self.facts and self._writes()):
            return
        self.flush()
        if waiting := [
            f"{len(j.waiting)} of {j.path.name}" for j in self.journals.values() if j.waiting and status != "running"
        ]:
            log.warn(f"{self.path}: lines that could not be written are lost: {', '.join(waiting)}")
        disk = {name: why for name, why in self.disk.items() if name != STATUS}
        content = {"status": status, "exit_code": exit_code, **more, **self.facts, **({"disk": disk} if disk else {})}
        try:
            write_status(self.path, content)
        except OSError as error:
            text = describe_os_error(error, self.path / STATUS)
            if exit_code == 0:
                raise SaveError(f"the run is {status}, but run.json cannot say so: {text}") from None
            if STATUS not in self.disk:
                log.warn(text)
            self.disk[STATUS] = error.strerror or str(error)
        else:
            self.disk.pop(STATUS, None)

    def flush(self) -> None:
        """Tries again to write what waits; nothing any more once another job has the directory."""
        for journal in list(self.journals.values()) if self._writes() else ():
            journal.flush()

    def _report_journal(self, journal: Journal, problem: str) -> None:
        """A file cannot be written, or can be again."""
        name = journal.path.name
        if problem:
            self.disk[name] = problem
            log.warn(f"{journal.path}: {problem}. Training goes on; lines are kept and written when that works again.")
            self.event("disk", *self._at, file=name, error=problem)
        else:
            self.disk.pop(name, None)
            lost = f"; {journal.lost} more were too many to keep" if journal.lost else ""
            log.info(f"{journal.path}: is written again, {journal.kept} lines that were kept{lost}")
            self.event("disk_again", *self._at, file=name, kept=journal.kept, lost=journal.lost)
        self.status("running")

    def record_failure(self, error: BaseException) -> None:
        if isinstance(error, LeaseError):
            return
        self.status("failed", error.exit_code if isinstance(error, MegacptError) else 1, reason=str(error)[:2000])

    def event(self, kind: str, step: int, tokens: int, **more: Any) -> None:
        if self._writes():
            self._append(EVENTS, {"time": round(time.time(), 3), "step": step, "tokens": tokens, "kind": kind, **more})

    def metrics(self, row: dict[str, Any]) -> None:
        if self._writes():
            self._at = row["step"], row.get("tokens", 0)
            self._append(METRICS, row)
            self.flush()
            if STATUS in self.disk:
                self.status("running")

    def _append(self, name: str, row: dict[str, Any]) -> None:
        self.journal(name).add((json.dumps(plain_numbers(row), ensure_ascii=False, allow_nan=False) + "\n").encode())

    def journal(self, name: str) -> Journal:
        """A file of the run to which records are added."""
        if name not in self.journals:
            self.journals[name] = Journal(self.path / name, self._report_journal)
        return self.journals[name]

    def has_rows(self) -> bool:
        """Whether a step of the run has been trained."""
        try:
            return any(_row(record) is not None for record in read_records(self.path / METRICS))
        except (OSError, JsonError):
            return False

    def cut_metrics(self, step: int) -> None:
        """Keeps the last row of each step up to `step`. A row that cannot be read is told; a last line that a kill left unfinished is
        not."""
        path = self.path / METRICS
        if self.write:
            self.journal(path.name).flush()  # a run that goes back may hold rows that are to be dropped
        if not self.write or not path.exists():
            return
        kept, damaged = {}, []
        for record in read_records(path):
            row = _row(record)
            if row is None:
                damaged.append(record.number)
            elif row["step"] <= step:
                kept[row["step"]] = record.line + b"\n"
        for line in damaged:
            log.warn(f"{path}: line {line} is damaged and was left out")
        if damaged:
            self.event("damaged_rows", step, 0, file=path.name, lines=damaged)
        write_atomically(path, b"".join(kept[number] for number in sorted(kept)))
        self.useful_seconds = useful_seconds(self.path)


def plain_numbers(value: Any) -> Any:
    """With null for inf and nan: JSON has no word for them, and readers in other languages stop at Python's."""
    if isinstance(value, dict):
        return {key: plain_numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_numbers(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def useful_seconds(directory: Path) -> float:
    """Of the steps in metrics.jsonl whose updates were made; a step that stands there twice counts once."""
    seconds: dict[int, float] = {}
    with contextlib.suppress(OSError):
        for record in read_records(directory / METRICS):
            row = _row(record)
            if row is not None and _fits("step_s", row.get("step_s")):
                seconds[row["step"]] = 0.0 if row.get("skipped") else row["step_s"]
    return math.fsum(seconds.values())


def _row(record: Record) -> dict[str, Any] | None:
    """The row of a step that a line holds, if it is one."""
    return record.row if record.row is not None and _fits("step", record.row.get("step")) else None


YEAR = 366 * 86400.0
_NUMBERS: dict[str, tuple[type | tuple, float, float]] = {
    "step": (int, 1, 2**53),
    "step_s": ((int, float), 0.0, YEAR),
    "attempt": (int, 0, 10**9),
    "first_started": ((int, float), 1.0, math.inf),
    "exit_code": (int, -255, 255),
}
_OTHERS: dict[str, type | tuple] = {
    "status": str,
    "attempt_id": str,
    "signal": (str, type(None)),
    "reason": (str, type(None)),
    "suspects": (list, type(None)),
}
"""What is read back from run.json and metrics.jsonl: the kind of each field, and the range of what counts or measures."""


def read_status(directory: Path) -> dict[str, Any]:
    """run.json, without fields that are not what they must be; nothing if there is none."""
    try:
        content = read_object(directory / STATUS)
    except (OSError, JsonError):
        return {}
    return {key: value for key, value in content.items() if _fits(key, value)}


def _fits(key: str, value: Any) -> bool:
    if key in _NUMBERS:
        kind, low, high = _NUMBERS[key]
        if key == "first_started":
            high = time.time() + 86400  # another machine's clock may be ahead
        elif key == "exit_code" and value is None:
            return True
        return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high
    return isinstance(value, _OTHERS.get(key, object))


def write_status(directory: Path, content: dict[str, Any]) -> None:
    """run.json, in one act."""
    text = json.dumps(plain_numbers({"time": time.time(), **content}), indent=1, allow_nan=False)
    write_atomically(directory / STATUS, text + "\n")
