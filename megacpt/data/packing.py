"""Documents into rows of `seq_len` tokens, once, on disk.

Best fit decreasing (Ding et al. 2024, arXiv 2404.10830): documents longer than a row give full rows and a remainder;
remainders and short documents go, longest first, into the row with the least room that takes them. So only documents
that cannot fit are cut. It runs on blocks of a million documents, each on its own: memory stays flat, blocks run in
processes, and the result does not depend on their number. Items of one length are interchangeable, so whole groups
of rows are filled at once: work grows with the number of distinct lengths, not of documents.

An index is a folder: `row_start.bin` int64 [rows + 1] into the pieces, `piece_document.bin` uint32 or int64 [pieces],
`piece_offset.bin` int32 [pieces]. A piece ends where its document or its row ends. Opening maps the files.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
from bisect import bisect_left, insort
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from megacpt.data.curriculum import buckets_of, read_scores
from megacpt.data.indexed import IndexedDataset
from megacpt.data.manifest import read_manifest
from megacpt.data.permutation import permute
from megacpt.errors import DataError
from megacpt.log import info, short_number

VERSION = 2
BLOCK_DOCUMENTS = 1 << 20


@dataclass(frozen=True)
class Selection:
    """Which documents of a domain are packed, and how."""

    seq_len: int
    method: str = "best_fit"
    min_tokens: int = 0
    max_tokens: int = 2**31
    holdout_documents: int = 0
    holdout: bool = False
    """True packs the held-out documents, False all others."""
    labels: tuple[str, ...] = ()
    """Only documents with one of these labels; all without."""
    scores: tuple[str, ...] = ()
    """Files of scores: documents are packed bucket by bucket of their perplexity."""
    scores_digest: str = ""
    buckets: int = 1
    ascending: bool = True
    drop: float = 0.0


def pack_best_fit(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packs documents of one block.

    Args:
        lengths: [documents] tokens of each; empty ones are left out.
        seq_len: room of a row.
    Returns:
        (pieces of each row [rows], document of each piece [pieces], offset of each piece in its document [pieces]).
    """
    lengths = lengths.astype(np.int64)
    full = lengths // seq_len
    documents = np.repeat(np.arange(len(lengths)), full)
    first = np.cumsum(full) - full
    offsets = (np.arange(len(documents)) - np.repeat(first, full)) * seq_len
    rest = lengths - full * seq_len
    items = np.flatnonzero(rest)
    key = rest[items].astype(np.uint16 if seq_len < 65536 else np.int64)
    order = items[np.argsort(key.max(initial=0) - key, kind="stable")]  # longest first, ties by document
    rows = _best_fit_rows(rest[order], seq_len)
    by_row = np.lexsort((order, rows))  # inside a row in the order of the documents
    counts = np.bincount(rows, minlength=int(rows.max()) + 1) if len(rows) else np.zeros(0, np.int64)
    return (
        np.concatenate([np.ones(len(documents), np.int64), counts]),
        np.concatenate([documents, order[by_row]]),
        np.concatenate([offsets, (full * seq_len)[order][by_row]]),
    )


def _best_fit_rows(sizes: np.ndarray, seq_len: int) -> np.ndarray:
    """The row of each item; `sizes` fall. Rows of equal room are kept as arrays and served in bulk."""
    rows = np.empty(len(sizes), np.int64)
    rooms: list[int] = []  # sorted, those with rows
    open_rows: dict[int, list[np.ndarray]] = {}
    num_rows = 0

    def put(room: int, which: np.ndarray) -> None:
        if room and len(which):
            if room not in open_rows:
                insort(rooms, room)
                open_rows[room] = []
            open_rows[room].append(which)

    if not len(sizes):
        return rows
    edges = [0, *(np.flatnonzero(np.diff(sizes)) + 1), len(sizes)]
    for begin, end in pairwise(edges):
        size, at = int(sizes[begin]), int(begin)
        while at < end:
            k = bisect_left(rooms, size)
            if k < len(rooms):
                room = rooms[k]
                stack = open_rows[room]
                which = stack.pop()
                if not stack:
                    del open_rows[room], rooms[k]
            else:
                room = seq_len
                which = np.arange(num_rows, num_rows + -(-(end - at) // (seq_len // size)))
                num_rows += len(which)
            each = room // size  # best fit fills one row as far as it goes before it takes the next
            filled = min(len(which), (end - at) // each)
            rows[at : at + filled * each] = np.repeat(which[:filled], each)
            at += filled * each
            put(room - each * size, which[:filled])
            if filled < len(which) and at < end:  # the last of these items: fewer than `each`
                rows[at:end] = which[filled]
                put(room - (end - at) * size, which[filled : filled + 1])
                at, filled = end, filled + 1
            put(room, which[filled:])
    return rows


def pack_concatenated(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The documents of one block as one stream, cut every `seq_len` tokens. Returns as `pack_best_fit`."""
    ends = np.cumsum(lengths.astype(np.int64))
    starts = ends - lengths
    total = int(ends[-1]) if len(ends) else 0
    begins = np.unique(np.concatenate([starts[lengths > 0], np.arange(0, total, seq_len)]))
    documents = np.searchsorted(ends, begins, side="right")
    counts = np.bincount(begins // seq_len, minlength=-(-total // seq_len)) if total else np.zeros(0, np.int64)
    return counts, documents, begins - starts[documents]


class DomainData:
    """The prepared sets of a domain as one run of documents, numbered through."""

    def __init__(self, prefixes: list[str]):
        self.prefixes = prefixes
        self.manifests = [read_manifest(prefix) for prefix in prefixes]
        self.sets = [IndexedDataset(prefix, check=False) for prefix in prefixes]
        self.first = np.cumsum([0] + [data.num_documents for data in self.sets])
        self.num_documents = int(self.first[-1])
        self.num_tokens = sum(data.num_tokens for data in self.sets)

    def fingerprint(self) -> str:
        """By content: the CRCs and sizes that the manifests record."""
        facts = [[m["idx"], m["bin"], *([m["labels"]] if "labels" in m else [])] for m in self.manifests]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def lengths(self, begin: int, end: int) -> np.ndarray:
        """Lengths of documents [begin, end) over the sets."""
        blocks = []
        for first, data in zip(self.first, self.sets, strict=False):
            a, b = max(begin - first, 0), min(end - first, data.num_documents)
            if a < b:
                blocks.append(np.asarray(data.lengths[a:b]))
        return np.concatenate(blocks) if blocks else np.zeros(0, np.int32)

    def labelled(self, begin: int, end: int, wanted: tuple[str, ...]) -> np.ndarray:
        """bool: which of documents [begin, end) have one of some labels; all if none are wanted.

        Raises:
            DataError: if a set was prepared without labels, or its file is not what its manifest says.
        """
        if not wanted:
            return np.ones(end - begin, bool)
        parts = []
        for first, data, prefix, manifest in zip(self.first, self.sets, self.prefixes, self.manifests, strict=False):
            a, b = max(begin - first, 0), min(end - first, data.num_documents)
            if a >= b:
                continue
            facts = manifest.get("labels")
            if facts is None:
                raise DataError(f"{prefix}: was prepared without labels. Prepare it with --domain-field.")
            stored = _map(Path(f"{prefix}.labels"), np.dtype("<u2"), data.num_documents)
            numbers = [i for i, name in enumerate(facts["names"]) if name in wanted]
            parts.append(np.isin(stored[a:b], numbers))
        return np.concatenate(parts) if parts else np.zeros(0, bool)

    def read(self, document: int, offset: int, length: int) -> np.ndarray:
        which = int(np.searchsorted(self.first, document, side="right")) - 1
        return self.sets[which].read(document - int(self.first[which]), offset, length)

    def length(self, document: int) -> int:
        which = int(np.searchsorted(self.first, document, side="right")) - 1
        return int(self.sets[which].lengths[document - int(self.first[which])])


class PackingIndex:
    """Rows of a packed domain, mapped from disk."""

    def __init__(self, directory: Path, domain: DomainData, seq_len: int):
        self.domain, self.seq_len = domain, seq_len
        meta = json.loads((directory / "index.json").read_text())
        self.num_rows, self.num_pieces = meta["rows"], meta["pieces"]
        self.bucket_rows: list[int] = meta["bucket_rows"]
        """Rows before each bucket of a curriculum, and all of them; [0, rows] without one."""
        self._row_start = _map(directory / "row_start.bin", np.int64, self.num_rows + 1)
        self._document = _map(directory / "piece_document.bin", np.dtype(meta["document_dtype"]), self.num_pieces)
        self._offset = _map(directory / "piece_offset.bin", np.int32, self.num_pieces)

    def row(self, row: int) -> list[tuple[int, int, int]]:
        """(document, offset, length) of every piece of a row."""
        pieces, room = [], self.seq_len
        for i in range(int(self._row_start[row]), int(self._row_start[row + 1])):
            document, offset = int(self._document[i]), int(self._offset[i])
            length = min(room, self.domain.length(document) - offset)
            pieces.append((document, offset, length))
            room -= length
        return pieces


def _map(path: Path, dtype, count: int) -> np.ndarray:
    expected = count * np.dtype(dtype).itemsize
    actual = path.stat().st_size if path.is_file() else None
    if actual != expected:
        raise DataError(
            f"{path}: has {actual} bytes, its index asks for {expected}. Remove {path.parent}; it is rebuilt."
        )
    return np.memmap(path, dtype, "r") if count else np.empty(0, dtype)


def open_index(domain: DomainData, selection: Selection, cache: str, workers: int = 1) -> PackingIndex:
    """The packing index of a domain, built if the cache does not hold it.

    Memory is flat: a block of documents at a time. Writes to a folder of its own and renames it: two that build the
    same index at once do not disturb each other.
    """
    digest = hashlib.sha256(
        json.dumps([VERSION, BLOCK_DOCUMENTS, domain.fingerprint(), asdict(selection) | {"scores": []}]).encode()
    ).hexdigest()[:24]
    final = Path(cache) / f"{selection.method}-{selection.seq_len}-{digest}"
    if not (final / "index.json").is_file():
        _build(domain, selection, final, workers)
    return PackingIndex(final, domain, selection.seq_len)


def held_out(domain: DomainData, selection: Selection) -> np.ndarray:
    """Numbers of the held-out documents, sorted: drawn from those within the length bounds by a fixed permutation, so
    that every run on the same data holds out the same ones."""
    if not selection.holdout_documents:
        return np.zeros(0, np.int64)
    chosen, total = [], domain.num_documents
    labelled = domain.labelled(0, total, selection.labels)
    for start in range(0, total, 4096):
        drawn = permute(np.arange(start, min(start + 4096, total)), total, key=("holdout",))
        lengths = np.array([domain.length(int(d)) for d in drawn])
        fits = (lengths >= max(selection.min_tokens, 2)) & (lengths <= selection.max_tokens) & labelled[drawn]
        chosen += drawn[fits].tolist()
        if len(chosen) >= selection.holdout_documents:
            break
    if len(chosen) < selection.holdout_documents:
        raise DataError(
            f"{', '.join(domain.prefixes[:3])}: {len(chosen)} documents of at least 2 tokens within the length bounds, "
            f"fewer than holdout_documents = {selection.holdout_documents}."
        )
    return np.sort(np.array(chosen[: selection.holdout_documents], np.int64))


def _build(domain: DomainData, selection: Selection, final: Path, workers: int) -> None:
    begin = time.monotonic()
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".tmp-{final.name}-", dir=final.parent))  # its own, also among hosts
    for prefix in domain.prefixes:
        IndexedDataset(prefix, check=True)  # once: a damaged index must not become rows
    withheld = held_out(domain, selection)
    dtype = np.dtype(np.uint32 if domain.num_documents < 2**32 else np.int64)
    rows = pieces = 0
    with (
        open(partial / "row_start.bin", "wb") as row_file,
        open(partial / "piece_document.bin", "wb") as document_file,
        open(partial / "piece_offset.bin", "wb") as offset_file,
    ):
        row_file.write(np.zeros(1, np.int64).tobytes())
        edges = [0]
        for bucket, counts, documents, offsets in _parts(domain, selection, withheld, workers):
            edges += [rows] * (bucket + 1 - len(edges))
            row_file.write((np.cumsum(counts) + pieces).astype(np.int64).tobytes())
            document_file.write(documents.astype(dtype).tobytes())
            offset_file.write(offsets.astype(np.int32).tobytes())
            rows, pieces = rows + len(counts), pieces + len(documents)
    (partial / "index.json").write_text(
        json.dumps(
            {
                "rows": rows,
                "pieces": pieces,
                "bucket_rows": [*edges, *[rows] * (selection.buckets + 1 - len(edges))],
                "document_dtype": str(dtype),
                "prefixes": domain.prefixes[:100],
                **asdict(selection),
            }
        )
    )
    try:
        os.rename(partial, final)
    except OSError:  # another process was faster; its index is the same
        shutil.rmtree(partial)
    seconds = time.monotonic() - begin
    if domain.num_documents > 100_000:
        rate = short_number(domain.num_documents / max(seconds, 1e-9) / max(1, workers))
        info(
            f"packed {short_number(domain.num_documents)} documents into {rows:,} rows of {selection.seq_len}: "
            f"{seconds:.1f} s, {rate} documents/s a core"
        )


def _parts(
    domain: DomainData, selection: Selection, withheld: np.ndarray, workers: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """(bucket, pieces of each row, documents, offsets) in the order of the index."""
    if not selection.scores:
        yield from ((0, *block) for block in _blocks(domain, selection, withheld, workers))
        return
    scores, lengths = read_scores(selection.scores), domain.lengths(0, domain.num_documents)
    if len(scores) != len(lengths):
        raise DataError(f"{len(scores)} scores for {len(lengths)} documents of {', '.join(domain.prefixes[:3])}.")
    bucket_of = buckets_of(scores, lengths, selection.buckets, selection.ascending, selection.drop)
    for bucket in range(selection.buckets):
        others = np.flatnonzero(bucket_of != bucket)
        apart = np.union1d(withheld, others)
        yield from ((bucket, *block) for block in _blocks(domain, selection, apart, workers))


def _blocks(
    domain: DomainData, selection: Selection, withheld: np.ndarray, workers: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    starts = range(0, domain.num_documents, BLOCK_DOCUMENTS)
    tasks = ((domain, selection, withheld, start) for start in starts)
    if workers <= 1 or len(starts) <= 1:
        yield from map(_pack_block, tasks)
        return
    with ProcessPoolExecutor(min(workers, len(starts))) as pool:
        waiting = []
        for start in starts:  # a few ahead, so that memory stays flat
            waiting.append(pool.submit(_pack_prefixes, domain.prefixes, selection, withheld, start))
            if len(waiting) > 2 * workers:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


def _pack_prefixes(prefixes: list[str], selection: Selection, withheld: np.ndarray, start: int):
    return _pack_block((DomainData(prefixes), selection, withheld, start))


def _pack_block(task) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    domain, selection, withheld, start = task
    lengths = domain.lengths(start, min(start + BLOCK_DOCUMENTS, domain.num_documents))
    inside = withheld[(withheld >= start) & (withheld < start + len(lengths))] - start
    if selection.holdout:
        documents = inside
    else:
        keep = (lengths >= max(selection.min_tokens, 1)) & (lengths <= selection.max_tokens)
        keep &= domain.labelled(start, start + len(lengths), selection.labels)
        keep[inside] = False
        documents = np.flatnonzero(keep)
    pack = pack_best_fit if selection.method == "best_fit" else pack_concatenated
    counts, which, offsets = pack(lengths[documents], selection.seq_len)
    return counts, documents[which] + start, offsets
