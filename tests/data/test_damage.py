"""Index files that are not what they were: a packing index is built again, an .idx is an error; neither gives other rows, whether it is
damaged before it is opened or under who reads it."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import megacpt.data.packing as packing
from megacpt.data.beside import RUN, write_items, write_weights
from megacpt.data.domain import DomainData
from megacpt.data.indexed import CheckedFile, IndexedDataset
from megacpt.data.loader import make_batch
from megacpt.data.manifest import BESIDE, crc32_of, verify_data
from megacpt.data.packing import FILES, ITEMS, SUMS, PackingIndex, Unsound, open_index
from megacpt.data.select import Selection
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


@pytest.fixture
def beside(prepared, tmp_path):
    """A function: a copy of set `a` with weights and items, opened. Every third document has runs; items are of two documents."""
    for kind in ("bin", "idx", "json"):
        shutil.copy(prepared / f"a.{kind}", tmp_path / f"a.{kind}")
    lengths = IndexedDataset(tmp_path / "a").lengths
    some = [i % 3 == 0 and n > 3 for i, n in enumerate(lengths)]
    runs = [np.array([(n // 2, 0), (n, 1.5)] if has else [], RUN) for has, n in zip(some, lengths, strict=True)]
    sizes = len(lengths), sum(map(len, runs))
    write_weights(tmp_path / "a.weights", [np.array([len(each) for each in runs])], runs, sizes)
    write_items(tmp_path / "a.items", np.arange(0, len(lengths), 2), len(lengths))
    manifest = json.loads((tmp_path / "a.json").read_text())
    for kind in BESIDE:
        path = tmp_path / f"a.{kind}"
        manifest[kind] = {"bytes": path.stat().st_size, "crc32": crc32_of(path), "longest_tokens": 700}
    (tmp_path / "a.json").write_text(json.dumps(manifest))
    return lambda: DomainData([str(tmp_path / "a")])


def sums_of(index: PackingIndex) -> list:
    return [(index.row(row), index.items(row), index.sums(row)) for row in range(index.num_rows)]


@pytest.mark.parametrize("name", [*SUMS, *ITEMS])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_sums_of_rows_are_built_again(beside, tmp_path, name, damage, capsys):
    whole = {n: sums_of(open_index(beside(), Selection(n), str(tmp_path / "cache"))) for n in (1024, 2048)}
    DAMAGES[damage](folder_of(tmp_path / "cache", 1024) / name)
    assert sums_of(open_index(beside(), Selection(1024), str(tmp_path / "cache"))) == whole[1024]
    told = capsys.readouterr().err
    assert "is built again" in told and name in told


@pytest.mark.parametrize("kind", BESIDE)
@pytest.mark.parametrize("damage", [name for name in DAMAGES if name != "another's"])
def test_damaged_weights_and_items_are_an_error(beside, tmp_path, kind, damage):
    DAMAGES[damage](tmp_path / f"a.{kind}")
    with pytest.raises(DataError, match=rf"a\.{kind}"):
        open_index(beside(), Selection(1024), str(tmp_path / "cache"))
    with pytest.raises(DataError, match=rf"a\.{kind}"):
        verify_data(str(tmp_path / "a"))


@pytest.mark.parametrize("kind", BESIDE)
def test_every_byte_of_weights_and_items_counts(beside, tmp_path, kind):
    raw = (tmp_path / f"a.{kind}").read_bytes()
    for at in range(0, len(raw), 13):
        damaged = bytearray(raw)
        damaged[at] ^= 1 << at % 8
        (tmp_path / f"a.{kind}").write_bytes(damaged)
        with pytest.raises(DataError, match=rf"a\.{kind}"):
            beside().next_item(1)


@pytest.mark.parametrize(
    "kind, at, value, told",
    [
        ("weights", 0, b"MCPTITM", "begins with b'MCPTITM"),
        ("weights", 8, b"\x02", "of version 2"),
        ("weights", 16, b"\x01", "is of .* documents; its header asks for"),
        ("items", 24, b"\x01", "its header asks for"),
        ("weights", 32, b"\x01", "its runs do not go from 0"),
        ("weights", 40, b"\xff", "the runs of document 1 do not cover it in order"),
        ("weights", -1, b"\xbf", "or a weight is negative"),
        ("weights", -2, b"\x80\x7f", "not finite"),
        ("weights", -8, b"\x01", "do not cover it in order"),
        ("items", 40, b"\x00", "do not part the"),
        ("items", 32, b"\x01", "do not part the"),
        ("items", -8, b"\x01", "do not part the"),
    ],
)
def test_a_file_that_is_sound_by_its_checksum_and_wrong_is_an_error(beside, tmp_path, kind, at, value, told):
    """As another program may write it: magic, version, sizes, and every number against the others."""
    path = tmp_path / f"a.{kind}"
    raw = bytearray(path.read_bytes())
    raw[at % len(raw) : at % len(raw) + len(value)] = value
    path.write_bytes(raw)
    manifest = json.loads((tmp_path / "a.json").read_text())
    manifest[kind]["crc32"] = crc32_of(path)
    (tmp_path / "a.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=rf"a\.{kind}: .*{told}"):
        open_index(beside(), Selection(1024), str(tmp_path / "cache"))


@pytest.mark.parametrize("damage", ["cut by a byte", "empty", "zeros"])
def test_weights_that_are_changed_under_a_run_are_an_error(beside, tmp_path, damage):
    domain = beside()
    index = open_index(domain, Selection(1024), str(tmp_path / "cache"))
    whole = make_batch([(index, "a", 0)], 1024, 0, 401).weights
    UNDER[damage](tmp_path / "a.weights")
    with pytest.raises(DataError, match=r"a\.weights"):
        assert (make_batch([(index, "a", 0)], 1024, 0, 401).weights == whole).all()
        make_batch([(index, "a", row) for row in range(index.num_rows)], 1024, 0, 401)


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
