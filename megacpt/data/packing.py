"""Documents into rows of `seq_len` tokens, once, on disk.

Packing runs on blocks of a million documents, each on its own: memory stays flat, blocks run in processes, and the result does not depend
on their number. Items are packed whole: a block holds those that begin in it, and a row all documents of an item, one behind the other.

An index is a folder: `row_start.bin` int64 [rows + 1] into the pieces, `piece_document.bin` uint32 or int64 [pieces],
`piece_offset.bin` and `piece_length.bin` int32 [pieces]. A piece ends where its document or its row ends. Where the domain has weights or
items: `row_weight.bin` float64, `row_labels.bin` and `row_items.bin` int32 [rows], what the labels of a row weigh together, how many weigh
more than 0, and how many items have such a label; with items `piece_item.bin` int32 [pieces], the piece's item, numbered in its row.
`index.json`, written last, holds the sizes and checksums of all and its own. An index that is not what it says is built again:
it follows from the data alone.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from megacpt.data.domain import DomainData
from megacpt.data.fit import (
    Packed,
    pack_best_fit,
    pack_concatenated,
    pack_in_order,
    piece_lengths,
    spread_over_documents,
)
from megacpt.data.indexed import CheckedFile, IndexedDataset, Numbers
from megacpt.data.manifest import crc32_of
from megacpt.data.select import Selection, kept, long_items, withheld_by_bucket
from megacpt.errors import DataError
from megacpt.files import new_folder, read_object, remove, sealed, unsealed, write_atomically
from megacpt.log import info, short_number, warn

VERSION = 3
BLOCK_DOCUMENTS = 1 << 20
FILES = ("row_start.bin", "piece_document.bin", "piece_offset.bin", "piece_length.bin")
SUMS = ("row_weight.bin", "row_labels.bin", "row_items.bin")
ITEMS = ("piece_item.bin",)


class Unsound(Exception):
    """A packing index is not what it says. It can be built again."""


@dataclass(frozen=True)
class RowSums:
    """Attributes: labels: with a weight above 0. weight: of all of them. items: those with such a label."""

    labels: int
    weight: float
    items: int


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
            files = {name: CheckedFile(directory / name, *meta["files"][name]) for name in files_of(domain)}
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise Unsound(str(error) if isinstance(error, DataError) else f"index.json: {error}") from None
        self._row_start = Numbers(files["row_start.bin"], np.int64, 0, self.num_rows + 1)
        self._document = Numbers(files["piece_document.bin"], meta["document_dtype"], 0, self.num_pieces)
        self._offset = Numbers(files["piece_offset.bin"], np.int32, 0, self.num_pieces)
        self._length = Numbers(files["piece_length.bin"], np.int32, 0, self.num_pieces)
        kinds = zip(SUMS, (np.float64, np.int32, np.int32), strict=True)
        self._sums = [Numbers(files[name], kind, 0, self.num_rows) for name, kind in kinds if name in files]
        self._item = Numbers(files[ITEMS[0]], np.int32, 0, self.num_pieces) if domain.grouped else None

    def row(self, row: int) -> list[tuple[int, int, int]]:
        """(document, offset, length) of every piece of a row.

        Raises:
            DataError: if a file was cut or changed since it was opened.
        """
        return list(zip(*self._pieces(row, self._document, self._offset, self._length), strict=True))

    def items(self, row: int) -> list[int]:
        """The item of every piece of a row, numbered from 0; each its own where the domain does not say. Raises as `row`."""
        begin, end = self._read(self._row_start, row, row + 2)
        return self._read(self._item, begin, end) if self._item is not None else list(range(end - begin))

    def sums(self, row: int) -> RowSums:
        """Of a row's labels. Raises as `row`."""
        if self._sums:
            weight, labels, items = (self._read(numbers, row, row + 1)[0] for numbers in self._sums)
            return RowSums(labels, weight, items)
        (lengths,) = self._pieces(row, self._length)
        labels = sum(lengths) - len(lengths)
        return RowSums(labels, float(labels), sum(length > 1 for length in lengths))

    def _pieces(self, row: int, *columns: Numbers) -> list[list[int]]:
        begin, end = self._read(self._row_start, row, row + 2)
        return [self._read(numbers, begin, end) for numbers in columns]

    def _read(self, numbers: Numbers, begin: int, end: int) -> list:
        try:
            return numbers[begin:end].tolist()
        except DataError as error:
            raise DataError(f"{error} Start again: this packing index is then built again.") from None


def files_of(domain: DomainData) -> tuple[str, ...]:
    """What an index of a domain holds."""
    return FILES + (SUMS if domain.weighted or domain.grouped else ()) + (ITEMS if domain.grouped else ())


def open_index(domain: DomainData, selection: Selection, cache: str, workers: int = 1) -> PackingIndex:
    """The packing index of a domain, built if the cache does not hold it or what it holds is damaged.

    Memory is flat: a block of documents at a time. One process builds, others that want the same index wait for it; where the file
    system has no locks each builds its own, and the first that is done is taken.
    """
    digest = hashlib.sha256(
        json.dumps([VERSION, BLOCK_DOCUMENTS, domain.fingerprint(), selection.facts(domain) | {"scores": []}]).encode()
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
                remove(final)
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


def _build(domain: DomainData, selection: Selection, final: Path, workers: int) -> None:
    begin = time.monotonic()
    for prefix in domain.prefixes:
        IndexedDataset(prefix, check=True)  # once: a damaged index must not become rows
    domain.check_beside()
    too_long = _long_items(domain, selection)
    try:
        with new_folder(final) as partial:
            rows = _write_rows(domain, selection, partial, final.name, workers, too_long)
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


def _long_items(domain: DomainData, selection: Selection) -> int:
    """How many items are left out, because they are longer than a row.

    Raises:
        DataError: if the recipe does not say that they are.
    """
    found = long_items(domain, selection)
    if not found.count:
        return 0
    told = (
        f"{', '.join(domain.prefixes[:3])}: {found.count:,} items are longer than a row of {selection.seq_len:,} tokens; the longest, from "
        f"document {found.document:,} on, has {found.tokens:,}. An item is never cut."
    )
    if selection.long_items == "refuse":
        raise DataError(
            f"{told} Use rows of at least {found.tokens:,} tokens (seq_len), leave such items out (packing.long_items = "
            '"drop"), or shorten them and prepare the data again.'
        )
    warn(f"{told} They are left out.")
    return found.count


@dataclass(frozen=True)
class _Rows:
    """The rows of a block of documents.

    Attributes:
        counts: [rows] pieces of each. documents, offsets, lengths: [pieces]. beside: what files_of names behind FILES, in its order.
    """

    counts: np.ndarray
    documents: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    beside: tuple[np.ndarray, ...]


def _write_rows(domain: DomainData, selection: Selection, folder: Path, name: str, workers: int, too_long: int) -> int:
    """Packs into the files of an index, index.json last. Returns the number of rows."""
    dtype = np.dtype(np.uint32 if domain.num_documents < 2**32 else np.int64)
    rows = pieces = 0
    names = files_of(domain)
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(folder / file, "wb")) for file in names]
        files[0].write(np.zeros(1, np.int64).tobytes())
        edges = [0]
        for bucket, withheld in withheld_by_bucket(domain, selection):
            edges += [rows] * (bucket + 1 - len(edges))
            for block in _blocks(domain, selection, withheld, workers):
                arrays = [
                    (np.cumsum(block.counts) + pieces).astype(np.int64), block.documents.astype(dtype),
                    block.offsets.astype(np.int32), block.lengths.astype(np.int32), *block.beside,
                ]  # fmt: skip
                for file, array in zip(files, arrays, strict=True):
                    file.write(array.tobytes())
                rows, pieces = rows + len(block.counts), pieces + len(block.documents)
    facts = {
        "version": VERSION,
        "name": name,
        "rows": rows,
        "pieces": pieces,
        "bucket_rows": [*edges, *[rows] * (selection.buckets + 1 - len(edges))],
        "document_dtype": str(dtype),
        "files": {file: ((folder / file).stat().st_size, crc32_of(folder / file)) for file in names},
        "prefixes": domain.prefixes[:100],
        **selection.facts(domain),
        **({"dropped_items": too_long} if domain.grouped else {}),
    }
    write_atomically(folder / "index.json", sealed(facts))
    return rows


def _blocks(domain: DomainData, selection: Selection, withheld: np.ndarray, workers: int) -> Iterator[_Rows]:
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


def _pack_prefixes(prefixes: list[str], selection: Selection, withheld: np.ndarray, start: int) -> _Rows:
    return _pack_block((_domain_of(tuple(prefixes)), selection, withheld, start))


@lru_cache(1)
def _domain_of(prefixes: tuple[str, ...]) -> DomainData:
    """Of this worker process; its indices were verified where the work comes from."""
    return DomainData(list(prefixes), verify=False)


def _pack_block(task: tuple[DomainData, Selection, np.ndarray, int]) -> _Rows:
    domain, selection, withheld, start = task
    begin, end = domain.next_item(start), domain.next_item(min(start + BLOCK_DOCUMENTS, domain.num_documents))
    lengths = domain.lengths(begin, end)
    inside = withheld[(withheld >= begin) & (withheld < end)] - begin
    if selection.holdout:
        documents = inside
    else:
        chosen = kept(domain, selection, begin, end)
        chosen[inside] = False
        documents = np.flatnonzero(chosen)
    if domain.grouped:
        (counts, which, offsets), items = _pack_items(domain, selection, documents + begin, lengths[documents])
    else:
        pack = pack_best_fit if selection.method == "best_fit" else pack_concatenated
        (counts, which, offsets), items = pack(lengths[documents], selection.seq_len), None
    places = documents[which]
    pieces = piece_lengths(lengths[places], counts, offsets, selection.seq_len)
    beside: tuple[np.ndarray, ...] = ()
    if domain.weighted or domain.grouped:
        beside = _row_sums(domain, counts, places + begin, offsets, pieces, items)
    if items is not None:
        beside = *beside, items.astype(np.int32)
    return _Rows(counts, places + begin, offsets, pieces, beside)


def _pack_items(
    domain: DomainData, selection: Selection, documents: np.ndarray, lengths: np.ndarray
) -> tuple[Packed, np.ndarray]:
    """As the packing of documents, with those of an item in one row, one behind the other; and the item of each piece in its row. An item
    that is longer than a row is left out."""
    low, high = (int(documents[0]), int(documents[-1]) + 1) if len(documents) else (0, 0)
    item = np.searchsorted(domain.item_begins(low, high), documents, side="right")
    first = np.flatnonzero(np.diff(item, prepend=-1))
    sizes = np.add.reduceat(lengths, first, dtype=np.int64) if len(first) else np.zeros(0, np.int64)
    each, fits = np.diff(first, append=len(documents)), sizes <= selection.seq_len
    pack = pack_best_fit if selection.method == "best_fit" else pack_in_order
    (counts, which, offsets), items = spread_over_documents(pack(sizes[fits], selection.seq_len), each[fits])
    return (counts, np.flatnonzero(np.repeat(fits, each))[which], offsets), items


def _row_sums(
    domain: DomainData,
    counts: np.ndarray,
    documents: np.ndarray,
    offsets: np.ndarray,
    lengths: np.ndarray,
    items: np.ndarray | None,
) -> tuple[np.ndarray, ...]:
    """The arrays of `SUMS`. A row's weight is added piece by piece, in their order."""
    weights, heavy = domain.label_sums(documents, offsets, lengths)
    rows = np.repeat(np.arange(len(counts)), counts)
    weight, labels = np.bincount(rows, weights, len(counts)), np.bincount(rows, heavy, len(counts))
    if len(rows) and items is not None:
        first = np.flatnonzero((np.diff(rows, prepend=-1) != 0) | (np.diff(items, prepend=-1) != 0))
        rows, heavy = rows[first], np.add.reduceat(heavy, first)
    of_items = np.bincount(rows, heavy > 0, len(counts))
    return weight.astype(np.float64), labels.astype(np.int32), of_items.astype(np.int32)
