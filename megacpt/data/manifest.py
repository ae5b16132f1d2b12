"""PREFIX.json: what prepared data is. Written last, so data without it is unfinished. Needs nothing but JSON."""

import glob
import os
import re
import resource
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megacpt.errors import DataError
from megacpt.files import read_object

FORMAT = 1
BESIDE = ("weights", "items")
"""What a set may have beside its tokens and documents (data/beside.py)."""
KINDS = ("bin", "idx", "labels", *BESIDE)
"""Every file of a set but its manifest."""
OTHER_FILES = 128
"""Kept free for what a process opens beside its data: libraries, sockets, logs, indices, a checkpoint."""


def read_manifest(prefix: str) -> dict[str, Any]:
    """The manifest of prepared data, with the sizes of the files compared.

    Raises:
        DataError: if it is missing, not ours, or the files beside it have other sizes.
    """
    path = Path(prefix + ".json")
    if not path.is_file():
        beside = os.path.exists(prefix + ".idx")
        raise DataError(
            f"{path}: no manifest. "
            + (
                f"For data from Megatron: megacpt prepare --adopt {prefix} --tokenizer DIR."
                if beside
                else "Nothing prepared there: megacpt prepare INPUT --tokenizer DIR --output " + prefix
            )
        )
    try:
        manifest = read_object(path, 1 << 30)
        if manifest["format"] != FORMAT:
            raise DataError(f"{path}: format {manifest['format']}; this version reads {FORMAT}.")
        for kind in ("bin", "idx", *BESIDE):
            file = f"{prefix}.{kind}"
            actual = os.path.getsize(file) if os.path.isfile(file) else None
            if kind in BESIDE and kind not in manifest:
                if actual is not None:
                    raise DataError(
                        f"{file}: is not named in {path}, so it is another set's. Remove it, or copy its manifest."
                    )
                continue
            expected = manifest[kind]["bytes"]
            if type(expected) is not int:
                raise TypeError(f"{kind}.bytes is {expected!r}")
            if actual != expected:
                state = "is missing" if actual is None else f"has {actual:,} bytes"
                raise DataError(f"{file}: {state}, but its manifest says {expected:,} bytes. Copy or prepare it again.")
        for key in ("documents", "tokens", "vocab_size", "eos_token_id"):
            if not isinstance(manifest[key], int | None):
                raise TypeError(f"{key} is {manifest[key]!r}")
        for kind in KINDS:
            if (kind in ("bin", "idx") or kind in manifest) and type(manifest[kind]["crc32"]) is not int:
                raise TypeError(f"{kind}.crc32 is {manifest[kind]['crc32']!r}")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a manifest of prepared data ({type(error).__name__}: {error}).") from None
    return manifest


def item_problems(prefixes: Sequence[str], seq_lens: Sequence[int]) -> list[str]:
    """What is known before packing of items that no row takes, and of sets that do not go together.

    Args:
        seq_lens: of the rows that are meant for these sets.
    """
    manifests = [read_manifest(prefix) for prefix in prefixes]
    grouped = [prefix for prefix, manifest in zip(prefixes, manifests, strict=True) if "items" in manifest]
    if grouped and len(grouped) < len(prefixes):
        apart = next(prefix for prefix in prefixes if prefix not in grouped)
        return [
            f"{grouped[0]} was prepared with --item-field, {apart} without. Prepare all alike, or make them two domains."
        ]
    longest = max((manifest["items"]["longest_tokens"] for manifest in manifests if "items" in manifest), default=0)
    short = sorted({seq_len for seq_len in seq_lens if seq_len < longest})
    return [
        f"the longest item has {longest:,} tokens, a row {seq_len:,}, and an item is never cut. Use a longer seq_len, or "
        'leave out what is longer than a row (packing.long_items = "drop").'
        for seq_len in short[:1]
    ]


def verify_data(prefix: str) -> dict[str, Any]:
    """The manifest of prepared data of which every byte is as it was prepared.

    Raises:
        DataError: naming the file that differs.
    """
    manifest = read_manifest(prefix)
    for kind in (kind for kind in KINDS if kind in manifest):
        found, expected = crc32_of(f"{prefix}.{kind}"), manifest[kind]["crc32"]
        if found != expected:
            raise DataError(
                f"{prefix}.{kind}: CRC32 is {found:08x}, its manifest says {expected:08x}: it is damaged. Copy or prepare it again."
            )
    return manifest


def expand_paths(paths: list[str]) -> list[str]:
    """Prefixes that the paths of a domain name; globs in numeric order (part-2 before part-10).

    Raises:
        DataError: if a glob finds no prepared data.
    """
    prefixes = []
    for path in paths:
        if not glob.has_magic(path):
            prefixes.append(path)
            continue
        found = [name.removesuffix(".idx") for name in glob.glob(path + ".idx")]
        if not found:
            raise DataError(f"{path}: no prepared data (PREFIX.idx) matches.")
        prefixes += sorted(found, key=_numeric)
    return prefixes


def expand_files(paths: Sequence[str]) -> list[str]:
    """Files that paths name; globs in numeric order.

    Raises:
        DataError: if one names none.
    """
    files: list[str] = []
    for path in paths:
        found = (
            sorted(glob.glob(path), key=_numeric) if glob.has_magic(path) else [path] if os.path.isfile(path) else []
        )
        if not found:
            raise DataError(f"{path}: no such file.")
        files += found
    return files


def make_room_for(prefixes: Sequence[str]) -> list[str]:
    """Raises this process's limit of open files where so many prepared sets need it. What is wrong if it may not go so high."""
    beside = sum(os.path.exists(f"{prefix}.{kind}") for prefix in prefixes for kind in BESIDE)
    num_sets, need = len(prefixes), 2 * len(prefixes) + beside + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < need:
        if hard != resource.RLIM_INFINITY and hard < need:
            return [
                f"[data]: {num_sets:,} prepared sets need {need:,} open files, the system allows a process {hard:,} (ulimit -Hn). "
                "Raise the limit, or prepare the data in fewer parts."
            ]
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))
    return []


def crc32_of(path: str | Path) -> int:
    """CRC32 of a file's content, in flat memory."""
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 23):
            crc = zlib.crc32(chunk, crc)
    return crc


def _numeric(name: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
