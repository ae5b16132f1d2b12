"""Readers of raw text: jsonl, parquet and plain text, plain or compressed, cut into pieces that processes can share.

A piece is a byte range of an uncompressed jsonl file (a line belongs to the piece in which it begins), a run of row
groups of a parquet file, a whole compressed file, or a group of plain-text files, one document a file. What a piece
yields depends on the piece alone.
"""

import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megacpt.data.records import BadLine, Document, Fields, read_record
from megacpt.errors import ConfigError, DataError
from megacpt.log import warn

MIN_PIECE_BYTES, MAX_PIECE_BYTES, PIECES = 2 << 20, 256 << 20, 1024
MAX_DOCUMENT_BYTES = 1 << 30
_KINDS = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}


@dataclass(frozen=True)
class Piece:
    """A part of the input. `begin` and `end` are bytes (jsonl), row groups (parquet) or unused (whole files)."""

    kind: str
    paths: tuple[str, ...]
    begin: int
    end: int
    num_bytes: int


def find_files(inputs: list[str], kind: str) -> list[tuple[str, str]]:
    """(path, kind) of every input file, folders walked in sorted order.

    Raises:
        ConfigError: for paths that do not exist and files of unknown kind, all at once.
    """
    files, problems = [], []
    for given in inputs:
        if os.path.isdir(given):
            found, broken = _walk(given)
            problems += [f"{link}: a link to what is not there. Fetch its content, or remove it." for link in broken]
            found = _without_cards(found, kind)
            if not found and not broken:
                problems.append(f"{given}: a folder without files (hidden ones and hidden folders are left out).")
        elif os.path.isfile(given):
            found = [given]
        else:
            problems.append(f"{given}: no such file or folder.")
            continue
        for path in found:
            this = kind if kind != "auto" else _KINDS.get(Path(_bare(path)).suffix.lower())
            if this is None:
                problems.append(
                    f"{path}: unknown kind. Known: {' '.join(_KINDS)}, also .gz and .zst; or give --format."
                )
            else:
                files.append((path, this))
    if problems:
        raise ConfigError(problems[:20] + ([f"… and {len(problems) - 20} more"] if problems[20:] else []), "the input")
    return files


def _walk(folder: str) -> tuple[list[str], list[str]]:
    """(files, links to nothing) of a folder, sorted. Hidden files and folders (caches, copies of editors) are left out; links to folders
    are followed, each folder once."""
    files, broken, seen = [], [], {os.path.realpath(folder)}
    for where, folders, names in os.walk(folder, followlinks=True):
        kept = []
        for name in sorted(name for name in folders if not name.startswith(".")):
            true = os.path.realpath(os.path.join(where, name))
            if true in seen:
                warn(f"{os.path.join(where, name)}: the same folder as one that is read already; it is left out.")
            else:
                kept.append(name)
            seen.add(true)
        folders[:] = kept
        paths = [os.path.join(where, name) for name in names if not name.startswith(".")]
        files += [path for path in paths if os.path.isfile(path)]
        broken += [path for path in paths if os.path.islink(path) and not os.path.exists(path)]
    return sorted(files), sorted(broken)


def _without_cards(files: list[str], kind: str) -> list[str]:
    """A README.md among files of records is the data set's card, not one of its documents."""
    kinds = {_KINDS.get(Path(_bare(path)).suffix.lower()) for path in files}
    cards = [path for path in files if Path(path).name.lower() == "readme.md"]
    if kind != "auto" or not cards or not kinds & {"jsonl", "parquet"}:
        return files
    warn(
        f"{', '.join(cards[:3])}: a description of the data, left out. Name it among the inputs to read it as a document."
    )
    return [path for path in files if path not in cards]


def cut(files: list[tuple[str, str]]) -> list[Piece]:
    """About `PIECES` pieces within the bounds of their size, in the order of the input. Small ones, so that workers end
    together; what is tokenized does not depend on where the cuts are."""
    total = sum(os.path.getsize(path) for path, _ in files)
    piece_bytes = min(MAX_PIECE_BYTES, max(MIN_PIECE_BYTES, total // PIECES))
    pieces: list[Piece] = []
    texts: list[str] = []
    text_bytes = 0

    def flush() -> None:
        nonlocal texts, text_bytes
        if texts:
            pieces.append(Piece("text", tuple(texts), 0, 0, text_bytes))
        texts, text_bytes = [], 0

    for path, kind in files:
        size = os.path.getsize(path)
        if kind == "text":
            texts, text_bytes = [*texts, path], text_bytes + size
            if text_bytes >= piece_bytes or len(texts) >= 4096:
                flush()
            continue
        flush()
        if kind == "parquet":
            pieces += _parquet_pieces(path, size, piece_bytes)
        elif _bare(path) != path:
            pieces.append(Piece("jsonl", (path,), 0, -1, size))
        else:
            edges = [*range(0, size, piece_bytes), size]
            pieces += [Piece("jsonl", (path,), a, b, b - a) for a, b in zip(edges, edges[1:], strict=False)]
    flush()
    return pieces


def _bare(path: str) -> str:
    return path[: path.rindex(".")] if path.endswith((".gz", ".zst")) else path


@contextmanager
def _open(path: str) -> Iterator[io.BufferedIOBase]:
    """The file's content, unpacked. What is wrong with an archive is an error of ours that names the file and the place.

    Raises:
        DataError: for an archive that is damaged or cut short.
    """
    with open(path, "rb") as raw:
        try:
            if path.endswith(".gz"):
                with gzip.GzipFile(fileobj=raw) as file:
                    yield file
            elif path.endswith(".zst"):
                with io.BufferedReader(_ZstdReader(raw), 1 << 20) as file:
                    yield file
            else:
                yield raw
        except (EOFError, zlib.error, gzip.BadGzipFile, _BadArchive) as error:
            raise DataError(
                f"{path}: damaged archive: {error}, at byte {raw.tell():,} of {os.path.getsize(path):,}. Copy it again."
            ) from None
        except MemoryError as error:
            raise DataError(
                f"{path}: no memory to unpack it ({error}). Fewer --workers need less, or pack it again without zstd's --long."
            ) from None


class _BadArchive(Exception):
    pass


class _ZstdReader(io.RawIOBase):
    """Frames of zstd, one behind the other, skippable ones among them, with windows of up to 2 GiB (`zstd --long=31`). The library's own
    stream reader takes the end of the file for the end of the data, also inside a frame."""

    INPUT_BYTES = 4096
    """Read at once. A block of 128 KiB may be packed into four bytes, so what comes out stays below 128 MiB."""

    def __init__(self, file: io.BufferedIOBase):
        import zstandard

        self._file, self._error = file, zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._frame = None
        """The frame that is open; None between frames."""
        self._waiting, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            packed = self._waiting or self._file.read(self.INPUT_BYTES)
            if not packed:
                if self._frame is not None:
                    raise _BadArchive("it ends inside a frame")
                return 0
            self._unpack(packed)
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _unpack(self, packed: bytes) -> None:
        if self._frame is None:
            self._frame = self._decompressor.decompressobj()
        try:
            self._ready = memoryview(self._frame.decompress(packed))
        except self._error as error:  # "Allocation error", "Frame requires too much memory"
            raise (MemoryError if "memory" in str(error) else _BadArchive)(str(error)) from None
        self._waiting = b""
        if self._frame.eof:
            self._waiting, self._frame = self._frame.unused_data, None


Reading = Iterator[tuple[Document | BadLine, int]]
"""Records in order, each with the bytes of input that were passed by then."""


def read_piece(piece: Piece, fields: Fields) -> Reading:
    """Every record of a piece. Plain text has no fields: a file is a document."""
    reader = {"jsonl": _read_jsonl, "parquet": _read_parquet, "text": _read_text}[piece.kind]
    return reader(piece, fields)


def _read_jsonl(piece: Piece, fields: Fields) -> Reading:
    path = piece.paths[0]
    with _open(path) as file:
        raw = file if piece.end >= 0 else None
        if piece.begin:
            file.seek(piece.begin - 1)
            file.readline()  # the line that began in the piece before, or the newline that ended it
        position, number = file.tell() if raw else 0, 0
        while piece.end < 0 or position < piece.end:
            line = file.readline(MAX_DOCUMENT_BYTES)
            if not line:
                break
            number, position = number + 1, position + len(line)
            if line.strip():
                yield _parse(line, fields, path, number), position - piece.begin


def _parse(line: bytes, fields: Fields, path: str, number: int) -> Document | BadLine:
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        return BadLine(path, number, f"invalid UTF-8: {error.reason} at byte {error.start}")
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of more digits than Python reads
        return BadLine(path, number, f"not valid JSON: {error}")
    if not isinstance(record, dict):
        return BadLine(path, number, f"is a {type(record).__name__}, not an object")
    for name in fields.flags:
        if name not in record:
            reason = f"has no field {name!r}; its fields are {', '.join(map(repr, record)) or 'none'}"
            return BadLine(path, number, reason)
    return read_record(record, fields, path, number)


def _parquet_pieces(path: str, size: int, piece_bytes: int) -> list[Piece]:
    groups = _parquet(path).num_row_groups
    per_piece = max(1, groups * piece_bytes // max(size, 1))
    edges = [*range(0, groups, per_piece), groups]
    return [Piece("parquet", (path,), a, b, size * (b - a) // groups) for a, b in zip(edges, edges[1:], strict=False)]


def _parquet(path: str):
    import pyarrow.parquet

    with _parquet_errors(path, "not a parquet file"):
        file = pyarrow.OSFile(os.fsencode(path))  # a name need not be UTF-8
        return pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)


@contextmanager
def _parquet_errors(path: str, what: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: {what} ({str(error).splitlines()[0]}). Copy it again.") from None


def _read_parquet(piece: Piece, fields: Fields) -> Reading:
    path = piece.paths[0]
    file = _parquet(path)
    names = file.schema_arrow.names
    for column, flag in fields.flags.items():
        if names.count(column) != 1:
            many = f"{names.count(column)} columns {column!r}" if column in names else f"no column {column!r}"
            raise DataError(f"{path}: has {many}; its columns are {', '.join(names)}. Give {flag}.")
    before = sum(file.metadata.row_group(g).num_rows for g in range(piece.begin))
    rows = max(1, sum(file.metadata.row_group(g).num_rows for g in range(piece.begin, piece.end)))
    number = 0
    columns = list(fields.flags)
    batches = file.iter_batches(256, row_groups=range(piece.begin, piece.end), columns=columns)
    while True:
        with _parquet_errors(path, f"damaged behind row {before + number:,}"):
            batch = next(batches, None)
            if batch is None:
                return
            values = [_values(batch.column(column)) for column in columns]
        for row in zip(*values, strict=True):
            number += 1
            document = read_record(dict(zip(columns, row, strict=True)), fields, path, before + number)
            yield document, piece.num_bytes * number // rows


def _values(column) -> list:
    """Of a column of parquet. In the place of a string that is no UTF-8 stands the error: it is one bad line, not the end of the file."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(scalar) for scalar in column]


def _value(scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error


def _read_text(piece: Piece, fields: Fields) -> Reading:
    position = 0
    for path in piece.paths:
        position += os.path.getsize(path)
        with _open(path) as file:
            raw = file.read()
        try:
            yield Document(raw.decode("utf-8")), position
        except UnicodeDecodeError as error:
            line = raw[: error.start].count(b"\n") + 1
            yield BadLine(path, line, f"invalid UTF-8: {error.reason} at byte {error.start}"), position


def line_in_file(piece: Piece, line: int) -> int:
    """A bad line's number in its file: the piece's number plus the lines before the piece. Reads the file up to there."""
    if piece.kind != "jsonl" or piece.begin == 0:
        return line
    with open(piece.paths[0], "rb") as file:
        file.seek(piece.begin - 1)
        start = piece.begin - 1 + len(file.readline())
        file.seek(0)
        before = 0
        while (left := start - file.tell()) > 0:
            before += file.read(min(left, 1 << 22)).count(b"\n")
    return before + line
