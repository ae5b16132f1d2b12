import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import megacpt.data.packing as packing
from megacpt.data.domain import DomainData
from megacpt.data.fit import pack_best_fit, pack_concatenated, piece_lengths
from megacpt.data.indexed import write_index
from megacpt.data.manifest import crc32_of
from megacpt.data.packing import open_index
from megacpt.data.permutation import permute
from megacpt.data.select import Selection, held_out
from megacpt.errors import DataError

LENGTHS = arrays(np.int32, st.integers(0, 200), elements=st.integers(0, 150))


def rows_of(packed, lengths, seq_len):
    """[(document, offset, length)] of every row, by the rule that a piece ends where its document or its row ends."""
    counts, documents, offsets = packed
    rows, at = [], 0
    for count in counts:
        room, row = seq_len, []
        for document, offset in zip(documents[at : at + count], offsets[at : at + count], strict=True):
            length = min(room, lengths[document] - offset)
            row.append((int(document), int(offset), int(length)))
            room -= length
        assert room >= 0
        rows.append(row)
        at += count
    return rows


@given(LENGTHS, st.integers(2, 70), st.sampled_from([pack_best_fit, pack_concatenated]))
def test_every_token_is_packed_once(lengths, seq_len, pack):
    seen = [np.zeros(n, int) for n in lengths]
    for row in rows_of(pack(lengths, seq_len), lengths, seq_len):
        assert row and all(length > 0 for _, _, length in row)
        for document, offset, length in row:
            seen[document][offset : offset + length] += 1
    assert all((count == 1).all() for count in seen)


@given(LENGTHS, st.integers(2, 70), st.sampled_from([pack_best_fit, pack_concatenated]))
def test_lengths_of_pieces_follow_from_documents_and_rows(lengths, seq_len, pack):
    counts, documents, offsets = pack(lengths, seq_len)
    found = piece_lengths(lengths[documents], counts, offsets, seq_len).tolist()
    assert found == [length for row in rows_of((counts, documents, offsets), lengths, seq_len) for _, _, length in row]


@given(LENGTHS, st.integers(2, 70))
def test_best_fit_cuts_only_what_cannot_fit(lengths, seq_len):
    rows = rows_of(pack_best_fit(lengths, seq_len), lengths, seq_len)
    parts = np.bincount([d for row in rows for d, _, _ in row], minlength=len(lengths))
    assert (parts == -(-lengths // seq_len)).all()


def best_fit_by_the_book(sizes, seq_len):
    """Rooms after packing items one by one, longest first, into the row with the least room that takes them."""
    rooms = []
    for size in sorted(sizes, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= size]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= size
        else:
            rooms.append(seq_len - size)
    return sorted(rooms)


@given(LENGTHS, st.integers(2, 70))
def test_bulk_packing_is_best_fit_decreasing(lengths, seq_len):
    short = lengths[(lengths > 0) & (lengths < seq_len)]
    rows = rows_of(pack_best_fit(short, seq_len), short, seq_len)
    assert sorted(seq_len - sum(n for _, _, n in row) for row in rows) == best_fit_by_the_book(short.tolist(), seq_len)


def test_concatenation_fills_every_row_but_the_last():
    lengths = np.array([5, 0, 9, 3], np.int32)
    assert rows_of(pack_concatenated(lengths, 4), lengths, 4) == [
        [(0, 0, 4)],
        [(0, 4, 1), (2, 0, 3)],
        [(2, 3, 4)],
        [(2, 7, 2), (3, 0, 2)],
        [(3, 2, 1)],
    ]


@given(st.integers(1, 5000), st.integers(0, 9))
def test_permutations_are_permutations(n, key):
    assert sorted(permute(np.arange(n), n, ("test", key))) == list(range(n))


def test_permutations_differ_by_key():
    assert (permute(np.arange(1000), 1000, (1,)) != permute(np.arange(1000), 1000, (2,))).mean() > 0.9


@pytest.fixture
def domain(prepared):
    return DomainData([str(prepared / "a"), str(prepared / "b")])


@pytest.mark.parametrize("method", ["best_fit", "concatenate"])
def test_an_index_holds_every_document_but_the_held_out(domain, tmp_path, method, monkeypatch):
    monkeypatch.setattr(packing, "BLOCK_DOCUMENTS", 64)
    taken = {}
    for holdout in (False, True):
        selection = Selection(32, method, holdout_documents=17, holdout=holdout)
        index = open_index(domain, selection, str(tmp_path))
        taken[holdout] = {d for row in range(index.num_rows) for d, _, _ in index.row(row)}
        tokens = sum(n for row in range(index.num_rows) for _, _, n in index.row(row))
        assert tokens == sum(domain.length(d) for d in taken[holdout])
    assert len(taken[True]) == 17 and not taken[True] & taken[False]
    assert len(taken[True] | taken[False]) == domain.num_documents


def test_workers_do_not_change_the_index(domain, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "BLOCK_DOCUMENTS", 64)
    for workers in (1, 2):
        open_index(domain, Selection(32, holdout_documents=3), str(tmp_path / str(workers)), workers)
    for name in ("row_start.bin", "piece_document.bin", "piece_offset.bin", "piece_length.bin"):
        a, b = (next((tmp_path / w).glob(f"*/{name}")).read_bytes() for w in "12")
        assert a == b


def test_the_cache_is_by_content(domain, tmp_path):
    first = open_index(domain, Selection(32), str(tmp_path))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.bin")}
    again = open_index(domain, Selection(32), str(tmp_path))
    assert again.num_rows == first.num_rows and before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.bin")}
    open_index(domain, Selection(32, min_tokens=5), str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2


def test_length_bounds_and_too_many_held_out(domain, tmp_path):
    index = open_index(domain, Selection(32, min_tokens=20, max_tokens=60), str(tmp_path))
    lengths = {domain.length(d) for row in range(index.num_rows) for d, _, _ in index.row(row)}
    assert min(lengths) >= 20 and max(lengths) <= 60
    with pytest.raises(DataError, match="fewer than holdout_documents = 9999"):
        held_out(domain, Selection(32, holdout_documents=9999))


@given(st.integers(0, 30))
def test_the_held_out_documents_are_the_same_for_every_row_length(count):
    import json
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "d"
        lengths = np.arange(2, 42)
        write_index(prefix.with_suffix(".idx"), np.dtype(np.uint16), [lengths], 40)
        np.zeros(lengths.sum(), np.uint16).tofile(prefix.with_suffix(".bin"))
        sizes = {
            k: {"bytes": prefix.with_suffix("." + k).stat().st_size, "crc32": crc32_of(prefix.with_suffix("." + k))}
            for k in ("bin", "idx")
        }
        prefix.with_suffix(".json").write_text(
            json.dumps(
                {
                    "format": 1,
                    "documents": 40,
                    "tokens": int(lengths.sum()),
                    "vocab_size": 9,
                    "eos_token_id": 0,
                    **sizes,
                }
            )
        )
        domain = DomainData([str(prefix)])
        chosen = [held_out(domain, Selection(n, holdout_documents=count)).tolist() for n in (8, 64)]
        assert chosen[0] == chosen[1] and len(chosen[0]) == count
