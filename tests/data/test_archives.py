"""Compressed text and parquet: whole ones in every form are read whole, and one that is cut or damaged is an error with its name and the
place, never the part of it that happened to be read."""

import gzip
import json
import random
import struct
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

import megacpt.data.text as text_module
from megacpt.data.records import BadLine, Fields
from megacpt.data.text import cut, find_files, read_piece
from megacpt.errors import DataError

_random = random.Random(0)
TEXTS = [f"document {i} {_random.getrandbits(320):x}" for i in range(3000)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
SKIPPABLE = struct.pack("<II", 0x184D2A50, 5) + b"hello"


def read(path, content: bytes) -> list:
    """Every record of a file of these bytes: its text, or what is wrong with it."""
    path.write_bytes(content)
    records = [r for piece in cut(find_files([str(path)], "auto")) for r, _ in read_piece(piece, Fields())]
    return [r if isinstance(r, BadLine) else r.text for r in records]


def streamed(content: bytes, **parameters) -> bytes:
    """A frame without its size in the header, as `zstd` writes from a pipe."""
    packer = zstandard.ZstdCompressor(**parameters).compressobj()
    return packer.compress(content) + packer.flush()


def window(log: int) -> bytes:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=log, enable_ldm=True)
    return streamed(LINES, compression_params=parameters)


WHOLE = {
    "one frame": zstandard.compress(LINES),
    "streamed": streamed(LINES),
    "with checksum": zstandard.ZstdCompressor(write_checksum=True).compress(LINES),
    "frames joined": zstandard.compress(LINES[:70_001]) + zstandard.compress(b"") + streamed(LINES[70_001:]),
    "skippable frames": SKIPPABLE + zstandard.compress(LINES[:999]) + SKIPPABLE + zstandard.compress(LINES[999:]) + SKIPPABLE,
    "--long=28": window(28),
    "--long=31": window(31),
}  # fmt: skip


@pytest.mark.parametrize("kind", WHOLE)
def test_every_form_of_zstd_is_read_whole(tmp_path, kind):
    assert read(tmp_path / "t.jsonl.zst", WHOLE[kind]) == TEXTS
    assert read(tmp_path / "t.txt.zst", WHOLE[kind]) == [LINES.decode()]


@pytest.mark.parametrize("name", ["t.jsonl.zst", "t.txt.zst"])
@pytest.mark.parametrize("kind", WHOLE)
def test_zstd_that_is_cut_anywhere_is_an_error(tmp_path, name, kind):
    """Behind the first byte, in the middle of a block, before the last byte; only between two frames a cut leaves a whole archive."""
    whole = WHOLE[kind]
    ends = {len(SKIPPABLE)} if whole.startswith(SKIPPABLE) else set()
    for cut_at in (1, 3, 9, 15, len(whole) // 3, len(whole) // 2, len(whole) - 40, len(whole) - 1):
        if cut_at in ends:
            continue
        with pytest.raises(DataError, match=rf"{name}: damaged archive: it ends inside a frame, at byte {cut_at:,} of"):
            read(tmp_path / name, whole[:cut_at])


def test_the_comparison_sees_a_reader_that_does_not_tell(tmp_path, monkeypatch):
    """The twin: the library's own stream reader takes half a frame for the whole."""
    library = lambda file: zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
    monkeypatch.setattr(text_module, "_ZstdReader", library)
    records = read(tmp_path / "t.jsonl.zst", WHOLE["streamed"][: len(WHOLE["streamed"]) // 2])
    assert 100 < len(records) < len(TEXTS)


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0x5A]) + content[at + 1 :]


GZIP = gzip.compress(LINES, mtime=0)
CHECKED = WHOLE["with checksum"]
DAMAGED = {
    "t.jsonl.zst": [flipped(CHECKED, len(CHECKED) // 2), flipped(CHECKED, len(CHECKED) - 1), CHECKED + b"more", b"none"],
    "t.jsonl.gz": [GZIP[:5], GZIP[: len(GZIP) // 2], GZIP[:-3], flipped(GZIP, len(GZIP) // 2), flipped(GZIP, len(GZIP) - 6),
                   flipped(GZIP, 10), GZIP + b"more", b"none"],
}  # fmt: skip


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
@pytest.mark.parametrize(
    "name, number", [(name, i) for name, contents in DAMAGED.items() for i in range(len(contents))]
)
def test_what_is_damaged_is_an_error_with_its_name_and_the_place(tmp_path, name, number, kind):
    name, content = name.replace("jsonl", kind), DAMAGED[name][number]
    with pytest.raises(DataError, match=rf"{name}: damaged archive: .*, at byte [\d,]+ of {len(content):,}"):
        read(tmp_path / name, content)


def test_no_memory_for_a_window_is_not_called_damage(tmp_path, monkeypatch):
    small = zstandard.ZstdDecompressor(max_window_size=1 << 20)
    monkeypatch.setattr(zstandard, "ZstdDecompressor", lambda **_: small)
    with pytest.raises(DataError, match=r"t.jsonl.zst: no memory to unpack it \(.*too much memory.*--long"):
        read(tmp_path / "t.jsonl.zst", WHOLE["--long=28"])


def test_a_cut_archive_ends_prepare_with_76(tmp_path, tokenizer_dir):
    (tmp_path / "t.jsonl.zst").write_bytes(WHOLE["one frame"][:-500])
    command = [
        sys.executable,
        "-m",
        "megacpt",
        "prepare",
        str(tmp_path / "t.jsonl.zst"),
        "--tokenizer",
        str(tokenizer_dir),
    ]
    done = subprocess.run([*command, "--output", str(tmp_path / "o"), "--workers", "1"], capture_output=True, text=True)
    assert done.returncode == 76 and "ends inside a frame" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "o.json").exists()


def parquet(path, table, spoil=None, **options) -> list:
    pyarrow.parquet.write_table(table, path, **options)
    content = path.read_bytes()
    return read(path, spoil(content) if spoil else content)


INVALID = pyarrow.Array.from_buffers(
    pyarrow.string(), 3, [None, pyarrow.array([0, 1, 5, 6], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"acaf\xe9b")]
)  # fmt: skip


@pytest.mark.parametrize(
    "column", [INVALID, INVALID.cast(pyarrow.large_string()), INVALID.dictionary_encode()], ids=["string", "large", "dictionary"]
)  # fmt: skip
def test_a_string_of_parquet_that_is_no_utf8_is_one_bad_line(tmp_path, column):
    first, bad, last = parquet(tmp_path / "t.parquet", pyarrow.table({"text": column}))
    assert (first, last) == ("a", "b") and isinstance(bad, BadLine)
    assert bad.line == 2 and bad.path.endswith("t.parquet") and "invalid UTF-8" in bad.reason


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pyarrow.table([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    with pytest.raises(DataError, match="t.parquet: has 2 columns 'text'"):
        parquet(tmp_path / "t.parquet", table)


@pytest.mark.parametrize("compression", ["snappy", "gzip", "lz4", "brotli"])
def test_damaged_parquet_is_an_error_with_its_name_and_the_row(tmp_path, compression):
    spoil = lambda content: content[: len(content) // 2] + bytes(200) + content[len(content) // 2 + 200 :]
    with pytest.raises(DataError, match=r"t.parquet: damaged behind row [\d,]+ \("):
        parquet(
            tmp_path / "t.parquet", pyarrow.table({"text": TEXTS}), spoil, compression=compression, row_group_size=500
        )


def test_damage_that_unpacks_is_seen_where_parquet_has_checksums(tmp_path):
    spoil = lambda content: flipped(content, len(content) // 2)
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    with pytest.raises(DataError, match="t.parquet: damaged behind row"):
        parquet(tmp_path / "t.parquet", pyarrow.table({"text": TEXTS}), spoil, **options)


def test_cut_parquet_is_an_error(tmp_path):
    with pytest.raises(DataError, match="t.parquet: not a parquet file"):
        parquet(tmp_path / "t.parquet", pyarrow.table({"text": TEXTS}), lambda content: content[:-100])


def test_an_integer_that_python_does_not_read_is_a_bad_line(tmp_path):
    bad, good = read(tmp_path / "t.jsonl", b'{"text": "x", "id": ' + b"9" * 5000 + b'}\n{"text": "fine"}\n')
    assert isinstance(bad, BadLine) and bad.line == 1 and good == "fine"


def test_much_text_from_few_bytes_does_not_fill_the_memory(tmp_path):
    """1 GiB of one letter packs into 33 KB; what is unpacked at once stays small."""
    packer = zstandard.ZstdCompressor(level=1).compressobj()
    line = b"x" * (1 << 20) + b"\n"
    packed = b"".join(packer.compress(line) for _ in range(256)) + packer.flush()
    (tmp_path / "t.jsonl.zst").write_bytes(packed)
    most = 0
    with text_module._open(str(tmp_path / "t.jsonl.zst")) as file:
        inner = file.raw
        while file.read(1 << 16):
            most = max(most, len(inner._ready))
    assert most <= 128 << 20
