"""Documents into rows of `seq_len` tokens, once, on disk.

Best fit decreasing (Ding et al. 2024, arXiv 2404.10830): documents longer than a row give full rows and a remainder;
remainders and short documents go, longest first, into the row with the least room that takes them. So only documents
that cannot fit are cut. It runs on blocks of a million documents, each on its own: memory stays flat, blocks run in
processes, and the result does not depend on their number. Items of one length are interchangeable, so whole groups
of rows are filled at once: work grows with the number of distinct lengths, not of documents.

An index is a folder: `row_start.bin` int64 [rows + 1] into the pieces, `piece_document.bin` uint32 or int64 [pieces],
`piece_offset.bin` and `piece_length.bin` int32 [pieces]. A piece ends where its document or its row ends.
`index.json`, written last, holds the sizes and checksums of all and its own. An index that is not what it says is built again:
it follows from the data alone.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np

from megacpt.data.curriculum import buckets_of, read_scores
from megacpt.data.indexed import CheckedFile, IndexedDataset, Numbers
from megacpt.data.manifest import crc32_of, read_manifest
from megacpt.data.permutation import permute
from megacpt.errors import DataError
from megacpt.files import new_folder, read_object, sealed, unsealed, write_atomically
from megacpt.log import info, short_number, warn

VERSION = 3
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


def piece_lengths(documents: np.ndarray, counts: np.ndarray, offsets: np.ndarray, seq_len: int) -> np.ndarray:
    """Tokens of each piece: to the end of its document or of its row. Only a row's last piece can be cut by its row.

    Args:
        documents: [pieces] tokens of each piece's document. counts: [rows] pieces of each row. offsets: [pieces].
    """
    rest = documents.astype(np.int64) - offsets
    before = np.cumsum(rest) - rest
    begins = before - np.repeat(before[np.cumsum(counts) - counts], counts)
    return np.minimum(rest, seq_len - begins)


class DomainData:
    """The prepared sets of a domain as one run of documents, numbered through.

    Args:
        verify: compare the indices with the checksums in their manifests.
    """

    def __init__(self, prefixes: list[str], verify: bool = True):
        self.prefixes = prefixes
        self.manifests = [read_manifest(prefix) for prefix in prefixes]
        self.sets = [
            IndexedDataset(prefix, check=False, crc32=manifest["idx"]["crc32"] if verify else None)
            for prefix, manifest in zip(prefixes, self.manifests, strict=True)
        ]
        self.first = [0, *accumulate(data.num_documents for data in self.sets)]
        self.num_documents = self.first[-1]
        self.num_tokens = sum(data.num_tokens for data in self.sets)
        self._labels: dict[int, Numbers] = {}

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
                blocks.append(data.lengths_of(a, b))
        return np.concatenate(blocks) if blocks else np.zeros(0, np.int32)

    def labelled(self, begin: int, end: int, wanted: tuple[str, ...]) -> np.ndarray:
        """bool: which of documents [begin, end) have one of some labels; all if none are wanted.

        Raises:
            DataError: if a set was prepared without labels, or its file is not what its manifest says.
        """
        if not wanted:
            return np.ones(end - begin, bool)
        parts = []
        for which, (first, data) in enumerate(zip(self.first, self.sets, strict=False)):
            a, b = max(begin - first, 0), min(end - first, data.num_documents)
            if a < b:
                names = self._labels_of(which)
                numbers = [i for i, name in enumerate(self.manifests[which]["labels"]["names"]) if name in wanted]
                parts.append(np.isin(names[a:b], numbers))
        return np.concatenate(parts) if parts else np.zeros(0, bool)

    def _labels_of(self, which: int) -> Numbers:
        """uint16 [documents of a set]."""
        if which not in self._labels:
            prefix, facts = self.prefixes[which], self.manifests[which].get("labels")
            if facts is None:
                raise DataError(f"{prefix}: was prepared without labels. Prepare it with --domain-field.")
            count = self.sets[which].num_documents
            try:
                file = CheckedFile(Path(f"{prefix}.labels"), 2 * count, facts["crc32"])
            except OSError as error:
                raise DataError(f"{prefix}.labels: {error.strerror}. Prepare the data again.") from None
            self._labels[which] = Numbers(file, "<u2", 0, count)
        return self._labels[which]

    def read(self, document: int, offset: int, length: int) -> np.ndarray:
        which = bisect_right(self.first, document) - 1
        return self.sets[which].read(document - self.first[which], offset, length)

    def length(self, document: int) -> int:
        which = bisect_right(self.first, document) - 1
        return self.sets[which].length_of(document - self.first[which])


class Unsound(Exception):
    """A packing index is not what it says. It can be built again."""


class PackingIndex:
    """Rows of a packed domain, read from disk when they are asked for.

    Raises:
        FileNotFoundError: if there is none. Unsound: if it is damaged, or another's.
    """

    def __init__(self, directory: Path, domain: DomainData, seq_len: int):
        self.directory, self.domain, self.seq_len = directory, domain, seq_len
        if not directory.exists():
            raise FileNotFoundError(directory)
        try:
            meta = unsealed(read_object(directory / "index.json"))
            if (meta["version"], meta["name"]) != (VERSION, directory.name):
                raise ValueError(f"it is {meta['name']!r} of version {meta['version']}")
            self.num_rows, self.num_pieces = meta["rows"], meta["pieces"]
            self.bucket_rows: list[int] = meta["bucket_rows"]
            """Rows before each bucket of a curriculum, and all of them; [0, rows] without one."""
            files = {name: CheckedFile(directory / name, *meta["files"][name]) for name in FILES}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise Unsound(str(error) if isinstance(error, DataError) else f"index.json: {error}") from None
        self._row_start = Numbers(files["row_start.bin"], np.int64, 0, self.num_rows + 1)
        self._document = Numbers(files["piece_document.bin"], meta["document_dtype"], 0, self.num_pieces)
        self._offset = Numbers(files["piece_offset.bin"], np.int32, 0, self.num_pieces)
        self._length = Numbers(files["piece_length.bin"], np.int32, 0, self.num_pieces)

    def row(self, row: int) -> list[tuple[int, int, int]]:
        """(document, offset, length) of every piece of a row.

        Raises:
            DataError: if a file was cut or changed since it was opened.
        """
        try:
            begin, end = self._row_start[row : row + 2].tolist()
            columns = [numbers[begin:end].tolist() for numbers in (self._document, self._offset, self._length)]
        except DataError as error:
            raise DataError(f"{error} Start again: this packing index is then built again.") from None
        return list(zip(*columns, strict=True))


FILES = ("row_start.bin", "piece_document.bin", "piece_offset.bin", "piece_length.bin")


def open_index(domain: DomainData, selection: Selection, cache: str, workers: int = 1) -> PackingIndex:
    """The packing index of a domain, built if the cache does not hold it or what it holds is damaged.

    Memory is flat: a block of documents at a time. One process builds, others that want the same index wait for it; where the file
    system has no locks each builds its own, and the first that is done is taken.
    """
    digest = hashlib.sha256(
        json.dumps([VERSION, BLOCK_DOCUMENTS, domain.fingerprint(), asdict(selection) | {"scores": []}]).encode()
    ).hexdigest()[:24]
    final = Path(cache) / f"{selection.method}-{selection.seq_len}-{digest}"
    with contextlib.suppress(FileNotFoundError, Unsound):
        return PackingIndex(final, domain, selection.seq_len)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with _locked(final):
            try:
                return PackingIndex(final, domain, selection.seq_len)  # by another process, in between
            except FileNotFoundError:
                pass
            except Unsound as error:
                warn(f"{final}: the packing index is damaged and is built again: {error}")
                shutil.rmtree(final) if final.is_dir() and not final.is_symlink() else final.unlink()
            _build(domain, selection, final, workers)
        return PackingIndex(final, domain, selection.seq_len)
    except OSError as error:
        raise DataError(
            f"{final}: the packing index cannot be written: {error.strerror or error}. Make room or make {final.parent} writable, or set "
            "packing.directory to another folder."
        ) from None
    except Unsound as error:
        raise DataError(f"{final}: is damaged again after it was built: {error}. Look at the disk.") from None


@contextlib.contextmanager
def _locked(final: Path) -> Iterator[None]:
    """Only one process at a time, of all machines, where the file system has locks."""
    path, told = final.parent / f".{final.name}.lock", False
    while True:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            try:  # of the process, so that those that it forks do not hold it when it is killed
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                if not told:
                    info(f"{final}: another process builds this packing index; waiting for it")
                told = True
                fcntl.lockf(handle, fcntl.LOCK_EX)
            if os.path.exists(path) and os.path.samestat(os.fstat(handle), os.stat(path)):
                break  # the one before removes its lock: only the file that is there now counts
        except OSError as error:
            if error.errno == errno.ENOENT:  # removed between two looks
                pass
            elif error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EBADF):
                break
            else:
                os.close(handle)
                raise
        os.close(handle)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)
        os.close(handle)


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
    for prefix in domain.prefixes:
        IndexedDataset(prefix, check=True)  # once: a damaged index must not become rows
    try:
        with new_folder(final) as partial:
            rows = _write_rows(domain, selection, partial, final.name, workers)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        return  # without locks another process was faster; its index is the same
    seconds = time.monotonic() - begin
    if domain.num_documents > 100_000:
        rate = short_number(domain.num_documents / max(seconds, 1e-9) / max(1, workers))
        info(
            f"packed {short_number(domain.num_documents)} documents into {rows:,} rows of {selection.seq_len}: "
            f"{seconds:.1f} s, {rate} documents/s a core"
        )


def _write_rows(domain: DomainData, selection: Selection, folder: Path, name: str, workers: int) -> int:
    """Packs into the files of an index, index.json last. Returns the number of rows."""
    withheld = held_out(domain, selection)
    dtype = np.dtype(np.uint32 if domain.num_documents < 2**32 else np.int64)
    rows = pieces = 0
    with contextlib.ExitStack() as stack:
        row_file, document_file, offset_file, length_file = (
            stack.enter_context(open(folder / file, "wb")) for file in FILES
        )
        row_file.write(np.zeros(1, np.int64).tobytes())
        edges = [0]
        for bucket, counts, documents, offsets, lengths in _parts(domain, selection, withheld, workers):
            edges += [rows] * (bucket + 1 - len(edges))
            row_file.write((np.cumsum(counts) + pieces).astype(np.int64).tobytes())
            document_file.write(documents.astype(dtype).tobytes())
            offset_file.write(offsets.astype(np.int32).tobytes())
            length_file.write(lengths.astype(np.int32).tobytes())
            rows, pieces = rows + len(counts), pieces + len(documents)
    facts = {
        "version": VERSION,
        "name": name,
        "rows": rows,
        "pieces": pieces,
        "bucket_rows": [*edges, *[rows] * (selection.buckets + 1 - len(edges))],
        "document_dtype": str(dtype),
        "files": {file: ((folder / file).stat().st_size, crc32_of(folder / file)) for file in FILES},
        "prefixes": domain.prefixes[:100],
        **asdict(selection),
    }
    write_atomically(folder / "index.json", sealed(facts))
    return rows


def _parts(
    domain: DomainData, selection: Selection, withheld: np.ndarray, workers: int
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """(bucket, pieces of each row, documents, offsets, lengths) in the order of the index."""
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
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
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
    return _pack_block((_domain_of(tuple(prefixes)), selection, withheld, start))


@lru_cache(1)
def _domain_of(prefixes: tuple[str, ...]) -> DomainData:
    """Of this worker process; its indices were verified where the work comes from."""
    return DomainData(list(prefixes), verify=False)


def _pack_block(task) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
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
    places = documents[which]
    return counts, places + start, offsets, piece_lengths(lengths[places], counts, offsets, selection.seq_len)
