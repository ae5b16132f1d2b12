"""Prompts, segments and items in a record become weights and items beside the tokens, whatever the format, the workers and the parts."""

import gzip
import json
import math
import random
import shutil

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from made_tokenizers import JSON, SENTENCEPIECE
from samples import TEXTS

import megacpt.data.text as text_module
from megacpt.cli import run
from megacpt.data.beside import RUN, ItemTable, TokenWeights, write_items, write_weights
from megacpt.data.indexed import IndexedDataset
from megacpt.data.manifest import expand_paths, read_manifest, verify_data
from megacpt.data.prepare import Options, prepare
from megacpt.data.records import BadLine, Document, Fields, read_record
from megacpt.data.tokenizer import Tokenizer
from megacpt.errors import ConfigError, DataError

_random = random.Random(1)


def segments_of(text: str) -> list[dict]:
    """A text in one to five parts, cut anywhere, also inside words, each with a weight."""
    cuts = sorted(_random.randint(0, len(text)) for _ in range(_random.randint(0, 4)))
    edges = [0, *cuts, len(text)]
    pairs = zip(edges, edges[1:], strict=False)
    return [{"text": text[a:b], "weight": _random.choice([0, 1, 1, 0.25, 2])} for a, b in pairs]


RECORDS = [
    {"segments": segments_of(text), "text": text, "pair": i // 2 if i % 7 else None}
    for i, text in enumerate(TEXTS)
    if text
]


def write_jsonl(path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def write_all_formats(folder) -> list[str]:
    """The records in five files of different formats."""
    folder.mkdir()
    write_jsonl(folder / "0.jsonl", RECORDS[:100])
    with gzip.open(folder / "1.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in RECORDS[100:150])
    whole = "".join(json.dumps(record) + "\n" for record in RECORDS[150:200]).encode()
    (folder / "2.jsonl.zst").write_bytes(zstandard.compress(whole))
    columns = {
        "segments": [[s | {"weight": float(s["weight"])} for s in r["segments"]] for r in RECORDS[200:300]],
        "pair": [r["pair"] for r in RECORDS[200:300]],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "3.parquet", row_group_size=7)
    write_jsonl(folder / "4.jsonl", RECORDS[300:])
    return [str(folder)]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(text_module, "MIN_PIECE_BYTES", 4096)


def weights_by_character(record: dict, tokenizer) -> tuple[list[int], list[float]]:
    """Ids and weights of a record's tokens with EOS, by the rule in words: each character has its part's weight, and a token that of the
    character at which it begins. Where a token begins is found by decoding, not by the library's offsets: samples are ASCII."""
    ids = tokenizer.encode_batch([record["text"]])[0]
    characters = [part["weight"] for part in record["segments"] for _ in part["text"]]
    at, weights = 0, []
    for token in ids:
        weights.append(characters[at])
        at += len(tokenizer.decode([token]))
    assert at == len(record["text"])
    return [*ids, 0], [*weights, record["segments"][-1]["weight"]]


def stored(prefix) -> list[tuple[list[int], list[float]]]:
    """(ids, weights) of every document, through the readers."""
    data, manifest = IndexedDataset(prefix), read_manifest(str(prefix))
    weights = TokenWeights(str(prefix), data.num_documents, manifest["weights"])
    weights.check(data.lengths_of)
    lengths = data.lengths.tolist()
    return [(data.read(i, 0, n).tolist(), weights.read(i, 0, n).tolist()) for i, n in enumerate(lengths)]


def expected(tokenizer_dir) -> list[tuple[list[int], list[float]]]:
    made = [weights_by_character(record, Tokenizer(tokenizer_dir)) for record in RECORDS]
    return [(ids, weights) for ids, weights in made if any(weights[1:])]


@pytest.mark.parametrize("make", [*JSON, *SENTENCEPIECE])
def test_ids_of_parts_are_those_of_the_whole_text(make, tmp_path):
    """On every kind of tokenizer, with places that grow and lie in the text."""
    tokenizer = Tokenizer(make(tmp_path / "t"))
    texts = [*TEXTS[:50], "def f(x):\n\treturn  x  ", "中文 text, ñ and 🙂 é", "  a <|im_end|> b", "▁x", " "]
    for text, ids, (same, begins, ends) in zip(
        texts, tokenizer.encode_batch(texts), tokenizer.encode_with_places(texts), strict=True
    ):
        assert ids == same, text
        assert (np.diff(begins) >= 0).all() and (begins <= ends).all() and ends.max(initial=0) <= len(text)


def test_a_token_begins_with_its_space(tokenizer_dir):
    """Also where the tokenizer's template cuts the space off its offsets, as Llama 3's does; and the bytes of a character begin at it."""
    from tokenizers import processors

    tokenizer = Tokenizer(tokenizer_dir)
    tokenizer._tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trimmed = tokenizer._tokenizer.encode("def the 中", add_special_tokens=False).offsets
    (_, begins, ends) = tokenizer.encode_with_places(["def the 中"])[0]
    assert begins.tolist() == [0, 3, 7, 8, 8, 8] and ends.tolist() == [3, 7, 8, 9, 9, 9]
    assert trimmed[1][0] == 4, "the twin: with the template the first word behind a prompt would begin behind its space"


@pytest.mark.parametrize("workers", [1, 3])
def test_every_format_gives_weights_by_the_rule(tmp_path, tokenizer_dir, small_pieces, workers):
    options = Options(str(tokenizer_dir), segments_field="segments")
    manifest = prepare(write_all_formats(tmp_path / "in"), str(tmp_path / "out"), options, workers=workers)
    want = expected(tokenizer_dir)
    assert stored(tmp_path / "out") == want
    facts = manifest["weights"]
    assert facts["weightless_documents"] == len(RECORDS) - len(want) > 0
    assert facts["documents"] == sum(set(weights) != {1} for _, weights in want)
    assert facts["runs"] == sum(
        1 + sum(a != b for a, b in zip(w, w[1:], strict=False)) for _, w in want if set(w) != {1}
    )
    assert facts["spanning_tokens"] > 0 and facts["bytes"] == (tmp_path / "out.weights").stat().st_size
    assert verify_data(str(tmp_path / "out")) == manifest


def test_the_comparison_sees_the_rule(tmp_path, tokenizer_dir, monkeypatch):
    """The twin: with a token's last character in place of its first other weights are kept."""
    original = Tokenizer.encode_with_places
    monkeypatch.setattr(
        Tokenizer, "encode_with_places", lambda self, t: [(i, e - 1, e) for i, _, e in original(self, t)]
    )
    assert in_process(tmp_path, tokenizer_dir) != expected(tokenizer_dir)
    monkeypatch.undo()
    assert in_process(tmp_path, tokenizer_dir) == expected(tokenizer_dir)


def in_process(tmp_path, tokenizer_dir) -> list:
    """(ids, weights) as a worker makes them, in this process."""
    import megacpt.data.tokenize_piece as module

    class Counter:
        pass

    options = Options(str(tokenizer_dir), segments_field="segments")
    module.start_worker(options, 401, Counter(), 1)
    documents = [read_record(record, options.fields, "", 0) for record in RECORDS]
    encoded = module._encode(module._worker, documents, {"spanning": 0})
    plain = [(ids, [1.0] * len(ids) if weights is None else weights.tolist()) for ids, weights in encoded]
    return [(ids, weights) for ids, weights in plain if any(weights[1:])]


def test_a_prompt_weighs_nothing_and_a_completion_one(tmp_path, tokenizer_dir, capsys):
    """From the command line; without a completion there is nothing to learn; BOS and prompts may be missing."""
    rows = [("def the of", " and to in"), ("", "return self"), ("for if", ""), ("import", " class while")]
    write_jsonl(tmp_path / "t.jsonl", [{"q": q, "a": a} for q, a in rows])
    arguments = ["--tokenizer", str(tokenizer_dir), "--output", str(tmp_path / "o")]
    run(["prepare", str(tmp_path / "t.jsonl"), *arguments, "--prompt-field", "q", "--completion-field", "a"])
    tokenizer = Tokenizer(tokenizer_dir)
    ids = [tokenizer.encode_batch([q + a])[0] for q, a in rows if a]
    prompts = [len(tokenizer.encode_batch([q])[0]) for q, a in rows if a]
    assert [ids for ids, _ in stored(tmp_path / "o")] == [[*each, 0] for each in ids]
    weights = [w for _, w in stored(tmp_path / "o")]
    assert weights[0] == [0.0] * prompts[0] + [1.0] * (len(ids[0]) + 1 - prompts[0])
    assert weights[1] == [1.0] * (len(ids[1]) + 1)
    assert weights[2] == [0.0] * prompts[2] + [1.0] * (len(ids[2]) + 1 - prompts[2])
    manifest = read_manifest(str(tmp_path / "o"))
    assert manifest["empty_documents"] == 1 and manifest["prompt_field"] == "q"
    assert manifest["weights"]["spanning_tokens"] == 0 and "border" not in capsys.readouterr().err


def test_a_space_at_the_end_of_a_prompt_is_counted(tmp_path, tokenizer_dir, capsys):
    """The first word of the completion begins in the prompt, and would not be learnt."""
    write_jsonl(tmp_path / "t.jsonl", [{"q": "def the ", "a": "of and"}])
    options = Options(str(tokenizer_dir), prompt_field="q", completion_field="a")
    manifest = prepare([str(tmp_path / "t.jsonl")], str(tmp_path / "o"), options, workers=1)
    assert manifest["weights"]["spanning_tokens"] == 1
    assert "1 tokens reach over the border of two parts" in capsys.readouterr().err
    assert stored(tmp_path / "o")[0][1] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    "segments, reason",
    [
        ("x", "is a str, not a list of segments"),
        (["x"], r"segment 0 is no object"),
        ([{"text": "a", "weight": 1}, {"text": "b"}], r"segment 1 has the keys 'text'"),
        ([{"text": "a", "weight": 1, "wieght": 0}], r"has the keys 'text', 'weight', 'wieght'"),
        ([{"text": 3, "weight": 1}], r"segment 0: text is a int, not a string"),
        ([{"text": "a", "weight": "1"}], r"weight is a str, not a number"),
        ([{"text": "a", "weight": math.nan}], r"weight nan is not finite"),
        ([{"text": "a", "weight": math.inf}], r"weight inf is not finite"),
        ([{"text": "a", "weight": -1}], r"weight -1 is out of range; 0, or from 1e-06 to 1e\+06"),
        ([{"text": "a", "weight": 1e-9}], r"weight 1e-09 is out of range"),
        ([{"text": "a\ud800", "weight": 1}], r"invalid Unicode"),
    ],
)
def test_a_segment_that_is_wrong_is_a_bad_line(tmp_path, tokenizer_dir, segments, reason):
    write_jsonl(tmp_path / "t.jsonl", [{"segments": [{"text": "fine", "weight": True}]}, {"segments": segments}])
    options = Options(str(tokenizer_dir), segments_field="segments", max_bad_lines=0)
    with pytest.raises(DataError, match=f"t.jsonl:2: .*{reason}"):
        prepare([str(tmp_path / "t.jsonl")], str(tmp_path / "o"), options, workers=1)


def test_a_record_keeps_its_parts_label_and_item():
    fields = Fields(segments="s", label="l", item="i")
    record = {
        "s": [{"text": "ab", "weight": 0}, {"text": "", "weight": 3}, {"text": "c", "weight": True}],
        "l": "x",
        "i": 7,
    }
    assert read_record(record, fields, "f", 1) == Document("abc", ((2, 0.0), (2, 3.0), (3, 1.0)), "x", 7)
    assert read_record(record | {"s": record["s"][2:]}, fields, "f", 1).parts == (), "all 1"
    assert read_record(record | {"s": []}, fields, "f", 1).text == ""
    for value in (1.5, True, ["x"]):
        assert (
            isinstance(bad := read_record(record | {"i": value}, fields, "f", 1), BadLine) and "field 'i'" in bad.reason
        )


def test_fields_that_do_not_go_together_are_refused_at_once(tmp_path, tokenizer_dir):
    source = write_jsonl(tmp_path / "t.jsonl", RECORDS[:3])
    options = Options(str(tokenizer_dir), "body", segments_field="s", prompt_field="p", engine="gigatoken")
    with pytest.raises(
        ConfigError, match=r"4 problems(.|\n)*give both(.|\n)*one of the two(.|\n)*--text-field body(.|\n)*gigatoken"
    ):
        prepare([source], str(tmp_path / "o"), options)
    (tmp_path / "t.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"--segments-field, --item-field: plain text files have no fields"):
        prepare(
            [str(tmp_path / "t.txt")],
            str(tmp_path / "o"),
            Options(str(tokenizer_dir), segments_field="s", item_field="i"),
        )


def items_of(prefix) -> list[list[int]]:
    manifest = read_manifest(str(prefix))
    table = ItemTable(str(prefix), manifest["documents"], manifest["items"])
    table.check()
    edges = table.first[:].tolist()
    return [list(range(a, b)) for a, b in zip(edges, edges[1:], strict=False)]


def items_by_the_rule(records, files) -> list[list[int]]:
    """Neighbours with the same value, in a file."""
    items, before = [], None
    for i, (record, file) in enumerate(zip(records, files, strict=True)):
        if record["pair"] is None or (record["pair"], file) != before:
            items.append([])
        items[-1].append(i)
        before = record["pair"], file
    return items


FILES = [i // 50 if i < 200 else 4 if i < 300 else 5 for i in range(len(RECORDS))]
FILES = [0 if file < 2 else file for file in FILES]
"""The file of each record in `write_all_formats`."""


@pytest.mark.parametrize("workers", [1, 3])
def test_items_are_neighbours_over_pieces_but_not_over_files(tmp_path, tokenizer_dir, small_pieces, workers):
    options = Options(str(tokenizer_dir), segments_field="segments", item_field="pair")
    manifest = prepare(write_all_formats(tmp_path / "in"), str(tmp_path / "out"), options, workers=workers)
    want = items_by_the_rule(RECORDS, FILES)
    assert manifest["documents"] == len(RECORDS), "with items a document without weight is kept"
    assert manifest["weights"]["weightless_documents"] > 0
    assert items_of(tmp_path / "out") == want and any(len(item) > 1 for item in want)
    lengths = IndexedDataset(tmp_path / "out").lengths
    facts = manifest["items"]
    assert facts["items"] == len(want) and facts["most_documents"] == 2
    assert facts["longest_tokens"] == max(lengths[item].sum() for item in want)


def test_parts_together_are_the_whole_and_cut_no_item(tmp_path, tokenizer_dir, small_pieces):
    options = Options(str(tokenizer_dir), segments_field="segments", item_field="pair")
    source = write_all_formats(tmp_path / "in")
    prepare(source, str(tmp_path / "whole"), options, workers=1)
    for i in range(3):
        prepare(source, str(tmp_path / "part"), options, workers=1, part=(i, 3))
    prefixes = expand_paths([str(tmp_path / "part-*")])
    assert [d for prefix in prefixes for d in stored(prefix)] == stored(tmp_path / "whole")
    found, before = [], 0
    for prefix in prefixes:
        found += [[before + i for i in item] for item in items_of(prefix)]
        before = found[-1][-1] + 1
    assert found == items_of(tmp_path / "whole")


def test_texts_of_weight_one_have_no_runs_and_the_same_tokens(tmp_path, tokenizer_dir):
    records = [{"text": t, "segments": [{"text": t, "weight": 1.0}]} for t in TEXTS if t]
    source = write_jsonl(tmp_path / "t.jsonl", records)
    prepare([source], str(tmp_path / "a"), Options(str(tokenizer_dir)), workers=1)
    prepare([source], str(tmp_path / "b"), Options(str(tokenizer_dir), segments_field="segments"), workers=1)
    for kind in ("bin", "idx"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()
    assert not (tmp_path / "a.weights").exists() and "weights" not in read_manifest(str(tmp_path / "a"))
    assert read_manifest(str(tmp_path / "b"))["weights"]["runs"] == 0


def test_only_weightless_documents_are_an_error_that_says_so(tmp_path, tokenizer_dir):
    source = write_jsonl(tmp_path / "t.jsonl", [{"segments": [{"text": "the of", "weight": 0}]}] * 3)
    with pytest.raises(
        DataError, match="hold no documents: 3 were left out, because none of their tokens has a weight"
    ):
        prepare([source], str(tmp_path / "o"), Options(str(tokenizer_dir), segments_field="segments"), workers=1)


def test_overwriting_leaves_nothing_of_the_old_set(tmp_path, tokenizer_dir):
    source = write_jsonl(tmp_path / "t.jsonl", RECORDS)
    weighted = Options(str(tokenizer_dir), segments_field="segments", item_field="pair")
    prepare([source], str(tmp_path / "o"), weighted, workers=1)
    for kind in ("weights", "items"):
        shutil.copy(tmp_path / f"o.{kind}", tmp_path / kind)
    prepare([source], str(tmp_path / "o"), Options(str(tokenizer_dir)), workers=1, overwrite=True)
    assert not (tmp_path / "o.weights").exists() and not (tmp_path / "o.items").exists()
    shutil.copy(tmp_path / "weights", tmp_path / "o.weights")
    with pytest.raises(DataError, match=r"o\.weights: is not named in .*o\.json"):
        read_manifest(str(tmp_path / "o"))


def test_sums_of_labels_are_those_of_the_tokens(tmp_path):
    """Of pieces at any place, several of a document, over spans of documents that are read at once; dense and without runs."""
    random = np.random.default_rng(0)
    lengths = random.integers(1, 12, 3000)
    tokens = [np.round(random.random(n), 3).astype(np.float32) if n % 3 else np.ones(n, np.float32) for n in lengths]
    runs = [
        np.array([(i + 1, w) for i, w in enumerate(each)], RUN) if len(each) % 3 else np.zeros(0, RUN)
        for each in tokens
    ]
    for each in runs[::5]:
        each["weight"] = 0
    tokens = [each["weight"] if len(each) else whole for each, whole in zip(runs, tokens, strict=True)]
    sizes = len(runs), sum(map(len, runs))
    write_weights(tmp_path / "x.weights", [np.array([len(r) for r in runs])], runs, sizes)
    facts = {"bytes": (tmp_path / "x.weights").stat().st_size, "crc32": None}
    weights = TokenWeights(str(tmp_path / "x"), len(runs), facts)
    weights.check(lambda a, b: lengths[a:b])
    documents = np.sort(random.integers(0, 3000, 5000))
    begins = random.integers(0, lengths[documents] + 1)
    ends = random.integers(begins, lengths[documents] + 1)
    sums, heavy = weights.sums(documents, begins, ends)
    for d, a, b, s, h in zip(documents, begins, ends, sums, heavy, strict=True):
        assert s == sum(tokens[d][a:b].astype(float).tolist()) and h == (tokens[d][a:b] > 0).sum(), (d, a, b)
        assert weights.read(d, a, b).tolist() == tokens[d][a:b].tolist()
    write_items(tmp_path / "x.items", np.array([0, 2, 3]), 9)
    items = ItemTable(str(tmp_path / "x"), 9, {"bytes": 64, "crc32": None})
    assert items.begins(1, 3).tolist() == [2] and [items.next_begin(d) for d in (0, 1, 3, 4, 9)] == [0, 2, 3, 9, 9]
