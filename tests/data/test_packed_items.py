"""Documents that belong together stay together: in rows, in what is held out, in a curriculum; and what a row's labels weigh is known
before it is read."""

import hashlib
import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import megacpt.data.packing as packing
from megacpt.config.clock import Clock
from megacpt.config.load import load_recipe
from megacpt.data.beside import RUN, write_items, write_weights
from megacpt.data.curriculum import item_scores
from megacpt.data.domain import DomainData
from megacpt.data.fit import pack_best_fit, pack_in_order
from megacpt.data.indexed import write_index
from megacpt.data.loader import IGNORE, StageData, load_step, make_batch, open_domains, stage_orders
from megacpt.data.manifest import crc32_of
from megacpt.data.packing import FILES, open_index
from megacpt.data.select import Selection, held_out
from megacpt.errors import DataError
from megacpt.plan.check import check


def write_set(prefix, lengths, sizes=None, weights=None) -> str:
    """A prepared set of documents of these lengths; token i is i % 90 + 1.

    Args:
        sizes: documents of each item. weights: of each document, None or a weight of each token.
    """
    lengths = np.asarray(lengths, np.int32)
    paths = {kind: prefix.with_name(f"{prefix.name}.{kind}") for kind in ("bin", "idx", "json", "weights", "items")}
    write_index(paths["idx"], np.dtype(np.uint16), [lengths], len(lengths))
    (np.arange(lengths.sum()) % 90 + 1).astype(np.uint16).tofile(paths["bin"])
    facts = {"format": 1, "documents": len(lengths), "tokens": int(lengths.sum()), "vocab_size": 100, "eos_token_id": 0}
    facts |= {"tokenizer": {"path": "t", "sha256": "0"}}
    if weights is not None:
        runs = [np.array([(i + 1, w) for i, w in enumerate(each or ())], RUN) for each in weights]
        write_weights(paths["weights"], [np.array([len(r) for r in runs])], runs, (len(runs), sum(map(len, runs))))
    if sizes is not None:
        first = np.cumsum(sizes) - sizes
        write_items(paths["items"], first, len(lengths))
        facts |= {"items": {"longest_tokens": int(np.add.reduceat(lengths, first).max())}}
    for kind in (
        "bin",
        "idx",
        *(["weights"] if weights is not None else []),
        *(["items"] if sizes is not None else []),
    ):
        facts[kind] = facts.get(kind, {}) | {"bytes": paths[kind].stat().st_size, "crc32": crc32_of(paths[kind])}
    paths["json"].write_text(json.dumps(facts))
    return str(prefix)


@st.composite
def sets(draw):
    """[(lengths, sizes of items, weights)] of one to three sets; lengths from 0, weights multiples of 1/64 or none."""
    made = []
    for _ in range(draw(st.integers(1, 3))):
        sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=25))
        lengths = draw(st.lists(st.integers(0, 9), min_size=sum(sizes), max_size=sum(sizes)))
        weight = st.integers(0, 128).map(lambda n: n / 64)
        weights = [draw(st.none() | st.lists(weight, min_size=n, max_size=n)) if n else None for n in lengths]
        made.append((lengths, sizes, weights))
    return made


def token_weights(made) -> list[list[float]]:
    return [w or [1.0] * n for lengths, _, weights in made for n, w in zip(lengths, weights, strict=True)]


def items_of(made) -> list[list[int]]:
    """The documents of each item, numbered through the sets."""
    found, before = [], 0
    for size in (size for _, sizes, _ in made for size in sizes):
        found.append(list(range(before, before + size)))
        before += size
    return found


@settings(max_examples=120)
@given(
    sets(), st.sampled_from(["best_fit", "concatenate"]), st.sampled_from([3, 8, packing.BLOCK_DOCUMENTS]),
    st.booleans(), st.booleans(), st.integers(0, 6),
)  # fmt: skip
def test_rows_hold_whole_items_once_and_know_their_sums(
    tmp_path_factory, made, method, block, with_items, with_weights, held
):
    """Every document with a token once, held out or not, those of an item in one row side by side; sums, labels and items of a row are
    those of its batch. Weights are multiples of 1/64: their sums are exact in any order."""
    folder = tmp_path_factory.mktemp("s")
    prefixes = [
        write_set(
            folder / f"s{i}", lengths, sizes if with_items else None, weights if with_weights and i != 1 else None
        )
        for i, (lengths, sizes, weights) in enumerate(made)
    ]
    seq_len = max(16, *map(sum, item_lengths(made)))
    domain = DomainData(prefixes)
    lengths = domain.lengths(0, domain.num_documents)
    before, packing.BLOCK_DOCUMENTS = packing.BLOCK_DOCUMENTS, block
    try:
        selections = [Selection(seq_len, method, holdout_documents=held, holdout=part) for part in (False, True)]
        try:
            indices = [open_index(domain, selection, str(folder / "cache")) for selection in selections]
        except DataError as error:
            assert held and "holdout_documents" in str(error)
            return
    finally:
        packing.BLOCK_DOCUMENTS = before
    rows = [(index, row) for index in indices for row in range(index.num_rows)]
    seen = [document for index, row in rows for document, offset, length in index.row(row)]
    assert sorted(seen if with_items else set(seen)) == np.flatnonzero(lengths).tolist(), "once each"
    assert sum(length for index, row in rows for *_, length in index.row(row)) == lengths.sum(), "and whole"
    weights = token_weights(made)
    for index, row in rows:
        pieces, items = index.row(row), index.items(row)
        if with_items:
            assert all(offset == 0 and length == lengths[document] for document, offset, length in pieces), "uncut"
            groups = {}
            for number, (document, *_) in zip(items, pieces, strict=True):
                groups.setdefault(number, []).append(document)
            whole = [[d for d in item if lengths[d]] for item in items_of(made)]
            assert all(group in whole for group in groups.values()) and items == sorted(items)
            assert list(groups) == list(range(len(groups)))
        batch = make_batch([(index, "a", row), None], seq_len, 0, 100)
        assert (batch.weights is not None) == (domain.weighted) and (batch.item is not None) == with_items
        flat = np.where(batch.labels >= 0, 1.0 if batch.weights is None else batch.weights, 0.0)[0]
        own = [
            w
            for d, offset, length in pieces
            for w in [*weights_at(made, weights, d, domain)[offset + 1 : offset + length], 0.0]
        ]
        assert flat.tolist() == [*own, *[0.0] * (seq_len - len(own))], "each label's own weight"
        sums = index.sums(row)
        assert sums.weight == math.fsum(flat.tolist()) and sums.labels == (flat > 0).sum()
        documents = np.diff([*batch.document_starts, 2 * seq_len])
        item = np.repeat(np.arange(len(documents)) if batch.item is None else batch.item, documents)[:seq_len]
        assert sums.items == len(np.unique(item[flat > 0]))


def item_lengths(made) -> list[list[int]]:
    lengths = [n for each, *_ in made for n in each]
    return [[lengths[d] for d in item] for item in items_of(made)]


def weights_at(made, weights, document, domain) -> list[float]:
    """Of a document's tokens; sets without a file weigh 1."""
    which = next(i for i, first in enumerate(domain.first[1:]) if document < first)
    return weights[document] if "weights" in domain.manifests[which] else [1.0] * len(weights[document])


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
def test_items_in_order_are_packed_by_next_fit(lengths, seq_len):
    counts, which, offsets = pack_in_order(np.array(lengths, np.int64), seq_len)
    assert which.tolist() == list(range(len(lengths))) and not offsets.any()
    rows = np.split(np.array(lengths, int), np.cumsum(counts)[:-1]) if len(counts) else []
    assert all(row.sum() <= seq_len for row in rows)
    assert all(row.sum() + following[0] > seq_len for row, following in zip(rows, rows[1:], strict=False))


PAIRS = [(5, 6), (30, 3), (20, 20), (1, 1), (7, 9), (10, 40), (2, 3), (4, 4), (0, 6), (12, 2)]
LENGTHS = [n for pair in PAIRS for n in pair]


@pytest.fixture
def pairs(tmp_path):
    """Ten pairs; two of 40 and 50 tokens, which no row of 36 takes."""
    return DomainData([write_set(tmp_path / "p", LENGTHS, [2] * len(PAIRS))])


def documents_in(index) -> set[int]:
    return {document for row in range(index.num_rows) for document, *_ in index.row(row)}


def test_an_item_longer_than_a_row_is_refused_or_left_out(pairs, tmp_path, capsys):
    with pytest.raises(
        DataError, match=r"2 items are longer than a row of 36 tokens; the longest, from document 10 on, has 50\."
    ):
        open_index(pairs, Selection(36), str(tmp_path / "c"))
    index = open_index(pairs, Selection(36, long_items="drop"), str(tmp_path / "c"))
    assert "2 items are longer" in capsys.readouterr().err
    assert documents_in(index) == set(range(20)) - {4, 5, 10, 11} - {16}
    assert json.loads((index.directory / "index.json").read_text())["dropped_items"] == 2
    whole = open_index(pairs, Selection(50), str(tmp_path / "c"))
    assert documents_in(whole) == set(range(20)) - {16}


def test_the_bounds_of_a_view_take_whole_items(pairs, tmp_path):
    index = open_index(pairs, Selection(36, min_tokens=2, max_tokens=20, long_items="drop"), str(tmp_path / "c"))
    assert documents_in(index) == {0, 1, 8, 9, 12, 13, 14, 15, 17, 18, 19}


def test_what_is_held_out_cuts_no_item_whatever_the_row(pairs, tmp_path):
    chosen = [held_out(pairs, Selection(n, holdout_documents=5)).tolist() for n in (50, 64)]
    assert chosen[0] == chosen[1] and 5 <= len(chosen[0]) <= 6
    assert all(d ^ 1 in chosen[0] or LENGTHS[d ^ 1] == 0 for d in chosen[0]) and not {6, 7} & set(chosen[0])
    train, held = (
        open_index(pairs, Selection(64, holdout_documents=5, holdout=h), str(tmp_path / "c")) for h in (0, 1)
    )
    assert documents_in(held) == set(chosen[0]) and documents_in(train) | documents_in(held) == set(range(20)) - {16}
    assert not documents_in(train) & documents_in(held)
    with pytest.raises(DataError, match="have 17 documents, fewer than holdout_documents = 18"):
        held_out(pairs, Selection(64, holdout_documents=18))


def test_the_twin_of_the_holdout_cuts_items(pairs):
    """Drawn document by document, as without items, pairs are torn apart."""
    alone = DomainData(pairs.prefixes)
    alone.grouped = False
    chosen = held_out(alone, Selection(64, holdout_documents=5)).tolist()
    assert any(d ^ 1 not in chosen for d in chosen if LENGTHS[d ^ 1] > 1)


def mean_of(scores, labels) -> float:
    """Of the labels of two documents; one without a label has no score."""
    return sum(s * n for s, n in zip(scores, labels, strict=True) if n > 0) / sum(n for n in labels if n > 0)


def test_a_curriculum_orders_items_by_the_mean_of_their_labels(pairs, tmp_path, monkeypatch):
    scores = np.linspace(3, 1, 20)
    scores[[6, 7, 16]] = np.nan
    first = np.arange(0, 20, 2)
    labels = np.array(LENGTHS) - 1
    want = [np.nan if i == 6 else mean_of(scores[i : i + 2], labels[i : i + 2]) for i in first]
    assert np.allclose(item_scores(scores, np.array(LENGTHS), first), want, rtol=1e-15, equal_nan=True)
    import megacpt.data.select as select

    monkeypatch.setattr(select, "read_scores", lambda _: scores)
    index = open_index(pairs, Selection(64, scores=("x",), scores_digest="x", buckets=4), str(tmp_path / "c"))
    assert documents_in(index) == set(range(20)) - {16}
    bucket = {}
    for row in range(index.num_rows):
        of_row = int(np.searchsorted(index.bucket_rows, row, side="right")) - 1
        bucket |= {document: of_row for document, *_ in index.row(row)}
    assert all(bucket[d] == bucket[d ^ 1] for d in bucket if d ^ 1 in bucket) and len(set(bucket.values())) == 4
    assert bucket[6] == 0 and bucket[18] <= bucket[0], "no label comes first, then rising loss"


def test_sets_with_and_without_items_are_no_domain(tmp_path, recipe_file):
    prefixes = [write_set(tmp_path / "one", [5, 6], [2]), write_set(tmp_path / "two", [5, 6])]
    with pytest.raises(DataError, match=r"two: was prepared without --item-field, other sets of the domain with it"):
        DomainData(prefixes)
    path = recipe_file(data={"a": {"paths": prefixes}, "b": {"paths": prefixes[:1]}}, validation=[])
    problems = [str(p) for p in check(load_recipe(path), 1).problems]
    assert any("data.a: " in p and "was prepared with --item-field" in p for p in problems)
    assert not any("data.b: the longest item" in p for p in problems)
    short = check(load_recipe(path, ["--stages.s.seq_len=8", "--parallel.micro_batch_tokens=8"]), 1).problems
    short = [str(problem) for problem in short]
    view = check(load_recipe(path, ["--data.a.max_tokens=99"]), 1).problems
    assert any("was prepared with --item-field" in str(problem) for problem in view), "in a view, too"
    assert any("data.b: the longest item has 11 tokens, a row 8" in p for p in short)


def test_an_index_without_weights_and_items_keeps_its_name_and_its_bytes(prepared, tmp_path):
    """As version 79dcb91 named and wrote it: runs that were begun then find their rows."""
    domain = DomainData([str(prepared / "a"), str(prepared / "b")])
    selection = Selection(32, holdout_documents=3)
    facts = [[manifest["idx"], manifest["bin"]] for manifest in domain.manifests]
    data = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    keys = {
        "seq_len": 32, "method": "best_fit", "min_tokens": 0, "max_tokens": 2**31, "holdout_documents": 3, "holdout": False,
        "labels": (), "scores": [], "scores_digest": "", "buckets": 1, "ascending": True, "drop": 0.0,
    }  # fmt: skip
    name = hashlib.sha256(json.dumps([3, 1 << 20, data, keys]).encode()).hexdigest()[:24]
    index = open_index(domain, selection, str(tmp_path))
    assert index.directory.name == f"best_fit-32-{name}"
    assert {path.name for path in index.directory.iterdir()} == {*FILES, "index.json"}
    meta = json.loads((index.directory / "index.json").read_text())
    names = ["crc32", "version", "name", "rows", "pieces", "bucket_rows", "document_dtype", "files", "prefixes", *keys]
    assert list(meta) == names and set(meta["files"]) == set(FILES)
    assert open_index(domain, replace(selection, long_items="drop"), str(tmp_path)).directory == index.directory
    assert set(asdict(selection)) - set(keys) == {"long_items"}


def test_other_weights_and_items_are_other_data(tmp_path):
    one = DomainData([write_set(tmp_path / "x", [4, 4], [2], [None, [0, 1, 1, 1]])]).fingerprint()
    for sizes, weights in (([1, 1], [None, [0, 1, 1, 1]]), ([2], [None, [0, 1, 1, 0.5]]), ([2], None), (None, None)):
        for kind in ("weights", "items"):
            (tmp_path / f"x.{kind}").unlink(missing_ok=True)
        assert DomainData([write_set(tmp_path / "x", [4, 4], sizes, weights)]).fingerprint() != one


def test_the_count_of_labels_is_what_the_loss_sees(tmp_path, recipe_file):
    """A prompt of 6 tokens and a completion of 4 in a row of 10: 4 labels (by lengths they were 9); the same for any number of ranks."""
    prefix = write_set(tmp_path / "x", [10] * 8, None, [[0] * 6 + [1] * 4] * 8)
    data = {"a": {"paths": [prefix]}}
    stage = {
        "name": "s",
        "tokens": 80,
        "seq_len": 10,
        "batch_tokens": 40,
        "mixture": {"a": 1.0},
        "lr": {"shape": "constant", "peak": 1e-3},
    }
    recipe = load_recipe(recipe_file(data=data, stages=[stage], validation=[], parallel={"micro_batch_tokens": 10}))
    order = stage_orders(recipe, Clock(recipe))[0]
    stage_data = StageData(recipe, recipe.stages[0], order, open_domains(recipe, ["a"]), 0, 401)
    counts = stage_data.count(stage_data.picks(0, 1))
    assert (counts.labels, counts.weight, counts.items) == (4, 4.0, 1)
    steps = [load_step(stage_data, 0, 4, ranks, rank, 1) for ranks in (1, 2, 3) for rank in range(ranks)]
    assert {step.counts for step in steps} == {stage_data.count(stage_data.picks(0, 4))}
    whole = steps[0].micro_batches
    assert sum(float(b.weights[b.labels != IGNORE].sum()) for b in whole) == steps[0].counts.weight == 16


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40))
def test_best_fit_of_items_is_best_fit_of_their_lengths(sizes):
    """What pack_best_fit does with documents that fit, it does with items."""
    counts, which, offsets = pack_best_fit(np.array(sizes), 30)
    assert sorted(which.tolist()) == list(range(len(sizes))) and not offsets.any() and counts.sum() == len(sizes)
