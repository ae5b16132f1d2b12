"""Readers of raw text: jsonl, parquet and plain text, plain or compressed, cut into pieces that processes can share.

A piece is a byte range of an uncompressed jsonl file (a line belongs to the piece in which it begins), a run of row
groups of a parquet file, a whole compressed file, or a group of plain-text files, one document a file. What a piece
yields depends on the piece alone.
"""

import gzip
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megacpt.errors import ConfigError, DataError

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


@dataclass(frozen=True)
class BadLine:
    """A record that could not be read. `line` is counted from the piece's begin, 1-based; rows of a parquet file too."""

    path: str
    line: int
    reason: str


def find_files(inputs: list[str], kind: str) -> list[tuple[str, str]]:
    """(path, kind) of every input file, folders walked in sorted order.

    Raises:
        ConfigError: for paths that do not exist and files of unknown kind, all at once.
    """
    files, problems = [], []
    for given in inputs:
        if os.path.isdir(given):
            found = sorted(str(p) for p in Path(given).rglob("*") if p.is_file() and not p.name.startswith("."))
            if not found:
                problems.append(f"{given}: an empty folder.")
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


def _open(path: str) -> io.BufferedIOBase:
    if path.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.endswith(".zst"):
        import zstandard

        return io.BufferedReader(
            zstandard.ZstdDecompressor().stream_reader(open(path, "rb"), read_across_frames=True), 1 << 20
        )
    return open(path, "rb")


Record = tuple[str | BadLine, int, str]
"""Text or bad line, bytes of input passed so far, the record's label ("" without)."""


def read_piece(piece: Piece, field: str, label: str | None = None) -> Iterator[Record]:
    """Every record of a piece.

    Args:
        label: field or column with a label; plain text has none.
    """
    reader = {"jsonl": _read_jsonl, "parquet": _read_parquet, "text": _read_text}[piece.kind]
    return reader(piece, field, label)


def _read_jsonl(piece: Piece, field: str, label: str | None) -> Iterator[Record]:
    path = piece.paths[0]
    try:
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
                    text, name = _parse(line, field, label, path, number)
                    yield text, position - piece.begin, name
    except (EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged archive: {error}. Copy it again.") from None
    except Exception as error:
        if type(error).__name__ == "ZstdError":
            raise DataError(f"{path}: damaged archive: {error}. Copy it again.") from None
        raise


def _parse(line: bytes, field: str, label: str | None, path: str, number: int) -> tuple[str | BadLine, str]:
    bad = lambda reason: (BadLine(path, number, reason), "")
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        return bad(f"invalid UTF-8: {error.reason} at byte {error.start}")
    except (json.JSONDecodeError, RecursionError) as error:
        return bad(f"not valid JSON: {error}")
    if not isinstance(record, dict):
        return bad(f"is a {type(record).__name__}, not an object")
    for name in (field, label):
        if name is not None and name not in record:
            return bad(f"has no field {name!r}; its fields are {', '.join(map(repr, record)) or 'none'}")
    if label is not None and not isinstance(record[label], str):
        return bad(f"field {label!r} is a {type(record[label]).__name__}, not a string")
    return _checked(record[field], field, path, number), record[label] if label is not None else ""


def _checked(text, field: str, path: str, number: int) -> str | BadLine:
    if not isinstance(text, str):
        return BadLine(path, number, f"field {field!r} is a {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may spell half a surrogate pair
        return BadLine(path, number, f"invalid Unicode: {error.reason} at character {error.start}")
    return text


def _parquet_pieces(path: str, size: int, piece_bytes: int) -> list[Piece]:
    groups = _parquet(path).num_row_groups
    per_piece = max(1, groups * piece_bytes // max(size, 1))
    edges = [*range(0, groups, per_piece), groups]
    return [Piece("parquet", (path,), a, b, size * (b - a) // groups) for a, b in zip(edges, edges[1:], strict=False)]


def _parquet(path: str):
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a parquet file ({error}).") from None


def _read_parquet(piece: Piece, field: str, label: str | None) -> Iterator[Record]:
    path = piece.paths[0]
    file = _parquet(path)
    names = file.schema_arrow.names
    columns = [field] if label is None else [field, label]
    for column, flag in zip(columns, ("--text-field", "--domain-field"), strict=False):
        if column not in names:
            raise DataError(f"{path}: has no column {column!r}; its columns are {', '.join(names)}. Give {flag}.")
    before = sum(file.metadata.row_group(g).num_rows for g in range(piece.begin))
    rows = max(1, sum(file.metadata.row_group(g).num_rows for g in range(piece.begin, piece.end)))
    number = 0
    for batch in file.iter_batches(256, row_groups=range(piece.begin, piece.end), columns=columns):
        texts = batch.column(columns[0]).to_pylist()
        labels = batch.column(label).to_pylist() if label is not None else [""] * len(texts)
        for value, name in zip(texts, labels, strict=True):
            number += 1
            text = _checked(value, field, path, before + number)
            if not isinstance(name, str):
                text = BadLine(path, before + number, f"field {label!r} is a {type(name).__name__}, not a string")
            yield text, piece.num_bytes * number // rows, name or ""


def _read_text(piece: Piece, field: str, label: str | None) -> Iterator[Record]:
    position = 0
    for path in piece.paths:
        position += os.path.getsize(path)
        with _open(path) as file:
            raw = file.read()
        try:
            yield raw.decode("utf-8"), position, ""
        except UnicodeDecodeError as error:
            line = raw[: error.start].count(b"\n") + 1
            yield BadLine(path, line, f"invalid UTF-8: {error.reason} at byte {error.start}"), position, ""


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
