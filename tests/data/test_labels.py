"""One prepared set, several domains: the label of each document is kept beside its tokens, and a domain is a view of some labels."""

import json

import numpy as np
import pytest
from samples import TEXTS

from megacpt.config.load import load_recipe
from megacpt.data.loader import open_domains, selection_of
from megacpt.data.packing import open_index
from megacpt.data.prepare import Options, prepare
from megacpt.errors import ConfigError, DataError
from megacpt.plan.check import check

NAMES = ["math", "law", "", "物理"]


@pytest.fixture(params=["jsonl", "parquet"])
def labelled(request, tmp_path, tokenizer_dir):
    """(prefix, label of every document)."""
    labels = [NAMES[i * 7 % 4] for i in range(len(TEXTS))]
    if request.param == "jsonl":
        path = tmp_path / "t.jsonl"
        path.write_text("".join(json.dumps({"text": t, "topic": n}) + "\n" for t, n in zip(TEXTS, labels, strict=True)))
    else:
        import pyarrow
        import pyarrow.parquet

        path = tmp_path / "t.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "topic": labels}), path, row_group_size=7)
    prepare([str(path)], str(tmp_path / "set"), Options(str(tokenizer_dir), domain_field="topic"), workers=2)
    kept = [n for t, n in zip(TEXTS, labels, strict=True) if t]
    return tmp_path / "set", kept


def test_labels_stand_beside_the_documents(labelled):
    prefix, labels = labelled
    manifest = json.loads(prefix.with_suffix(".json").read_text())
    names = list(manifest["labels"]["names"])
    stored = np.fromfile(f"{prefix}.labels", "<u2")
    assert [names[i] for i in stored] == labels and names == sorted(set(NAMES))
    assert sum(v["documents"] for v in manifest["labels"]["names"].values()) == len(labels) == manifest["documents"]
    assert sum(v["tokens"] for v in manifest["labels"]["names"].values()) == manifest["tokens"]


def test_domains_are_views_that_part_the_set(labelled, recipe_file, tmp_path):
    prefix, labels = labelled
    view = lambda *names: {"paths": [str(prefix)], "labels": list(names), "holdout_documents": 2}
    path = recipe_file(data={"a": view("math", "law"), "b": view("物理")})
    recipe = load_recipe(path, ["--validation=[]"])
    assert not check(recipe, 1).problems
    domains, seen = open_domains(recipe, ["a", "b"]), {}
    for name in "ab":
        for holdout in (False, True):
            index = open_index(domains[name], selection_of(recipe, name, 64, holdout), recipe.packing.directory)
            seen[name, holdout] = {document for row in range(index.num_rows) for document, _, _ in index.row(row)}
        assert not seen[name, True] & seen[name, False] and len(seen[name, True]) == 2
    whole = {name: seen[name, True] | seen[name, False] for name in "ab"}
    assert whole["a"] == {i for i, label in enumerate(labels) if label in ("math", "law")}
    assert whole["b"] == {i for i, label in enumerate(labels) if label == "物理"}


def test_unknown_labels_and_sets_without_labels_are_named(labelled, recipe_file, prepared):
    prefix, _ = labelled
    domains = {
        "a": {"paths": [str(prefix)], "labels": ["mth"]},
        "b": {"paths": [str(prepared / "b")], "labels": ["math"]},
    }
    problems = check(load_recipe(recipe_file(data=domains), ["--validation=[]"]), 1).problems
    assert any("data.a.labels" in str(p) and "Did you mean 'math'" in str(p) for p in problems)
    assert any("data.b.labels" in str(p) and "was prepared without labels" in str(p) for p in problems)


def test_a_record_without_the_field_is_a_bad_line(tmp_path, tokenizer_dir):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a b", "topic": "x"}\n{"text": "no topic"}\n{"text": "c", "topic": 5}\n')
    options = Options(str(tokenizer_dir), domain_field="topic", max_bad_lines=0)
    with pytest.raises(DataError, match="has no field 'topic'"):
        prepare([str(path)], str(tmp_path / "s"), options, workers=1)
    (tmp_path / "t.txt").write_text("plain")
    with pytest.raises(ConfigError, match="plain text files have no fields"):
        prepare(
            [str(tmp_path / "t.txt")], str(tmp_path / "p"), Options(str(tokenizer_dir), domain_field="topic"), workers=1
        )
