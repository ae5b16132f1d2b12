"""A topic classifier from labelled examples, in English and Chinese; what it labels goes through prepare into domains."""

import json
import random

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="needs scikit-learn (the dev extra)")
from megacpt.cli import run
from megacpt.data.prepare import Options, prepare
from megacpt.data.topics import Topics
from megacpt.errors import ConfigError, DataError

WORDS = {
    "physics": ["energy", "momentum", "quantum", "field", "particle", "能量", "动量", "粒子"],
    "law": ["court", "statute", "contract", "liability", "appeal", "法院", "合同", "判决"],
    "cooking": ["butter", "oven", "pepper", "simmer", "dough", "烤箱", "面团", "辣椒"],
}
COMMON = ["the", "of", "and", "with", "when", "的", "和", "在"]


def examples(count: int, seed: int) -> list[dict]:
    dice = random.Random(seed)
    rows = []
    for _ in range(count):
        topic = dice.choice(list(WORDS))
        text = " ".join(dice.choice(WORDS[topic] if dice.random() < 0.3 else COMMON) for _ in range(30))
        rows.append({"text": text, "topic": topic})
    return rows


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in examples(400, 0)))
    run(["topics", "train", str(path), "--output", str(tmp_path / "model"), "--features", "16384"])
    return tmp_path / "model"


def test_topics_are_found_in_both_languages_and_become_domains(model, tmp_path, tokenizer_dir, capsys):
    rows = examples(200, 1)
    (tmp_path / "new.jsonl").write_text("".join(json.dumps({"text": row["text"]}) + "\n" for row in rows))
    run(
        ["topics", "label", str(tmp_path / "new.jsonl"), "--model", str(model), "--output", str(tmp_path / "out.jsonl")]
    )
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["text"] for row in found] == [row["text"] for row in rows]
    right = sum(a["topic"] == b["topic"] for a, b in zip(found, rows, strict=True)) / len(rows)
    assert right > 0.95, right
    assert "documents" in capsys.readouterr().out
    chinese = Topics.load(model).label(["能量和动量的粒子", "法院的合同判决", "烤箱和面团辣椒"])
    assert chinese == ["physics", "law", "cooking"]
    options = Options(str(tokenizer_dir), domain_field="topic")
    manifest = prepare([str(tmp_path / "out.jsonl")], str(tmp_path / "set"), options, workers=1)
    assert set(manifest["labels"]["names"]) == set(WORDS)


def test_the_same_seed_gives_the_same_model(model, tmp_path):
    run(
        [
            "topics",
            "train",
            str(tmp_path / "labelled.jsonl"),
            "--output",
            str(tmp_path / "again"),
            "--features",
            "16384",
        ]
    )
    a, b = Topics.load(model), Topics.load(tmp_path / "again")
    assert np.array_equal(a.columns, b.columns) and np.array_equal(a.bias, b.bias)


def test_two_topics_and_too_few_examples(tmp_path):
    rows = [row for row in examples(200, 2) if row["topic"] != "law"]
    path = tmp_path / "two.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(["topics", "train", str(path), "--output", str(tmp_path / "two"), "--features", "16384"])
    assert Topics.load(tmp_path / "two").label(["quantum particle energy field", "butter dough oven pepper"]) == [
        "physics",
        "cooking",
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:12]))
    with pytest.raises(DataError, match="at least two topics with ten examples each"):
        run(["topics", "train", str(path), "--output", str(tmp_path / "no")])
    with pytest.raises(ConfigError, match="a power of two"):
        run(["topics", "train", str(path), "--output", str(tmp_path / "no"), "--features", "1000"])


def test_a_damaged_model_is_named_and_runs_nothing(model, tmp_path):
    np.savez(model / "weights.npz", weights=np.array([{"a": 1}], dtype=object), bias=np.zeros(1))
    with pytest.raises(DataError, match="no model of topics"):
        Topics.load(model)
