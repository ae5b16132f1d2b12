"""A checkpoint is a folder step-00000100 with manifest.json written last: sizes and CRC32 of every file, and the few
numbers that are the state of a run. Imports no torch."""

import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megacpt.data.manifest import crc32_of
from megacpt.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class State:
    """All that a run is besides its tensors; everything else follows from the recipe."""

    step: int
    tokens: int
    num_updates: int
    stage: str
    decisions: list[dict[str, Any]] = field(default_factory=list)
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Content of each domain's data."""


def directory_name(step: int) -> str:
    return f"step-{step:08d}"


def list_steps(checkpoints: Path) -> list[int]:
    """Steps with a folder, oldest first; whether they are sound is another question."""
    if not checkpoints.is_dir():
        return []
    return sorted(int(m.group(1)) for p in checkpoints.iterdir() if (m := _NAME.fullmatch(p.name)) and p.is_dir())


def write_manifest(directory: Path, state: State, facts: dict[str, Any]) -> None:
    """Sizes and checksums of all files there, fsynced, the manifest last.

    Args:
        facts: layout, versions and the like, for people.
    """
    files = {}
    for path in sorted(directory.iterdir()):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        files[path.name] = {"bytes": path.stat().st_size, "crc32": crc32_of(path)}
    with open(directory / MANIFEST, "w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, "state": asdict(state), "facts": facts, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(directory)


def sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def verify(directory: Path) -> State:
    """The state of a checkpoint whose every file has the size and checksum of its manifest.

    Raises:
        CheckpointError: with the first file that differs.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{path}: format {manifest['format']}; this version reads {FORMAT}.")
        for name, expected in manifest["files"].items():
            file = directory / name
            if Path(name).name != name or not file.is_file() or file.is_symlink():
                raise CheckpointError(f"{file}: is missing or no plain file of this folder, but {MANIFEST} lists it.")
            if file.stat().st_size != expected["bytes"]:
                raise CheckpointError(
                    f"{file}: has {file.stat().st_size:,} bytes, {MANIFEST} says {expected['bytes']:,}."
                )
            if (crc := crc32_of(file)) != expected["crc32"]:
                raise CheckpointError(
                    f"{file}: CRC32 is {crc:08x}, {MANIFEST} says {expected['crc32']:08x}: it is damaged."
                )
        return State(**manifest["state"])
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is missing: the save was not finished.") from None
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a manifest ({type(error).__name__}: {error}).") from None


def decisions_of_run(run_directory: Path) -> list[dict[str, Any]]:
    """What a run has decided up to its newest checkpoint; none without one. Reads the manifest only."""
    for step in reversed(list_steps(run_directory / "checkpoints")):
        try:
            manifest = json.loads(
                (run_directory / "checkpoints" / directory_name(step) / MANIFEST).read_text(encoding="utf-8")
            )
            return list(manifest["state"]["decisions"])
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError):
            continue
    return []


def newest_sound(checkpoints: Path) -> tuple[Path, State, list[str]] | None:
    """(folder, state, what was wrong with newer ones) of the newest checkpoint that verifies; None without any."""
    complaints = []
    for step in reversed(list_steps(checkpoints)):
        directory = checkpoints / directory_name(step)
        try:
            return directory, verify(directory), complaints
        except CheckpointError as error:
            complaints.append(str(error))
    if complaints:
        raise CheckpointError(
            f"{checkpoints}: no checkpoint is sound:\n  "
            + "\n  ".join(complaints)
            + "\nRestore one from a copy, or start anew in another run directory."
        )
    return None
