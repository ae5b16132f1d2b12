"""What a run leaves behind: recipe.toml, run.json, metrics.jsonl, events.jsonl, tb/. Only rank 0 writes."""

import json
import math
import time
from pathlib import Path
from typing import Any

import megacpt
from megacpt import log
from megacpt.config.load import save_recipe
from megacpt.config.recipe import Recipe
from megacpt.errors import ConfigError, LeaseError, MegacptError, SaveError
from megacpt.files import Journal, disk_told, remove_abandoned, write_atomically
from megacpt.survive.lease import Lease

SNAPSHOTS = "snapshots"
"""Folder of a run with the weights that averages are made of."""


class RunDirectory:
    """The folder of a run. While the disk takes nothing, training goes on: rows are kept and written when it does again.

    Args:
        write: whether this rank writes; the others only know the paths.
        attempt: the name of this start.
    """

    def __init__(self, path: str | Path, write: bool, attempt: str = ""):
        self.path, self.write, self.attempt = Path(path), write, attempt
        self.lease: Lease | None = None
        self.checkpoints = self.path / "checkpoints"
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
            LeaseError: if another job trains in it. ConfigError: if a folder lies where a file belongs. OSError.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        files = ("recipe.toml", "run.json", "metrics.jsonl", "events.jsonl", "ledger.jsonl")
        if folders := [name for name in files if (self.path / name).is_dir()]:
            raise ConfigError(
                [f"{self.path / name}: a folder lies where a file belongs. Move it away." for name in folders]
            )
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
        save_recipe(recipe, self.path / "recipe.toml")
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
        disk = {name: why for name, why in self.disk.items() if name != "run.json"}
        content = {"status": status, "exit_code": exit_code, **more, **self.facts, **({"disk": disk} if disk else {})}
        try:
            write_status(self.path, content)
        except OSError as error:
            told = disk_told(error, self.path / "run.json")
            if exit_code == 0:
                raise SaveError(f"the run is {status}, but run.json cannot say so: {told}") from None
            if "run.json" not in self.disk:
                log.warn(told)
            self.disk["run.json"] = error.strerror or str(error)
        else:
            self.disk.pop("run.json", None)

    def flush(self) -> None:
        """Tries again to write what waits; nothing any more once another job has the directory."""
        for journal in list(self.journals.values()) if self._writes() else ():
            journal.flush()

    def _told(self, journal: Journal, problem: str) -> None:
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

    def failed(self, error: BaseException) -> None:
        if isinstance(error, LeaseError):
            return
        self.status("failed", error.exit_code if isinstance(error, MegacptError) else 1, reason=str(error)[:2000])

    def event(self, kind: str, step: int, tokens: int, **more: Any) -> None:
        if self._writes():
            self._append(
                "events.jsonl", {"time": round(time.time(), 3), "step": step, "tokens": tokens, "kind": kind, **more}
            )

    def metrics(self, row: dict[str, Any]) -> None:
        if self._writes():
            self._at = row["step"], row.get("tokens", 0)
            self._append("metrics.jsonl", row)
            self.flush()
            if "run.json" in self.disk:
                self.status("running")

    def _append(self, name: str, row: dict[str, Any]) -> None:
        self.journal(name).add((json.dumps(plain_numbers(row), ensure_ascii=False, allow_nan=False) + "\n").encode())

    def journal(self, name: str) -> Journal:
        """A file of the run to which records are added."""
        if name not in self.journals:
            self.journals[name] = Journal(self.path / name, self._told)
        return self.journals[name]

    def has_rows(self) -> bool:
        """Whether a step of the run has been trained."""
        return bool(_rows(self.path / "metrics.jsonl")[0])

    def cut_metrics(self, step: int) -> None:
        """Keeps the last row of each step up to `step`. A row that cannot be read is told; a last line that a kill left unfinished is
        not."""
        path = self.path / "metrics.jsonl"
        if self.write:
            self.journal(path.name).flush()  # a run that goes back may hold rows that are to be dropped
        if not self.write or not path.exists():
            return
        rows, damaged = _rows(path)
        for line in damaged:
            log.warn(f"{path}: line {line} is damaged and was left out")
        if damaged:
            self.event("damaged_rows", step, 0, file=path.name, lines=damaged)
        kept = {row["step"]: line + "\n" for row, line in rows if row["step"] <= step}
        write_atomically(path, "".join(kept[number] for number in sorted(kept)))
        self.useful_seconds = useful_seconds(self.path)


def plain_numbers(value: Any) -> Any:
    """With null for inf and nan: JSON has no word for them, and readers in other languages stop at Python's."""
    if isinstance(value, dict):
        return {key: plain_numbers(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_numbers(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rows(path: Path) -> tuple[list[tuple[dict[str, Any], str]], list[int]]:
    """([(row, line)], numbers of damaged lines) of metrics.jsonl. What a kill left unfinished at the end is neither."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError:
        return [], []
    found, damaged = [], []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line.decode())
            whole = isinstance(row, dict) and _is_number(row.get("step"), int)
        except (ValueError, RecursionError):
            whole = False
        if whole:
            found.append((row, line.decode()))
        elif line and number < len(lines):
            damaged.append(number)
    return found, damaged


def _is_number(value: Any, kind: type | tuple = (int, float)) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and abs(value) < 1e300


def useful_seconds(directory: Path) -> float:
    """Of the steps in metrics.jsonl whose updates were made; a step that stands there twice counts once."""
    rows = {row["step"]: row for row, _ in _rows(directory / "metrics.jsonl")[0] if _is_number(row.get("step_s"))}
    return sum(row["step_s"] for row in rows.values() if not row.get("skipped"))


_KINDS: dict[str, type | tuple] = {
    "status": str,
    "attempt": int,
    "attempt_id": str,
    "first_started": (int, float),
    "exit_code": (int, type(None)),
    "signal": (str, type(None)),
    "reason": (str, type(None)),
    "suspects": (list, type(None)),
}
"""Of what is read back from run.json."""


def read_status(directory: Path) -> dict[str, Any]:
    """run.json, without fields that are not what they must be; nothing if there is none."""
    try:
        content = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {key: value for key, value in content.items() if _fits(key, value)} if isinstance(content, dict) else {}


def _fits(key: str, value: Any) -> bool:
    kind = _KINDS.get(key, object)
    return isinstance(value, kind) and (kind is object or not isinstance(value, int | float) or _is_number(value))


def write_status(directory: Path, content: dict[str, Any]) -> None:
    """run.json, in one act."""
    text = json.dumps(plain_numbers({"time": time.time(), **content}), indent=1, allow_nan=False)
    write_atomically(directory / "run.json", text + "\n")
