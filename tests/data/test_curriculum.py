"""A domain in the order of its perplexity: monotone buckets, shares kept, resumable, and scores that belong to the data."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megacpt.config.clock import Clock
from megacpt.config.load import load_recipe
from megacpt.data.curriculum import buckets_of, read_scores
from megacpt.data.indexed import IndexedDataset
from megacpt.data.loader import StageData, open_domains, stage_orders
from megacpt.data.manifest import read_manifest
from megacpt.errors import DataError
from megacpt.plan.check import check


@given(
    st.lists(
        st.tuples(st.one_of(st.floats(0, 12), st.just(float("nan"))), st.integers(1, 500)), min_size=1, max_size=200
    ),
    st.integers(1, 12),
    st.booleans(),
    st.floats(0, 0.3),
)
def test_buckets_are_monotone_and_of_about_equal_tokens(documents, buckets, ascending, drop):
    scores, lengths = (np.array(column, float) for column in zip(*documents, strict=True))
    found = buckets_of(scores, lengths.astype(np.int64), buckets, ascending, drop)
    assert (found == -1).sum() == 2 * int(len(scores) * drop)
    values = np.nan_to_num(scores, nan=-1)
    for low in range(buckets):
        here, later = values[found == low], values[found > low]
        if len(here) and len(later):
            assert here.max() <= later.min() if ascending else here.min() >= later.max()
    total, largest = lengths[found >= 0].sum(), lengths.max()
    assert all(lengths[found == b].sum() <= total / buckets + 2 * largest for b in range(buckets))


@pytest.fixture
def scored(recipe_file, prepared, tmp_path):
    """A recipe whose domain a is ordered by made-up scores."""
    data, manifest = IndexedDataset(str(prepared / "a")), read_manifest(str(prepared / "a"))
    scores = np.random.default_rng(0).permutation(data.num_documents) / 10
    lines = [json.dumps({"document": i, "tokens": int(data.lengths[i]), "nll": float(s)}) for i, s in enumerate(scores)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    facts = {"tokenizer_sha256": manifest["tokenizer"]["sha256"], "data_crc32": manifest["bin"]["crc32"],
             "documents": manifest["documents"]}  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(facts))

    def make(**order):
        order = {"scores": [str(tmp_path / "a.jsonl")], "buckets": 4} | order
        domains = {
            "a": {"paths": [str(prepared / "a")], "holdout_documents": 5, "order": order},
            "b": {"paths": [str(prepared / "b")], "holdout_documents": 5},
        }
        lr = {"shape": "constant", "peak": 1e-3}
        stage = {
            "name": "s",
            "tokens": 8192,
            "seq_len": 64,
            "batch_tokens": 256,
            "mixture": {"a": 0.5, "b": 0.5},
            "lr": lr,
        }
        return recipe_file(data=domains, stages=[stage])

    return make, scores


@pytest.mark.parametrize("ascending", [True, False])
def test_training_sees_bucket_after_bucket_and_keeps_the_shares(scored, ascending):
    make, scores = scored
    recipe = load_recipe(make(ascending=ascending))
    clock, domains = Clock(recipe), open_domains(recipe, ["a", "b"])
    data = StageData(recipe, recipe.stages[0], stage_orders(recipe, clock)[0], domains, 0, 400)
    index = data.indices["a"]
    picks = data.picks(0, 2 * index.num_rows)
    rows = [pick.row for pick in picks if pick.domain == "a" and pick.epoch == 0]
    bucket = [np.searchsorted(index.bucket_rows, row, side="right") - 1 for row in rows]
    assert bucket == sorted(bucket) and max(bucket) == 3
    means = [
        np.mean([scores[d] for r, b in zip(rows, bucket, strict=True) if b == k for d, _, _ in index.row(r)])
        for k in range(4)
    ]
    assert means == sorted(means, reverse=not ascending)
    assert rows != sorted(rows), "not shuffled inside a bucket"
    assert abs(sum(p.domain == "a" for p in picks) - len(picks) / 2) <= 1
    assert data.picks(7, 5) == picks[7:12]


def test_scores_of_other_data_or_another_tokenizer_are_refused(scored, tmp_path):
    make, _ = scored
    path = make()
    facts = json.loads((tmp_path / "a.json").read_text())
    assert not check(load_recipe(path), 1).problems
    (tmp_path / "a.json").write_text(json.dumps(facts | {"tokenizer_sha256": "0" * 64}))
    assert any("scored with the tokenizer 000000000000" in str(p) for p in check(load_recipe(path), 1).problems)
    (tmp_path / "a.json").write_text(json.dumps(facts | {"data_crc32": 1}))
    assert any("it was scored on other data" in str(p) for p in check(load_recipe(path), 1).problems)
    (tmp_path / "a.json").unlink()
    assert any("`megacpt score` writes it" in str(p) for p in check(load_recipe(path), 1).problems)


def test_a_curriculum_under_a_decaying_rate_is_flagged(scored):
    make, _ = scored
    recipe = load_recipe(make(), ["--stages.s.lr.shape=cosine"])
    assert any("is a curriculum under a decaying learning rate (cosine)" in str(w) for w in check(recipe, 1).warnings)
    assert not any("curriculum" in str(w) for w in check(load_recipe(make()), 1).warnings)


@pytest.mark.parametrize("nll", ["NaN", "Infinity", "-Infinity", '"nan"', '"1.5"', "true", "1e999", "[1]"])
def test_a_score_that_is_no_number_is_refused(tmp_path, nll):
    file = tmp_path / "a.jsonl"
    file.write_text('{"document": 0, "nll": null}\n{"document": 1, "nll": 2}\n{"document": 2, "nll": ' + nll + "}\n")
    with pytest.raises(DataError, match=r"a.jsonl: no scores \(line 3: nll is "):
        read_scores([str(file)])
    file.write_text('{"document": 0, "nll": null}\n{"document": 1, "nll": 2}\n')
    assert np.isnan(read_scores([str(file)])).tolist() == [True, False]
