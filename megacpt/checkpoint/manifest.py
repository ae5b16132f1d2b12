"""A checkpoint is a folder step-00000100 with manifest.json written last: the size of every file, the CRC32 of every stored item, so that
a rank checks just what it reads, and the few numbers that are the state of a run. Imports no torch."""

import json
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from megacpt.config.decisions import Decisions, StoredDecisions
from megacpt.config.run_layout import CHECKPOINTS
from megacpt.config.timeline import Kind, Position
from megacpt.data.manifest import crc32_of
from megacpt.errors import CheckpointError
from megacpt.files import JsonError, read_object, sealed, write_atomically
from megacpt.files import crc_of as _crc

MANIFEST = "manifest.json"
FORMAT = 2
MOST_BYTES = 1 << 32
"""Of a manifest: a thousand items for each of sixteen thousand ranks take a quarter of it."""
_NAME = re.compile(r"step-([0-9]{8,12})")

Items = dict[str, list[tuple[int, int, int]]]
"""By file: (offset, bytes, CRC32) of each item in it."""


@dataclass(frozen=True)
class RunState:
    """All that a run is besides its tensors; everything else follows from the plan.

    Attributes:
        step: the last one trained. tokens: consumed up to it. stage: its name.
        num_updates: of the optimizer, skipped ones left out.
        done: kind of the last event of the timeline that is done; None: nothing is.
    """

    step: int
    tokens: int
    num_updates: int
    stage: str
    decisions: StoredDecisions = field(default_factory=Decisions)
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Content of each domain's data."""
    accepted: list[tuple[float, float]] = field(default_factory=list)
    """Loss and gradient norm of the steps that a spike is measured by."""
    skipped_in_row: int = 0
    missed: dict[str, int] = field(default_factory=dict)
    """By name of each parameter that was ever frozen: how many of the updates passed it by."""
    done: Kind | None = None

    @property
    def position(self) -> Position:
        """Where the run stands in its timeline."""
        return Position(self.step, self.done)

    def __post_init__(self) -> None:
        if not all(0 <= count <= self.num_updates for count in self.missed.values()):
            raise ValueError(f"missed = {self.missed}: counts from 0 to num_updates = {self.num_updates}")


@dataclass(frozen=True)
class Manifest:
    state: RunState
    facts: dict[str, Any]
    files: dict[str, int]
    """Bytes by name."""
    items: Items


_MANIFEST = TypeAdapter(Manifest)


def directory_name(step: int) -> str:
    return f"step-{step:08d}"


def list_steps(checkpoints: Path) -> list[int]:
    """Steps with a folder, oldest first; whether they are sound is another question. A name that `directory_name` does not give is none."""
    if not checkpoints.is_dir():
        return []
    found = ((int(match.group(1)), path) for path in checkpoints.iterdir() if (match := _NAME.fullmatch(path.name)))
    return sorted(step for step, path in found if path.name == directory_name(step) and path.is_dir())


def write_manifest(directory: Path, state: RunState, facts: dict[str, Any], items: Items) -> None:
    """Sizes of all files there and the items of the shards; of other files their CRC32. Fsynced, by one rename.

    Args:
        items: what the ranks wrote and read back.
        facts: layout, versions and the like, for people.
    """
    files = {path.name: path.stat().st_size for path in sorted(directory.iterdir()) if path.name != MANIFEST}
    for name in files.keys() - items.keys():
        items = items | {name: [(0, files[name], crc32_of(directory / name))]}
    _write(directory, Manifest(state, facts, files, items))


def rewrite_state(directory: Path, state: RunState) -> None:
    """Another state for the same tensors: a checkpoint to which a run goes back knows what is skipped from there on."""
    manifest = read_manifest(directory)
    _write(directory, Manifest(state, manifest.facts, manifest.files, manifest.items))


def _write(directory: Path, manifest: Manifest) -> None:
    write_atomically(directory / MANIFEST, sealed({"format": FORMAT, **_MANIFEST.dump_python(manifest, mode="json")}))


def read_manifest(directory: Path) -> Manifest:
    """The manifest, with its own checksum and the sizes of all files compared.

    Raises:
        CheckpointError: with the first thing that is wrong.
    """
    path = directory / MANIFEST
    try:
        content = read_object(path, MOST_BYTES)
        if content["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {content['format']!r}; this version reads {FORMAT}.")
        crc = content.pop("crc32")
        if crc != _crc(content):
            raise CheckpointError(f"{path}: its CRC32 is {_crc(content)}, it says {crc!r}: the file is damaged.")
        del content["format"]
        manifest = _MANIFEST.validate_json(json.dumps(content), strict=True)
        if manifest.state.done is None:
            manifest = replace(manifest, state=replace(manifest.state, done=_done_of_early_version(manifest.state)))
        for name, size in manifest.files.items():
            file = directory / name
            if not _is_plain(name) or not file.is_file() or file.is_symlink():
                raise CheckpointError(f"{file}: is missing or no plain file of this folder, but {MANIFEST} lists it.")
            if file.stat().st_size != size:
                raise CheckpointError(f"{file}: has {file.stat().st_size:,} bytes, {MANIFEST} says {size:,}.")
        if manifest.items.keys() - manifest.files.keys():
            raise CheckpointError(f"{path}: has items of files that it does not list.")
        return manifest
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing: the save was not finished.") from None
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a manifest ({_describe(error)}).") from None


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, JsonError | OSError) else f"{type(error).__name__}: {error}"


def _done_of_early_version(state: RunState) -> Kind:
    """The last event that is done, which checkpoints of early versions do not say: their decisions do."""
    if not state.step:
        return "validate"
    if state.decisions.settled(state.stage, state.step):
        return "gates"
    return "average" if state.decisions.averaged(state.stage, state.step) else "save"


def _is_plain(name: str) -> bool:
    return bool(name) and name not in (".", "..") and not set(name) & {"/", "\\", "\0"}


def verify(directory: Path) -> RunState:
    """The state of a checkpoint of which every item has its checksum.

    Raises:
        CheckpointError: with the first file that differs.
    """
    manifest = read_manifest(directory)
    check_items(directory, manifest.items)
    return manifest.state


def check_items(directory: Path, items: Items) -> None:
    """Reads items and compares their checksums.

    Raises:
        CheckpointError: naming the file and where it is damaged, or why it cannot be read.
    """
    for name, rows in items.items():
        try:
            with open(directory / name, "rb") as file:
                for row in rows:
                    read_item(file, directory / name, *row)
        except OSError as error:
            raise CheckpointError(f"{directory / name}: cannot be read: {error.strerror or error}.") from None


def read_item(file, path: Path, offset: int, size: int, crc: int) -> bytes:
    """The bytes of an item, whose checksum is compared.

    Raises:
        CheckpointError: if it is damaged.
    """
    file.seek(offset)
    content = file.read(size)
    found = zlib.crc32(content)
    if len(content) != size or found != crc:
        raise CheckpointError(
            f"{path}: CRC32 of bytes {offset:,} to {offset + size:,} is {found:08x}, {MANIFEST} says {crc:08x}: it is damaged."
        )
    return content


def decisions_of_run(run_directory: Path) -> Decisions:
    """What a run has decided up to its newest checkpoint; none without one."""
    try:
        found = latest_intact_checkpoint(run_directory / CHECKPOINTS)
    except CheckpointError:
        return Decisions()
    return found.state.decisions if found else Decisions()


@dataclass(frozen=True)
class IntactCheckpoint:
    """Attributes: complaints: what is wrong with newer ones."""

    directory: Path
    state: RunState
    complaints: tuple[str, ...]


def latest_intact_checkpoint(checkpoints: Path, bad: Iterable[int] = ()) -> IntactCheckpoint | None:
    """The newest checkpoint that is whole; None without any. Sizes and the small files are compared; the shards by who reads them.

    Args:
        bad: steps that were found damaged when they were read.
    Raises:
        CheckpointError: if there are checkpoints, and none is whole.
    """
    complaints: list[str] = []
    for step in reversed(list_steps(checkpoints)):
        directory = checkpoints / directory_name(step)
        try:
            if step in bad:
                raise CheckpointError(f"{directory}: was damaged when it was read.")
            manifest = read_manifest(directory)
            small = {name: rows for name, rows in manifest.items.items() if not name.endswith(".distcp")}
            check_items(directory, small)
            return IntactCheckpoint(directory, manifest.state, tuple(complaints))
        except CheckpointError as error:
            complaints.append(str(error))
    if complaints:
        raise CheckpointError(
            f"{checkpoints}: no checkpoint is intact:\n  "
            + "\n  ".join(complaints)
            + "\nRestore one from a copy, or start anew in another run directory."
        )
    return None
