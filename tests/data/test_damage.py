"""Index files that are not what they were: a packing index is built again, an .idx is an error; neither gives other rows, whether it is
damaged before it is opened or under who reads it."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import megacpt.data.packing as packing
from megacpt.data.indexed import CheckedFile, IndexedDataset
from megacpt.data.manifest import crc32_of
from megacpt.data.packing import FILES, DomainData, PackingIndex, Selection, Unsound, open_index
from megacpt.errors import DataError
from megacpt.files import sealed, temporary, unsealed


def flipped(path: Path, at: float = 0.5) -> None:
    raw = bytearray(path.read_bytes())
    raw[int(at * (len(raw) - 1))] ^= 4
    path.write_bytes(raw)


def swapped(path: Path) -> None:
    """With the file of the other index beside it."""
    other = next(p for p in path.parent.parent.iterdir() if p.is_dir() and p != path.parent)
    shutil.copyfile(other / path.name, path)


def made_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = {
    "a bit at the start": lambda p: flipped(p, 0.0),
    "a bit in the middle": flipped,
    "a bit at the end": lambda p: flipped(p, 1.0),
    "cut by a byte": lambda p: os.truncate(p, p.stat().st_size - 1),
    "cut by eight": lambda p: os.truncate(p, p.stat().st_size - 8),
    "empty": lambda p: os.truncate(p, 0),
    "zeros": lambda p: p.write_bytes(bytes(p.stat().st_size)),
    "longer": lambda p: p.write_bytes(p.read_bytes() + bytes(8)),
    "deleted": Path.unlink,
    "another's": swapped,
    "a folder": made_a_folder,
}


@pytest.fixture
def domain(prepared):
    return DomainData([str(prepared / "a"), str(prepared / "b")])


@pytest.fixture
def cache(domain, tmp_path):
    """Two indices, of rows of 32 and of 48 tokens."""
    for seq_len in (32, 48):
        open_index(domain, Selection(seq_len), str(tmp_path / "cache"))
    return tmp_path / "cache"


def rows_of(index: PackingIndex) -> list:
    return [index.row(row) for row in range(index.num_rows)]


def folder_of(cache: Path, seq_len: int = 32) -> Path:
    return next(cache.glob(f"best_fit-{seq_len}-*"))


@pytest.mark.parametrize("name", [*FILES, "index.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_packing_index_is_built_again(domain, cache, name, damage, capsys):
    whole = rows_of(open_index(domain, Selection(32), str(cache)))
    content = {p.name: p.read_bytes() for p in folder_of(cache).iterdir()}
    DAMAGES[damage](folder_of(cache) / name)
    assert rows_of(open_index(domain, Selection(32), str(cache))) == whole
    told = capsys.readouterr().err
    assert "is built again" in told and name in told
    assert {p.name: p.read_bytes() for p in folder_of(cache).iterdir()} == content
    assert len(list(cache.iterdir())) == 2, "nothing is left beside the indices"


def test_the_healing_is_seen_to_be_needed(domain, cache, monkeypatch):
    """The twin: without the checksum of the file, zeros are other rows."""
    whole = rows_of(open_index(domain, Selection(32), str(cache)))
    DAMAGES["zeros"](folder_of(cache) / "piece_document.bin")
    monkeypatch.setattr(packing, "CheckedFile", lambda path, size, crc32: CheckedFile(path, size))
    assert rows_of(open_index(domain, Selection(32), str(cache))) != whole


def test_every_byte_of_a_packing_index_counts(domain, cache):
    folder = folder_of(cache)
    for path in sorted(folder.iterdir()):
        raw = path.read_bytes()
        for at in range(0, len(raw), 1 if path.suffix == ".json" else 31):
            damaged = bytearray(raw)
            damaged[at] ^= 1 << at % 8
            path.write_bytes(damaged)
            try:
                unsealed(json.loads(damaged)) if path.suffix == ".json" else PackingIndex(folder, domain, 32)
            except (Unsound, ValueError):
                continue
            assert json.loads(damaged) == json.loads(raw), (path.name, at)  # a blank between two words
        path.write_bytes(raw)


def test_a_folder_of_another_index_or_version_is_built_again(domain, cache):
    whole = rows_of(open_index(domain, Selection(32), str(cache)))
    shutil.rmtree(folder_of(cache))
    shutil.copytree(folder_of(cache, 48), cache / "x")
    name = packing_name(domain, cache)
    os.rename(cache / "x", cache / name)
    assert rows_of(open_index(domain, Selection(32), str(cache))) == whole
    path = cache / name / "index.json"
    path.write_text(sealed(unsealed(json.loads(path.read_bytes())) | {"version": 2}))
    assert rows_of(open_index(domain, Selection(32), str(cache))) == whole
    shutil.rmtree(cache / name)
    (cache / name).write_text("a file in its place")
    assert rows_of(open_index(domain, Selection(32), str(cache))) == whole


def packing_name(domain, cache) -> str:
    open_index(domain, Selection(32), str(cache))
    name = folder_of(cache).name
    shutil.rmtree(cache / name)
    return name


def test_an_index_that_cannot_be_built_is_an_error_of_ours(domain, cache, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    DAMAGES["zeros"](folder_of(cache) / "row_start.bin")
    monkeypatch.setattr(packing, "_write_rows", full)
    with pytest.raises(DataError, match="cannot be written: No space left on device"):
        open_index(domain, Selection(32), str(cache))
    monkeypatch.undo()
    assert open_index(domain, Selection(32), str(cache)).num_rows


@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "another's"])
def test_a_damaged_idx_is_an_error(prepared, tmp_path, damage):
    for kind in ("bin", "idx", "json"):
        shutil.copy(prepared / f"a.{kind}", tmp_path / f"a.{kind}")
    DAMAGES[damage](tmp_path / "a.idx")
    with pytest.raises(DataError, match=r"a\.idx"):
        DomainData([str(tmp_path / "a")])


def test_every_byte_of_an_idx_counts(prepared, tmp_path):
    for kind in ("bin", "idx", "json"):
        shutil.copy(prepared / f"a.{kind}", tmp_path / f"a.{kind}")
    raw = (tmp_path / "a.idx").read_bytes()
    for at in range(0, len(raw), 17):
        damaged = bytearray(raw)
        damaged[at] ^= 1 << at % 8
        (tmp_path / "a.idx").write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.idx"):
            DomainData([str(tmp_path / "a")])


def test_an_idx_with_consistent_other_lengths_is_an_error(prepared, tmp_path):
    """Another set's index of the same size, under this set's manifest: only the checksum knows."""
    from megacpt.data.indexed import write_index

    for kind in ("bin", "idx", "json"):
        shutil.copy(prepared / f"a.{kind}", tmp_path / f"a.{kind}")
    data = IndexedDataset(tmp_path / "a")
    other = data.lengths.copy()
    other[0], other[1] = other[0] - 1, other[1] + 1
    write_index(tmp_path / "a.idx", data.dtype, [other], len(other))
    assert IndexedDataset(tmp_path / "a").num_tokens == data.num_tokens, "it is sound in itself"
    with pytest.raises(DataError, match=r"a\.idx: its CRC32 is"):
        DomainData([str(tmp_path / "a")])


UNDER = {
    "cut by a byte": lambda p: os.truncate(p, p.stat().st_size - 1),
    "empty": lambda p: os.truncate(p, 0),
    "zeros": lambda p: p.open("r+b").write(bytes(p.stat().st_size)),
    "cut and longer again": lambda p: (size := p.stat().st_size, os.truncate(p, 10), os.truncate(p, size)),
}


@pytest.mark.parametrize("name", [*FILES, "a.idx"])
@pytest.mark.parametrize("damage", UNDER)
def test_a_file_that_is_changed_under_its_reader_never_gives_other_rows(prepared, tmp_path, name, damage):
    """As under a running job: what is read is what was there, or an error that names the file."""
    for kind in ("bin", "idx", "json"):
        shutil.copy(prepared / f"a.{kind}", tmp_path / f"a.{kind}")
    index = open_index(DomainData([str(tmp_path / "a")]), Selection(32), str(tmp_path / "cache"))
    whole = rows_of(index)
    path = tmp_path / name if name == "a.idx" else folder_of(tmp_path / "cache") / name
    size = path.stat().st_size
    UNDER[damage](path)
    errors = []
    for row, expected in enumerate(whole):
        try:
            assert index.row(row) == expected
            for document, offset, length in expected:
                index.domain.read(document, offset, length)
        except DataError as error:
            errors.append(str(error))
    assert errors and all(name in error for error in errors)
    if path.stat().st_size < size:
        assert any(f"the file has {path.stat().st_size:,}" in e and "was cut since it was opened" in e for e in errors)


def test_large_reads_are_compared_page_by_page(tmp_path):
    path = tmp_path / "f"
    content = np.random.default_rng(0).bytes(5 * 4096 + 17)
    path.write_bytes(content)
    file = CheckedFile(path, len(content), crc32_of(path))
    assert all(bytes(file.read(a, b - a)) == content[a:b] for a, b in [(0, 1), (4095, 4097), (0, len(content)), (7, 7)])
    with open(path, "r+b") as raw:
        raw.seek(2 * 4096 + 5)
        raw.write(bytes([content[2 * 4096 + 5] ^ 1]))
    assert bytes(file.read(3 * 4096, 100)) == content[3 * 4096 : 3 * 4096 + 100]
    with pytest.raises(DataError, match="bytes 8,192 to 12,288 are not what they were"):
        file.read(0, len(content))


BUILD = packing._build


def test_two_that_build_the_same_index_build_it_once(prepared, tmp_path, domain):
    """Four processes at once; what a killed one has left is removed, what a living one writes is not."""
    cache = tmp_path / "cache"
    cache.mkdir()
    gone = os.fork()
    if gone == 0:
        (temporary(cache / "left")).mkdir()
        os._exit(0)
    os.waitpid(gone, 0)
    mine = temporary(cache / "mine")
    mine.mkdir()
    assert len(list(cache.iterdir())) == 2
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                packing._build = lambda *given: ((tmp_path / f"built-{os.getpid()}").touch(), BUILD(*given))
                open_index(domain, Selection(32), str(cache))
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert len(list(tmp_path.glob("built-*"))) == 1
    assert sorted(p.name for p in cache.iterdir()) == [mine.name, folder_of(cache).name]


def test_a_builder_that_is_killed_blocks_nobody(domain, tmp_path, monkeypatch):
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(packing, "_write_rows", lambda *_: os.kill(os.getpid(), 9))
        open_index(domain, Selection(32), str(tmp_path))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    assert list(tmp_path.glob(".tmp-*"))
    assert open_index(domain, Selection(32), str(tmp_path)).num_rows
    assert [p.name for p in tmp_path.iterdir()] == [folder_of(tmp_path).name]


def test_an_intact_index_is_read_where_nothing_can_be_written(domain, cache, monkeypatch):
    def refused(*_, **__):
        raise OSError(30, "Read-only file system")

    def opened(path, flags, *rest, real=os.open, **more):
        return refused() if flags & (os.O_WRONLY | os.O_RDWR) else real(path, flags, *rest, **more)

    monkeypatch.setattr(packing.Path, "mkdir", refused)
    monkeypatch.setattr(packing.os, "open", opened)
    assert open_index(domain, Selection(32), str(cache)).num_rows
    with pytest.raises(DataError, match="cannot be written: Read-only file system"):
        open_index(domain, Selection(64), str(cache))
