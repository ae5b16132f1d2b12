"""What may stand beside the tokens of a prepared set: PREFIX.weights, the weight of each token, and PREFIX.items, which documents belong
together. Both little endian, 32 bytes of header, then arrays without gaps:

    magic 8 bytes, version uint32 (1), zero uint32, documents uint64, entries uint64

    PREFIX.weights  "MCPTWGT\\0"  int64 [documents + 1]: the first run of each document, and the number of all;
                                 entries runs of (int32 end, float32 weight): a run reaches from the end of the one before to `end`, in
                                 tokens of its document. The last one ends with the document. A document without runs weighs 1 everywhere.
    PREFIX.items    "MCPTITM\\0"  int64 [entries + 1]: the first document of each item, and the number of all.

The weight of a token is that of the loss of predicting it. Sizes and CRC32 stand in the manifest; a file is read once when it is opened,
and what is read later is compared with that (`CheckedFile`).
"""

import struct
from bisect import bisect_left
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from megacpt.data.indexed import CheckedFile, Numbers
from megacpt.errors import DataError

RUN = np.dtype([("end", "<i4"), ("weight", "<f4")])
_HEADER = struct.Struct("<8sIIQQ")
_MAGIC = {"weights": b"MCPTWGT\x00", "items": b"MCPTITM\x00"}
_VERSION = 1
_SPAN = 1024
"""Documents whose runs are in memory at once."""
_BLOCK = 1 << 20


def write_weights(
    path: Path, runs_per_document: Iterable[np.ndarray], runs: Iterable[np.ndarray], sizes: tuple
) -> None:
    """Writes PREFIX.weights in flat memory.

    Args:
        runs_per_document: blocks of integers. runs: blocks of `RUN`. sizes: (documents, runs).
    """
    with open(path, "wb") as file:
        file.write(_HEADER.pack(_MAGIC["weights"], _VERSION, 0, *sizes))
        file.write(bytes(8))
        before = 0
        for block in runs_per_document:
            ends = np.cumsum(block, dtype=np.int64) + before
            file.write(ends.astype("<i8").tobytes())
            before = int(ends[-1]) if len(ends) else before
        assert before == sizes[1], f"{before} runs, {sizes[1]} expected"
        for block in runs:
            file.write(np.ascontiguousarray(block, RUN).tobytes())


def write_items(path: Path, first_documents: np.ndarray, documents: int) -> None:
    """Writes PREFIX.items.

    Args:
        first_documents: of each item, rising, from 0 on.
    """
    with open(path, "wb") as file:
        file.write(_HEADER.pack(_MAGIC["items"], _VERSION, 0, documents, len(first_documents)))
        file.write(np.append(first_documents, documents).astype("<i8").tobytes())


def _open(prefix: str, kind: str, documents: int, facts: dict[str, Any]) -> tuple[CheckedFile, int]:
    """(the file, its entries). Raises DataError if it is not what the manifest says."""
    path = Path(f"{prefix}.{kind}")
    try:
        file = CheckedFile(path, facts["bytes"], facts["crc32"])
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}. Prepare the data again.") from None
    if file.size < _HEADER.size:
        raise DataError(f"{path}: has {file.size} bytes, its header alone has {_HEADER.size}. Prepare the data again.")
    magic, version, _, count, entries = _HEADER.unpack(file.read(0, _HEADER.size))
    if magic != _MAGIC[kind] or version != _VERSION:
        raise DataError(
            f"{path}: begins with {magic!r} of version {version}; read are {_MAGIC[kind]!r} and {_VERSION}."
        )
    size = _HEADER.size + (8 * (count + 1) + RUN.itemsize * entries if kind == "weights" else 8 * (entries + 1))
    if file.size != size or count != documents:
        raise DataError(
            f"{path}: has {file.size:,} bytes and is of {count:,} documents; its header asks for {size:,} bytes, and the set has "
            f"{documents:,} documents. Prepare the data again."
        )
    return file, entries


class TokenWeights:
    """PREFIX.weights, read where it is asked."""

    def __init__(self, prefix: str, documents: int, facts: dict[str, Any]):
        self.path, self.documents = f"{prefix}.weights", documents
        file, count = _open(prefix, "weights", documents, facts)
        self._first = Numbers(file, "<i8", _HEADER.size, documents + 1)
        self._runs = Numbers(file, RUN, _HEADER.size + 8 * (documents + 1), count)

    def read(self, document: int, begin: int, end: int) -> np.ndarray:
        """float32 [end - begin], the weights of tokens [begin, end) of a document."""
        first, last = self._first[document : document + 2].tolist()
        if first == last:
            return np.ones(end - begin, np.float32)
        runs = self._runs[first:last]
        edges = np.clip(runs["end"], begin, end)
        return np.repeat(runs["weight"], np.diff(edges, prepend=begin))

    def sums(self, documents: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of tokens [begin, end) of some documents: (the sums of their weights float64, how many weigh more than 0 int64).

        The runs are added in their order; a run is its weight times its tokens, which is exact.

        Args:
            documents: rising; one may stand there several times.
        """
        weight, heavy = (ends - begins).astype(np.float64), ends - begins
        spans = documents // _SPAN
        for at in np.split(np.arange(len(documents)), np.flatnonzero(np.diff(spans)) + 1) if len(documents) else ():
            low = int(documents[at[0]])
            first = self._first[low : int(documents[at[-1]]) + 2]
            runs = self._runs[int(first[0]) : int(first[-1])]
            own = first[documents[at] - low] - first[0]
            counts = first[documents[at] - low + 1] - first[0] - own
            some = counts > 0
            own, counts, place = own[some], counts[some], at[some]
            if not len(place):
                continue
            which = np.repeat(np.arange(len(place)), counts)
            number = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts - own, counts)
            end = runs["end"][number].astype(np.int64)
            begin = np.where(number == own[which], 0, runs["end"][number - 1])
            tokens = np.maximum(np.minimum(end, ends[place][which]) - np.maximum(begin, begins[place][which]), 0)
            value = runs["weight"][number].astype(np.float64)
            weight[place] = np.bincount(which, value * tokens, len(place))
            heavy[place] = np.bincount(which, tokens * (value > 0), len(place)).astype(np.int64)
        return weight, heavy

    def check(self, lengths_of) -> None:
        """Compares every number with the others and with the documents' lengths: a damaged file must not become rows.

        Args:
            lengths_of: (begin, end) -> int32 lengths of these documents in tokens.
        Raises:
            DataError: naming the first document that is wrong.
        """
        if self._first[0] != 0 or self._first[self.documents] != len(self._runs):
            raise DataError(f"{self.path}: its runs do not go from 0 to {len(self._runs):,}. Prepare the data again.")
        for low in range(0, self.documents, _SPAN):
            high = min(low + _SPAN, self.documents)
            first, lengths = self._first[low : high + 1], lengths_of(low, high).astype(np.int64)
            counts = np.diff(first)
            wrong = counts < 0
            if not wrong.any():
                runs = self._runs[int(first[0]) : int(first[-1])]
                which = np.repeat(np.arange(high - low), counts)
                begin = np.append(0, runs["end"][:-1].astype(np.int64))[: len(runs)]
                begin[(first[:-1] - first[0])[counts > 0]] = 0
                bad = (runs["end"] <= begin) | ~(runs["weight"] >= 0) | ~np.isfinite(runs["weight"])
                wrong = np.bincount(which, bad, high - low) > 0
                last = (first[1:] - first[0] - 1)[counts > 0]
                wrong[counts > 0] |= runs["end"][last] != lengths[counts > 0]
            if wrong.any():
                raise DataError(
                    f"{self.path}: the runs of document {low + int(np.argmax(wrong)):,} do not cover it in order, or a weight is negative "
                    "or not finite. Prepare the data again."
                )


class ItemTable:
    """PREFIX.items: item i is documents first[i] to first[i + 1] - 1."""

    def __init__(self, prefix: str, documents: int, facts: dict[str, Any]):
        self.path, self.documents = f"{prefix}.items", documents
        file, self.count = _open(prefix, "items", documents, facts)
        self.first = Numbers(file, "<i8", _HEADER.size, self.count + 1)

    def begins(self, low: int, high: int) -> np.ndarray:
        """The documents in [low, high) with which an item begins."""
        return self.first[bisect_left(self.first, low) : bisect_left(self.first, high)]

    def next_begin(self, document: int) -> int:
        """The first document from this one on with which an item begins; the number of all behind the last."""
        return int(self.first[bisect_left(self.first, document)])

    def check(self) -> None:
        """Raises DataError if the items do not part the documents in order."""
        before, rising = -1, self.first[0] == 0
        for low in range(0, self.count + 1, _BLOCK):
            block = self.first[low : min(low + _BLOCK, self.count + 1)]
            rising, before = rising and bool((np.diff(block, prepend=before) > 0).all()), int(block[-1])
        if not rising or before != self.documents:
            raise DataError(
                f"{self.path}: its items do not part the {self.documents:,} documents in order. Prepare the data again."
            )
