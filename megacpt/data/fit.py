"""Lengths into rows of `seq_len` tokens: pure functions on arrays.

Best fit decreasing (Ding et al. 2024, arXiv 2404.10830): documents longer than a row give full rows and a remainder; remainders and short
documents go, longest first, into the row with the least room that takes them. So only documents that cannot fit are cut. Those of one
length are interchangeable, so whole groups of rows are filled at once: work grows with the number of distinct lengths, not of documents.
"""

from bisect import bisect_left, insort
from itertools import pairwise

import numpy as np

Packed = tuple[np.ndarray, np.ndarray, np.ndarray]
"""(pieces of each row [rows], document of each piece [pieces], offset of each piece in its document [pieces])."""


def pack_best_fit(lengths: np.ndarray, seq_len: int) -> Packed:
    """Packs documents of one block.

    Args:
        lengths: [documents] tokens of each; empty ones are left out.
        seq_len: room of a row.
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


def pack_concatenated(lengths: np.ndarray, seq_len: int) -> Packed:
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


def pack_in_order(lengths: np.ndarray, seq_len: int) -> Packed:
    """What may not be cut, in its order: a row ends before the first that does not fit into it.

    Args:
        lengths: each from 1 to `seq_len`.
    """
    ends, begins = np.cumsum(lengths, dtype=np.int64), [0]
    while begins[-1] < len(lengths):
        before = int(ends[begins[-1] - 1]) if begins[-1] else 0
        begins.append(int(np.searchsorted(ends, before + seq_len, side="right")))
    return np.diff(begins), np.arange(len(lengths)), np.zeros(len(lengths), np.int64)


def spread_over_documents(packed: Packed, documents_each: np.ndarray) -> tuple[Packed, np.ndarray]:
    """Rows of items, none of which is cut, as rows of their documents.

    Args:
        documents_each: [items] how many documents each has; they stand one behind the other.
    Returns:
        (the same rows, with documents in place of items; the number of each piece's item in its row).
    """
    counts, items, _ = packed
    sizes = documents_each[items]
    rows = np.repeat(np.arange(len(counts)), counts)
    first = (np.cumsum(documents_each) - documents_each)[items]
    documents = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes - first, sizes)
    in_row = np.arange(len(items)) - np.repeat(np.cumsum(counts) - counts, counts)
    pieces = np.bincount(rows, sizes, len(counts)).astype(np.int64)
    return (pieces, documents, np.zeros(len(documents), np.int64)), np.repeat(in_row, sizes)
