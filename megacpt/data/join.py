"""Finished pieces become PREFIX.bin, .idx and .json: joined in the order of the input, published by rename, the manifest
last. Also the manifest for files that another program made."""

import errno
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megacpt.data.beside import RUN, write_items, write_weights
from megacpt.data.indexed import IndexedDataset, token_dtype, write_index
from megacpt.data.manifest import FORMAT, KINDS, crc32_of
from megacpt.data.tokenizer import Tokenizer
from megacpt.errors import ConfigError, DataError
from megacpt.files import publish_file, read_object, write_atomically
from megacpt.log import warn

_COPY_BYTES = 8 << 20
SHOWN_BAD_LINES = 10


def read_piece_report(parts: Path, index: int) -> dict[str, Any]:
    return read_object(parts / f"{index:06d}.json", 1 << 30)


def disk_error(error: OSError, path: str) -> Exception:
    """The error to raise: ours if room ran out, else the one that came."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(os.path.dirname(os.path.abspath(path))).free
        return DataError(
            f"{path}: the disk is full or the file too large ({error.strerror}; {free / 1e6:,.0f} MB free). Make room and "
            "run the same command again: finished pieces are kept."
        )
    return error


class _Blocks:
    """The pieces' files of a kind as blocks that can be read several times."""

    def __init__(self, parts: Path, count: int, kind: str, dtype: str | np.dtype):
        self.files, self.dtype = [parts / f"{i:06d}.{kind}" for i in range(count)], np.dtype(dtype)

    def __iter__(self) -> Iterator[np.ndarray]:
        for file in self.files:
            with open(file, "rb") as handle:
                while raw := handle.read(4 << 20):
                    yield np.frombuffer(raw, self.dtype)


def join(prefix: str, parts: Path, num_pieces: int, facts: dict[str, Any]) -> dict[str, Any]:
    """Joins the pieces, writes the index, publishes all with the manifest, and returns that.

    Args:
        facts: what the manifest says besides counts and sizes; vocab_size is among them.
    Raises:
        DataError: if there is no document at all.
    """
    reports = [read_piece_report(parts, i) for i in range(num_pieces)]
    documents = sum(r["documents"] for r in reports)
    for path, line, reason in [b for r in reports for b in r["bad_examples"]][:SHOWN_BAD_LINES]:
        warn(f"skipped {path}:{line}: {reason}")
    for source in facts["sources"]:
        if source["bytes"] == 0:
            warn(f"{source['path']}: is empty.")
    weightless = sum(r["weightless"] for r in reports)
    if documents == 0:
        part = facts["part"]
        text = f" of part {part[0]}/{part[1]}" if part else ""
        why = f": {weightless:,} were left out, because none of their tokens has a weight" if weightless else ""
        raise DataError(f"{facts['num_sources']} files{text} hold no documents{why}. Nothing was written.")
    tmp = {kind: f"{prefix}.{kind}.tmp" for kind in ("bin", "idx")}
    crc = _concatenate([parts / f"{i:06d}.bin" for i in range(num_pieces)], tmp["bin"])
    lengths, dtype = _Blocks(parts, num_pieces, "len", "<i4"), token_dtype(facts["vocab_size"])
    write_index(Path(tmp["idx"]), dtype, lengths, documents)
    beside = {}
    for kind, key, make in (("labels", "domain_field", _join_labels), ("items", "item_field", _join_items)):
        if facts.get(key):
            tmp[kind] = f"{prefix}.{kind}.tmp"
            beside[kind] = make(parts, reports, tmp[kind], lengths)
    if "segments_field" in facts or "prompt_field" in facts:
        tmp["weights"] = f"{prefix}.weights.tmp"
        beside["weights"] = _join_weights(parts, reports, tmp["weights"], "items" in beside)
    manifest = {
        "format": FORMAT,
        **_counts(lengths),
        "dtype": str(dtype),
        **facts,
        **beside,
        "empty_documents": sum(r["empty"] for r in reports),
        "bad_lines": sum(r["bad_lines"] for r in reports),
        "bin": {"bytes": os.path.getsize(tmp["bin"]), "crc32": crc},
        "idx": {"bytes": os.path.getsize(tmp["idx"]), "crc32": crc32_of(tmp["idx"])},
    }
    _publish(prefix, tmp, manifest)
    return manifest


def _join_labels(parts: Path, reports: list[dict[str, Any]], target: str, lengths) -> dict[str, Any]:
    """One uint16 a document, numbers of the sorted names; what of each name there is.

    Raises:
        DataError: for more than 65,535 names.
    """
    names = sorted({name for report in reports for name in report["labels"]})
    if len(names) > 65535:
        raise DataError(f"the domain field has {len(names)} different values, for example {names[:3]}; at most 65,535.")
    place, pieces = {name: i for i, name in enumerate(names)}, []
    for i, report in enumerate(reports):
        own = np.array([place[name] for name in report["labels"]], np.uint16)
        pieces.append(own[np.fromfile(parts / f"{i:06d}.lab", "<u4")] if len(own) else np.zeros(0, np.uint16))
    whole = np.concatenate(pieces).astype("<u2")
    Path(target).write_bytes(whole.tobytes())
    tokens = np.bincount(whole, weights=np.concatenate([np.asarray(block) for block in lengths]), minlength=len(names))
    documents = np.bincount(whole, minlength=len(names))
    counts = {
        name: {"documents": int(d), "tokens": int(t)} for name, d, t in zip(names, documents, tokens, strict=True)
    }
    return {"names": counts, "bytes": os.path.getsize(target), "crc32": crc32_of(target)}


def _join_weights(parts: Path, reports: list[dict[str, Any]], target: str, kept: bool) -> dict[str, Any]:
    """The runs of all documents. What they say, in numbers, and what may be wrong, as warnings.

    Args:
        kept: whether documents without a weight are, as parts of items.
    """
    sizes = [sum(report[key] for report in reports) for key in ("documents", "runs", "weightless", "spanning")]
    documents, runs, weightless, spanning = sizes
    num, run = _Blocks(parts, len(reports), "num", "<i4"), _Blocks(parts, len(reports), "run", RUN)
    write_weights(Path(target), num, run, (documents, runs))
    if spanning:
        warn(
            f"{spanning:,} tokens reach over the border of two parts with different weights; each has the weight of the part in which it "
            "begins. A space belongs to the word behind it: let the later part begin with it."
        )
    if weightless:
        warn(
            f"{weightless:,} documents hold no token that is predicted with a weight above 0. They are "
            f"{'kept, as parts of their items' if kept else 'left out'}."
        )
    return {
        "documents": int(sum(np.count_nonzero(block) for block in num)), "runs": runs, "weightless_documents": weightless,
        "spanning_tokens": spanning, "bytes": os.path.getsize(target), "crc32": crc32_of(target),
    }  # fmt: skip


def _join_items(
    parts: Path, reports: list[dict[str, Any]], target: str, lengths: Iterable[np.ndarray]
) -> dict[str, Any]:
    """The first document of each item. An item goes on from piece to piece, but not over the end of a file."""
    goes_on, path, last = [], None, None
    for i, report in enumerate(reports):
        flags = np.fromfile(parts / f"{i:06d}.itm", bool)
        if report["path"] != path:
            path, last = report["path"], None
        if len(flags):
            flags[0] = is_same_item(report["first_item"], last)
            last = report["last_item"]
        goes_on.append(flags)
    first = np.flatnonzero(~np.concatenate(goes_on))
    write_items(Path(target), first, sum(map(len, goes_on)))
    tokens = np.add.reduceat(np.concatenate(list(lengths)), first, dtype=np.int64)
    sizes = np.diff(first, append=sum(map(len, goes_on)))
    return {
        "items": len(first), "longest_tokens": int(tokens.max()), "most_documents": int(sizes.max()),
        "bytes": os.path.getsize(target), "crc32": crc32_of(target),
    }  # fmt: skip


def is_same_item(item: str | int | None, other: str | int | None) -> bool:
    """Whether two documents with these values belong together, the one behind the other."""
    return item is not None and type(item) is type(other) and item == other


def _concatenate(files: list[Path], target: str) -> int:
    """Writes files one behind the other; returns the CRC32 of the whole."""
    crc = 0
    with open(target, "wb") as out:
        for path in files:
            with open(path, "rb") as file:
                while chunk := file.read(_COPY_BYTES):
                    crc = zlib.crc32(chunk, crc)
                    out.write(chunk)
    return crc


def _counts(lengths) -> dict[str, Any]:
    """documents, tokens and the histogram: key 2^k counts documents of 2^k up to 2^(k+1) - 1 tokens."""
    counts, sums = np.zeros(32, np.int64), np.zeros(32, np.int64)
    for block in lengths:
        bucket = np.log2(np.maximum(block, 1)).astype(int)
        counts += np.bincount(bucket, minlength=32)
        sums += np.bincount(bucket, weights=block, minlength=32).astype(np.int64)
    histogram = {str(1 << k): {"documents": int(counts[k]), "tokens": int(sums[k])} for k in range(32) if counts[k]}
    return {"documents": int(counts.sum()), "tokens": int(sums.sum()), "length_histogram": histogram}


def _publish(prefix: str, tmp: dict[str, str], manifest: dict[str, Any]) -> None:
    """Renames data, index, then the manifest; each is on disk before."""
    for kind in KINDS:
        if kind in tmp:
            publish_file(Path(tmp[kind]), Path(f"{prefix}.{kind}"))
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # the name of a source need not be UTF-8; escaped it is read back as it is
        text = json.dumps(manifest, indent=1)
    write_atomically(f"{prefix}.json", text)


def adopt(prefix: str, tokenizer_path: str, eos_token: str | None = None) -> dict[str, Any]:
    """Writes a manifest for a .bin/.idx that another program made (Megatron's preprocess_data).

    Raises:
        DataError: if the files are damaged or hold ids outside the tokenizer's vocabulary.
    """
    if os.path.exists(prefix + ".json"):
        raise ConfigError([f"{prefix}.json: exists, so the data is adopted already."], "the arguments")
    tokenizer = Tokenizer(tokenizer_path, eos_token)
    data = IndexedDataset(prefix)
    for start in range(0, data.num_tokens, 1 << 24):
        block = data.tokens(start, min(1 << 24, data.num_tokens - start))
        if len(block) and not 0 <= int(block.min()) <= int(block.max()) < tokenizer.vocab_size:
            raise DataError(
                f"{prefix}.bin: holds token id {int(block.max())} near token {start:,}, but {tokenizer_path} has "
                f"{tokenizer.vocab_size} entries. Give the tokenizer that the data was made with."
            )
    blocks = [data.lengths_of(i, i + (1 << 20)) for i in range(0, data.num_documents, 1 << 20)]
    empty = int(sum(np.count_nonzero(block == 0) for block in blocks))
    first = [i for i in range(min(100 + empty, data.num_documents)) if data.lengths[i]][:100]
    last_tokens = [int(data.read(i, int(data.lengths[i]) - 1, 1)[0]) for i in first]
    ends_with_eos = bool(first) and all(token == tokenizer.eos_id for token in last_tokens)
    manifest = {
        "format": FORMAT,
        **_counts(blocks),
        "dtype": str(data.dtype),
        "vocab_size": tokenizer.vocab_size,
        "eos_token_id": tokenizer.eos_id,
        "bos_token_id": tokenizer.bos_id,
        "bos_prepended": None,
        "eos_appended": ends_with_eos,
        "adopted": True,
        "empty_documents": empty,
        **{k: {"bytes": os.path.getsize(f"{prefix}.{k}"), "crc32": crc32_of(f"{prefix}.{k}")} for k in ("bin", "idx")},
        "tokenizer": {"path": tokenizer_path, "sha256": tokenizer.sha256},
    }
    if empty:
        warn(
            f"{prefix}: {empty:,} of {data.num_documents:,} documents hold no token. They keep their numbers and are not trained on."
        )
    if not ends_with_eos:
        warn(f"{prefix}: documents do not end with the end-of-text token; the model will not learn where to stop.")
    _publish(prefix, {}, manifest)
    return manifest
