"""Megatron's indexed dataset, PREFIX.bin and PREFIX.idx, byte for byte (Megatron-LM, core/datasets/indexed_dataset.py).

The index: magic, version 1, dtype code, S sequences, D document boundaries; then int32 lengths [S] in tokens, int64
byte offsets [S], int64 document boundaries [D] in sequences. No alignment. Everything is checked on opening: a
truncated file is an error with both sizes, never garbage tokens.

Nothing is mapped: a mapped file that is cut under a run gives zeros, or ends the process. Opening reads an index once, compares its
checksum with the manifest's and remembers one of every 4 KiB; what is read later is compared with that.
"""

import os
import struct
import zlib
from array import array
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import DTypeLike

from megacpt.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
_BLOCK = 1 << 20
_PAGE, _READ = 4096, 1 << 22
"""Bytes that share a checksum, and that are read at once on opening."""


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


class CheckedFile:
    """A file of numbers that does not change: its bytes are read when they are asked for, and compared with what they were on opening.

    Args:
        size, crc32: what it must have; None where nobody knows.
    Raises:
        DataError: if it has not. FileNotFoundError.
    """

    def __init__(self, path: Path, size: int | None = None, crc32: int | None = None):
        self.path, self.file = path, open(path, "rb", buffering=0)
        self.size, self._pages, found = os.fstat(self.file.fileno()).st_size, array("I"), 0
        if size is not None and self.size != size:
            raise DataError(f"{path}: has {self.size:,} bytes, it must have {size:,}: it was cut, or is another file.")
        for begin in range(0, self.size, _READ):
            content = memoryview(self._raw(begin, min(_READ, self.size - begin)))
            found = zlib.crc32(content, found)
            self._pages.extend(zlib.crc32(content[at : at + _PAGE]) for at in range(0, len(content), _PAGE))
        if crc32 is not None and found != crc32:
            raise DataError(f"{path}: its CRC32 is {found:08x}, it must be {crc32:08x}: it is damaged.")

    def read(self, begin: int, count: int) -> memoryview:
        """Bytes [begin, begin + count).

        Raises:
            DataError: if they are no longer what they were.
        """
        first, start = begin // _PAGE, begin // _PAGE * _PAGE
        content = memoryview(self._raw(start, min(-(-(begin + count) // _PAGE) * _PAGE, self.size) - start))
        for at in range(0, len(content), _PAGE):
            if zlib.crc32(content[at : at + _PAGE]) != self._pages[first + at // _PAGE]:
                raise DataError(
                    f"{self.path}: bytes {start + at:,} to {min(start + at + _PAGE, self.size):,} are not what they were when it was "
                    "opened: it was changed under the run, or the disk reads it wrong."
                )
        return content[begin - start : begin - start + count]

    def _raw(self, begin: int, count: int) -> bytes:
        return read_exactly(self.file.fileno(), self.path, begin, count)


def read_exactly(descriptor: int, path: Path | str, begin: int, count: int) -> bytes:
    """Bytes [begin, begin + count) of an open file. They are read, not mapped: from a mapped file that is cut later a process dies.

    Raises:
        DataError: if the file does not have them, or cannot be read.
    """
    try:
        content = os.pread(descriptor, count, begin)
        while len(content) < count and (more := os.pread(descriptor, count - len(content), begin + len(content))):
            content += more
    except OSError as error:
        raise DataError(f"{path}: bytes from {begin:,} on cannot be read: {error.strerror}.") from None
    if len(content) != count:
        size = os.fstat(descriptor).st_size
        raise DataError(
            f"{path}: {len(content):,} of {count:,} bytes at {begin:,} are there, the file has {size:,}, at least {begin + count:,} are "
            "expected: the file was cut since it was opened."
        )
    return content


class Numbers:
    """An array of integers in a checked file: `len`, single ones, and slices as numpy arrays."""

    def __init__(self, file: CheckedFile, kind: DTypeLike, begin: int, count: int):
        self.file, self.dtype, self.begin, self.count = file, np.dtype(kind), begin, count

    def __len__(self) -> int:
        return self.count

    @overload
    def __getitem__(self, wanted: int) -> int: ...
    @overload
    def __getitem__(self, wanted: slice) -> np.ndarray: ...
    def __getitem__(self, wanted: slice | int) -> int | np.ndarray:
        size = self.dtype.itemsize
        if not isinstance(wanted, slice):
            raw = self.file.read(self.begin + range(self.count)[wanted] * size, size)
            return int.from_bytes(raw, "little", signed=self.dtype.kind == "i")
        begin, end, step = wanted.indices(self.count)
        assert step == 1, wanted
        raw = self.file.read(self.begin + begin * size, max(0, end - begin) * size)
        return np.frombuffer(raw, self.dtype)


class IndexedDataset:
    """Reads documents by number. Opening reads the index once; what it keeps of it in memory is 4 bytes for 4 KiB.

    Args:
        check: compare every number of the index with the others.
        crc32: of the index, where a manifest says it.
    Attributes:
        num_documents, num_tokens, dtype.
    """

    def __init__(self, prefix: str | Path, check: bool = True, crc32: int | None = None):
        self.prefix = str(prefix)
        self._lengths, self._offsets, self.dtype = _open_index(Path(self.prefix + ".idx"), check, crc32)
        self.num_documents = len(self._lengths)
        binary = Path(self.prefix + ".bin")
        if not binary.is_file():
            raise DataError(f"{binary}: is missing although {self.prefix}.idx exists. Prepare the data again.")
        expected = int(self._offsets[-1]) + int(self._lengths[-1]) * self.dtype.itemsize if self.num_documents else 0
        actual = binary.stat().st_size
        if actual != expected:
            raise DataError(
                f"{binary}: has {actual:,} bytes, but {self.prefix}.idx describes {expected:,}. The file is "
                f"{'truncated' if actual < expected else 'longer than its index'}: copy it again or prepare it again."
            )
        self.num_tokens = expected // self.dtype.itemsize
        self._file = open(binary, "rb", buffering=0)

    @cached_property
    def lengths(self) -> np.ndarray:
        """int32 [documents], tokens of each document, all in memory from here on; `lengths_of` gives some."""
        return self.lengths_of(0, self.num_documents)

    def length_of(self, document: int) -> int:
        return int(self._lengths[document])

    def lengths_of(self, begin: int, end: int) -> np.ndarray:
        """int32 [end - begin], tokens of documents [begin, end)."""
        return np.asarray(self._lengths[begin:end])

    def read(self, document: int, offset: int, length: int) -> np.ndarray:
        """Tokens [offset, offset + length) of a document."""
        return self.tokens(int(self._offsets[document]) // self.dtype.itemsize + offset, length)

    def tokens(self, start: int, length: int) -> np.ndarray:
        """Tokens [start, start + length) of all.

        Raises:
            DataError: if the file no longer has them.
        """
        size = self.dtype.itemsize
        return np.frombuffer(
            read_exactly(self._file.fileno(), self.prefix + ".bin", start * size, length * size), self.dtype
        )


def _open_index(
    path: Path, check: bool, crc32: int | None
) -> tuple[Numbers | np.ndarray, Numbers | np.ndarray, np.dtype]:
    """(lengths, byte offsets) per document, and the dtype. Sequences of one document are joined."""
    try:
        with open(path, "rb") as file:
            header = file.read(_HEADER.size)
        if len(header) < _HEADER.size or header[:9] != MAGIC:
            raise DataError(f"{path}: is not an indexed dataset (it begins with {header[:9]!r}, not {MAGIC!r}).")
        raw = CheckedFile(path, crc32=crc32)
    except FileNotFoundError:
        raise DataError(
            f"{path}: no such file. `megacpt prepare` writes PREFIX.bin, PREFIX.idx and PREFIX.json."
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}.") from None
    _, version, code, sequences, boundaries = _HEADER.unpack(header)
    if version != 1 or code not in _DTYPES:
        raise DataError(
            f"{path}: version {version}, dtype code {code}. Read are version 1 and codes {sorted(_DTYPES)}."
        )
    expected = _HEADER.size + 12 * sequences + 8 * boundaries
    if raw.size != expected:
        raise DataError(
            f"{path}: has {raw.size:,} bytes, but its header asks for {expected:,} ({sequences:,} sequences, {boundaries:,} "
            "document boundaries). The file is damaged or multimodal: copy it again or prepare it again."
        )
    dtype = np.dtype(_DTYPES[code])
    lengths = Numbers(raw, "<i4", 34, sequences)
    offsets = Numbers(raw, "<i8", 34 + 4 * sequences, sequences)
    documents = Numbers(raw, "<i8", 34 + 12 * sequences, boundaries)
    if boundaries == 0 or documents[0] != 0 or documents[-1] != sequences:
        raise DataError(f"{path}: document boundaries do not run from 0 to the {sequences:,} sequences.")
    if check:
        _check_index(path, lengths, offsets, documents, dtype)
    if not _one_sequence_each(documents, sequences):
        return *_joined(path, lengths[:], documents[:], dtype), dtype
    return lengths, offsets, dtype


def _one_sequence_each(documents: Numbers, sequences: int) -> bool:
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


def _check_index(path: Path, lengths: Numbers, offsets: Numbers, documents: Numbers, dtype: np.dtype) -> None:
    """Every offset is the sum of the lengths before it; boundaries do not fall. In blocks: memory stays flat."""
    expected = 0
    for start in range(0, len(lengths), _BLOCK):
        sizes = lengths[start : start + _BLOCK].astype(np.int64) * dtype.itemsize
        ends = np.cumsum(sizes) + expected
        if sizes.min() < 0 or not np.array_equal(offsets[start : start + _BLOCK], ends - sizes):
            raise DataError(
                f"{path}: sequence offsets do not follow from the lengths near sequence {start:,}. The index is damaged."
            )
        expected = int(ends[-1])
    for start in range(0, len(documents) - 1, _BLOCK):
        if np.diff(documents[start : start + _BLOCK + 1]).min() < 0:
            raise DataError(f"{path}: document boundaries fall near document {start:,}. The index is damaged.")
