import struct

import numpy as np
import pytest

from megacpt.data.indexed import IndexedDataset, token_dtype, write_index
from megacpt.errors import DataError

# The index of documents [5, 6, 7, 2] and [8, 9, 2] in uint16, as Megatron-LM's own builder writes it.
MEGATRON = bytes.fromhex(
    "4d4d49444944580000"
    "0100000000000000"
    "08"
    "0200000000000000"
    "0300000000000000"
    "0400000003000000"
    "0000000000000000"
    "0800000000000000"
    "0000000000000000"
    "0100000000000000"
    "0200000000000000"
)


@pytest.fixture
def dataset(tmp_path):
    (tmp_path / "d.idx").write_bytes(MEGATRON)
    np.array([5, 6, 7, 2, 8, 9, 2], np.uint16).tofile(tmp_path / "d.bin")
    return tmp_path / "d"


def test_the_index_is_megatrons_byte_for_byte(tmp_path):
    write_index(tmp_path / "x.idx", np.dtype(np.uint16), [np.array([4]), np.array([], int), np.array([3])], 2)
    assert (tmp_path / "x.idx").read_bytes() == MEGATRON


def test_documents_are_read(dataset):
    data = IndexedDataset(dataset)
    assert (data.num_documents, data.num_tokens) == (2, 7)
    assert data.read(1, 0, 3).tolist() == [8, 9, 2] and data.read(0, 2, 1).tolist() == [7]


def test_sequences_of_one_document_are_joined(dataset):
    raw = (
        MEGATRON[:26] + (2).to_bytes(8, "little") + MEGATRON[34:58] + b"".join(n.to_bytes(8, "little") for n in (0, 2))
    )
    dataset.with_suffix(".idx").write_bytes(raw)
    data = IndexedDataset(dataset)
    assert data.lengths.tolist() == [7] and data.read(0, 3, 2).tolist() == [2, 8]


def index_of(lengths: list[int], documents: list[int]) -> bytes:
    """As Megatron's builder writes it: sequences of these lengths in uint16, and the sequence with which each document begins."""
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]]) * 2 if lengths else []
    header = MEGATRON[:18] + struct.pack("<QQ", len(lengths), len(documents))
    parts = ((lengths, "<i4"), (offsets, "<i8"), (documents, "<i8"))
    return header + b"".join(np.array(values).astype(kind).tobytes() for values, kind in parts)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    "lengths, documents, expected",
    [
        ([4, 3], [0, 1, 1, 2], [4, 0, 3]),
        ([4, 3], [0, 0, 1, 2], [0, 4, 3]),
        ([4, 3], [0, 1, 2, 2], [4, 3, 0]),
        ([4, 3], [0, 0, 0, 2, 2, 2], [0, 0, 7, 0, 0]),
        ([4, 1, 2], [0, 1, 1, 3], [4, 0, 3]),  # as many documents as sequences
        ([4, 1, 2], [0, 2, 3, 3], [5, 2, 0]),
        ([4, 0, 3], [0, 1, 2, 3], [4, 0, 3]),  # an empty sequence
        ([4, 0, 3], [0, 2, 3], [4, 3]),
    ],
)
def test_empty_documents_have_no_tokens_and_the_others_keep_theirs(dataset, lengths, documents, expected, check):
    """Megatron's add_document([], []) for an empty text: a boundary twice."""
    assert index_of([4, 3], [0, 1, 2]) == MEGATRON
    dataset.with_suffix(".idx").write_bytes(index_of(lengths, documents))
    data, tokens = IndexedDataset(dataset, check), [5, 6, 7, 2, 8, 9, 2]
    assert data.lengths.tolist() == expected and data.num_tokens == 7
    for i, length in enumerate(expected):
        assert data.read(i, 0, length).tolist() == [tokens.pop(0) for _ in range(length)]


@pytest.mark.parametrize("check", [True, False])
def test_boundaries_that_fall_are_damage(dataset, check):
    dataset.with_suffix(".idx").write_bytes(index_of([4, 3], [0, 2, 1, 2]))
    with pytest.raises(DataError, match=r"d\.idx: document boundaries fall"):
        IndexedDataset(dataset, check)


@pytest.mark.parametrize("vocab, dtype", [(65499, np.uint16), (65500, np.int32), (128256, np.int32)])
def test_megatrons_dtype_rule(vocab, dtype):
    assert token_dtype(vocab) == dtype


def test_a_truncated_file_is_an_error_with_both_sizes(dataset):
    dataset.with_suffix(".bin").write_bytes(b"\0" * 10)
    with pytest.raises(DataError, match=r"d.bin: has 10 bytes, but .*d.idx describes 14"):
        IndexedDataset(dataset)
    dataset.with_suffix(".bin").unlink()
    with pytest.raises(DataError, match="is missing although"):
        IndexedDataset(dataset)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:-1],
        lambda raw: b"",
        lambda raw: b"X" + raw[1:],
        lambda raw: raw[:9] + b"\2" + raw[10:],
        lambda raw: raw[:17] + b"\7" + raw[18:],
        lambda raw: raw[:18] + b"\xff" * 8 + raw[26:],
        lambda raw: raw[:50] + b"\6" + raw[51:],
        lambda raw: raw[:34] + b"\xff" * 4 + raw[38:],
        lambda raw: raw[:-8] + b"\1" + raw[-7:],
    ],
)
def test_a_damaged_index_is_an_error_never_garbage(dataset, damage):
    dataset.with_suffix(".idx").write_bytes(damage(MEGATRON))
    with pytest.raises(DataError, match=r"d\.idx|d\.bin"):
        IndexedDataset(dataset)
