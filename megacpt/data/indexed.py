"""Megatron's indexed dataset, PREFIX.bin and PREFIX.idx, byte for byte (Megatron-LM, core/datasets/indexed_dataset.py).

The index: magic, version 1, dtype code, S sequences, D document boundaries; then int32 lengths [S] in tokens, int64
byte offsets [S], int64 document boundaries [D] in sequences. No alignment. Everything is checked on opening: a
truncated file is an error with both sizes, never garbage tokens.
"""

import os
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from megacpt.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
_BLOCK = 1 << 20


def token_dtype(vocab_size: int) -> np.dtype:
    """Megatron's rule: uint16 below 65,500 entries, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def write_index(path: Path, dtype: np.dtype, lengths: Iterable[np.ndarray], count: int) -> None:
    """Writes an index of `count` documents of one sequence each, in flat memory.

    Args:
        lengths: blocks of int32 document lengths in tokens. Iterated twice.
        count: the sum of the blocks' sizes.
    """
    with open(path, "wb") as file:
        file.write(_HEADER.pack(MAGIC, 1, CODES[np.dtype(dtype)], count, count + 1))
        for block in lengths:
            file.write(np.ascontiguousarray(block, "<i4").tobytes())
        offset = 0
        for block in lengths:
            ends = np.cumsum(block, dtype=np.int64) * dtype.itemsize + offset
            file.write(np.concatenate([[offset], ends[:-1]]).astype("<i8").tobytes() if len(block) else b"")
            offset = int(ends[-1]) if len(block) else offset
        for start in range(0, count + 1, _BLOCK):
            file.write(np.arange(start, min(start + _BLOCK, count + 1), dtype="<i8").tobytes())


class IndexedDataset:
    """Reads documents by number. The index is mapped: opening costs one pass over it.

    Attributes:
        lengths: int32 [documents], tokens of each document.
        num_documents, num_tokens, dtype.
    """

    def __init__(self, prefix: str | Path, check: bool = True):
        self.prefix = str(prefix)
        self.lengths, self._offsets, self.dtype = _open_index(Path(self.prefix + ".idx"), check)
        self.num_documents = len(self.lengths)
        binary = Path(self.prefix + ".bin")
        if not binary.is_file():
            raise DataError(f"{binary}: is missing although {self.prefix}.idx exists. Prepare the data again.")
        expected = int(self._offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if self.num_documents else 0
        actual = binary.stat().st_size
        if actual != expected:
            raise DataError(
                f"{binary}: has {actual:,} bytes, but {self.prefix}.idx describes {expected:,}. The file is "
                f"{'truncated' if actual < expected else 'longer than its index'}: copy it again or prepare it again."
            )
        self.num_tokens = expected // self.dtype.itemsize
        self._file = open(binary, "rb", buffering=0)

    def read(self, document: int, offset: int, length: int) -> np.ndarray:
        """Tokens [offset, offset + length) of a document."""
        return self.tokens(int(self._offsets[document]) // self.dtype.itemsize + offset, length)

    def tokens(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) of all. They are read, not mapped: from a mapped file that is cut later a process dies.

        Raises:
            DataError: if the file no longer has them.
        """
        wanted, begin = length * self.dtype.itemsize, start * self.dtype.itemsize
        content = os.pread(self._file.fileno(), wanted, begin) if wanted else b""
        while 0 < len(content) < wanted:
            more = os.pread(self._file.fileno(), wanted - len(content), begin + len(content))
            if not more:
                break
            content += more
        if len(content) != wanted:
            raise DataError(
                f"{self.prefix}.bin: {len(content):,} of {wanted:,} bytes at {begin:,} are there: the file was cut since it was opened."
            )
        return np.frombuffer(content, self.dtype)

    def __getstate__(self) -> dict:
        return {key: value for key, value in vars(self).items() if key != "_file"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, _file=open(self.prefix + ".bin", "rb", buffering=0))


def _open_index(path: Path, check: bool) -> tuple[np.ndarray, np.ndarray, np.dtype]:
    """(lengths, byte offsets) per document, and the dtype. Sequences of one document are joined."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = file.read(_HEADER.size)
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file. `megacpt prepare` writes PREFIX.bin, PREFIX.idx and PREFIX.json."
        ) from None
    if len(header) < _HEADER.size or header[:9] != MAGIC:
        raise DataError(f"{path}: is not an indexed dataset (it begins with {header[:9]!r}, not {MAGIC!r}).")
    _, version, code, sequences, boundaries = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPES:
        raise DataError(
            f"{path}: version {version}, dtype code {code}. Read are version 1 and codes {sorted(_DTYPES)}."
        )
    expected = _HEADER.size + 12 * sequences + 8 * boundaries
    if size != expected:
        raise DataError(
            f"{path}: has {size:,} bytes, but its header asks for {expected:,} ({sequences:,} sequences, {boundaries:,} "
            "document boundaries). The file is damaged or multimodal: copy it again or prepare it again."
        )
    dtype = np.dtype(_DTYPES[code])
    raw = np.memmap(path, np.uint8, "r")
    lengths = raw[34 : 34 + 4 * sequences].view("<i4")
    offsets = raw[34 + 4 * sequences : 34 + 12 * sequences].view("<i8")
    documents = raw[34 + 12 * sequences :].view("<i8")
    if boundaries == 0 or documents[0] != 0 or documents[-1] != sequences:
        raise DataError(f"{path}: document boundaries do not run from 0 to the {sequences:,} sequences.")
    if check:
        _check_index(path, sequences, boundaries, dtype)
    if not _one_sequence_each(documents, sequences):
        lengths, offsets = _joined(path, lengths, documents, dtype)
    return lengths, offsets, dtype


def _one_sequence_each(documents: np.ndarray, sequences: int) -> bool:
    """Whether document i is sequence i. As many as there are sequences they may be with an empty one and one of two sequences, too."""
    if len(documents) != sequences + 1:
        return False
    blocks = range(0, sequences + 1, _BLOCK)
    return all(np.array_equal(documents[i : i + _BLOCK], np.arange(i, min(i + _BLOCK, sequences + 1))) for i in blocks)


def _joined(path: Path, lengths: np.ndarray, documents: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """(lengths, byte offsets) of documents of any number of sequences. One of none, as Megatron writes for an empty text, has no tokens."""
    if np.diff(documents).min() < 0:
        raise DataError(f"{path}: document boundaries fall. The index is damaged.")
    ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[documents]
    lengths = np.diff(ends)
    if lengths.size and lengths.max() >= 2**31:
        raise DataError(f"{path}: a document has {lengths.max():,} tokens; at most {2**31 - 1:,} are read.")
    return lengths.astype(np.int32), ends[:-1] * dtype.itemsize


def _check_index(path: Path, sequences: int, boundaries: int, dtype: np.dtype) -> None:
    """Every offset is the sum of the lengths before it; boundaries do not fall. Read in blocks, not mapped: memory stays flat."""

    def block(kind: str, base: int, start: int, end: int) -> np.ndarray:
        item = np.dtype(kind).itemsize
        return np.fromfile(path, kind, max(0, end - start), offset=base + start * item).astype(np.int64)

    expected = 0
    for start in range(0, sequences, _BLOCK):
        end = min(start + _BLOCK, sequences)
        lengths = block("<i4", _HEADER.size, start, end)
        ends = np.cumsum(lengths * dtype.itemsize) + expected
        offsets = block("<i8", _HEADER.size + 4 * sequences, start, end)
        if lengths.min() < 0 or not np.array_equal(offsets, ends - lengths * dtype.itemsize):
            raise DataError(
                f"{path}: sequence offsets do not follow from the lengths near sequence {start:,}. The index is damaged."
            )
        expected = int(ends[-1])
    for start in range(0, boundaries - 1, _BLOCK):
        documents = block("<i8", _HEADER.size + 12 * sequences, start, min(start + _BLOCK + 1, boundaries))
        if np.diff(documents).min() < 0:
            raise DataError(f"{path}: document boundaries fall near document {start:,}. The index is damaged.")
