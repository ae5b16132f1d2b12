"""Tokenizers as people have them, made here: the ids, BOS and EOS of transformers' AutoTokenizer, or a refusal that says why; and growth
that moves no id, in every layout of tokenizer.json and beside every sentencepiece model."""

import json
import shutil
from pathlib import Path

import pytest
from made_tokenizers import (
    CHINESE,
    FAST,
    JSON,
    LLAMA,
    PROBES,
    SENTENCEPIECE,
    byte_bpe,
    chatml_on_llama2,
    folder,
    llama2,
    llama2_file,
    llama3,
    pieces,
    whitespace_pieces,
    with_template,
    without_a,
)
from samples import TEXTS
from tokenizers import Tokenizer, models

from megacpt.cli import run
from megacpt.data import vocabulary
from megacpt.data.tokenizer import Tokenizer as Ours
from megacpt.errors import ConfigError


@pytest.mark.parametrize("make", [*JSON, *SENTENCEPIECE])
def test_ids_are_those_of_transformers(make, tmp_path):
    import transformers

    path = make(tmp_path / "t")
    ours, theirs = Ours(path), transformers.AutoTokenizer.from_pretrained(path)
    for text in PROBES:
        assert ours.encode_batch([text])[0] == theirs(text, add_special_tokens=False).input_ids, text
    assert ours.eos_id == theirs.eos_token_id
    whole = theirs("A").input_ids
    assert ours.bos_id == (whole[0] if whole[0] != theirs("A", add_special_tokens=False).input_ids[0] else None)
    assert ours.vocab_size == max(theirs.get_vocab().values()) + 1


def test_the_comparison_sees_an_added_token_that_is_spelled_out(tmp_path):
    """The twin: without added_tokens.json the ids differ."""
    import transformers

    path = chatml_on_llama2(tmp_path / "t")
    theirs = transformers.AutoTokenizer.from_pretrained(path)
    (path / "added_tokens.json").unlink()
    ours = Ours(path)
    differ = [
        text for text in PROBES if ours.encode_batch([text])[0] != theirs(text, add_special_tokens=False).input_ids
    ]
    assert differ and ours.eos_id is None


@pytest.mark.parametrize("make", [llama2, chatml_on_llama2, whitespace_pieces])
def test_what_sentencepiece_would_say(make, tmp_path):
    """Beside sentencepiece itself, on texts without control tokens and without a space at the front, where transformers differs from it."""
    import sentencepiece

    path = make(tmp_path / "t")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    for text in [text for text in PROBES if "<" not in text and text[:1] != " "]:
        assert Ours(path).encode_batch([text])[0] == reference.encode(text), text


def grow(base: Path, tmp_path: Path, most: int | None = None) -> Path:
    """The base with the Chinese of another tokenizer of its kind."""
    new = tmp_path / "new"
    if (base / "tokenizer.model").exists():
        pieces(new, CHINESE, 330)
        folder(new, tokenizer_config=LLAMA)
    elif "▁the" in Ours(base)._tokenizer.get_vocab():
        llama2_file(new, CHINESE)
    else:
        folder(new, byte_bpe(CHINESE, 330), tokenizer_config=FAST)
    vocabulary.merge(base, new, tmp_path / "grown", most)
    return tmp_path / "grown"


@pytest.mark.parametrize("make", [m for m in [*JSON, *SENTENCEPIECE] if m is not without_a])
def test_growth_moves_no_id(make, tmp_path):
    """All ids of transformers, BOS and EOS, are what they were; old text is cut as before; Chinese is shorter; and transformers and we
    agree on the grown one."""
    import transformers

    base = make(tmp_path / "base")
    grown = grow(base, tmp_path)
    before, after = (transformers.AutoTokenizer.from_pretrained(path) for path in (base, grown))
    assert {entry: after.get_vocab()[entry] for entry in before.get_vocab()} == before.get_vocab()
    assert len(after) > len(before)
    assert (before.bos_token_id, before.eos_token_id) == (after.bos_token_id, after.eos_token_id)
    assert before("order of data").input_ids == after("order of data").input_ids
    for text in [text for text in PROBES if not any(letter in text for letter in "中文ñ🙂")]:
        assert before(text).input_ids == after(text).input_ids, text
    ours = Ours(grown)
    for text in [*PROBES, *CHINESE[:3]]:
        assert ours.encode_batch([text])[0] == after(text, add_special_tokens=False).input_ids, text
    assert (ours.bos_id, ours.eos_id) == (Ours(base).bos_id, Ours(base).eos_id)
    assert len(after(CHINESE[0]).input_ids) < len(before(CHINESE[0]).input_ids)


@pytest.mark.parametrize(
    "model, message",
    [
        (models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0), "is Unigram, not BPE"),
        (models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), "is WordPiece, not BPE"),
        (models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), "is WordLevel, not BPE"),
        (models.BPE({"a": 0, "b</w>": 1}, [], end_of_word_suffix="</w>"), "end_of_word_suffix is '</w>'"),
    ],
)
def test_kinds_that_do_not_grow_are_refused_by_name(tmp_path, model, message):
    base = folder(tmp_path / "base", Tokenizer(model), tokenizer_config=FAST)
    with pytest.raises(ConfigError, match=message):
        grow(base, tmp_path)
    assert not (tmp_path / "grown").exists() and not list(tmp_path.glob(".tmp-*"))


def test_growth_that_would_move_an_id_writes_nothing(tmp_path, monkeypatch):
    """The twin: without the entry of added tokens into the vocabulary, they are counted from its new end."""
    base = llama3(tmp_path / "base")
    right = vocabulary._merge_merges

    def forgetful(*arguments):
        right(*arguments)
        content = json.loads(arguments[2].read_text())
        for token in content["added_tokens"]:
            content["model"]["vocab"].pop(token["content"])
        arguments[2].write_text(json.dumps(content))

    monkeypatch.setattr(vocabulary, "_merge_merges", forgetful)
    with pytest.raises(ConfigError, match="begin_of_text.*has id 330 there, but the library reads it as"):
        grow(base, tmp_path)
    assert not (tmp_path / "grown").exists() and not list(tmp_path.glob(".tmp-*"))


def test_every_moved_id_is_seen():
    class Listed:
        bos_id = eos_id = None

        def __init__(self, entries):
            self.entries, self.vocab_size = entries, len(entries)

        def token(self, i):
            return self.entries[i] if i < len(self.entries) else None

        def id_of(self, entry):
            return self.entries.index(entry) if entry in self.entries else None

    entries = [f"t{i}" for i in range(5000)]
    assert vocabulary.moved_ids(Listed(entries), Listed([*entries, "new"])) == []
    swapped = entries.copy()
    swapped[4321] = "other"
    (problem,) = vocabulary.moved_ids(Listed(entries), Listed(swapped))
    assert "1 of 5000 ids" in problem and "4321: 't4321', now 'other'" in problem


def test_an_added_token_that_would_get_another_id_is_refused(tmp_path):
    """Behind a gap: transformers counts it from the pieces' end, whatever the file says."""
    path = llama2(tmp_path / "t")
    size = Ours(path).vocab_size
    (path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": size + 9}))
    with pytest.raises(ConfigError, match=f"im_end.*has id {size + 9}; with tokenizer.model it gets id {size}"):
        Ours(path)


def test_an_eos_that_is_not_in_the_vocabulary_is_not_invented(tmp_path):
    path = folder(tmp_path / "t", byte_bpe(special=["</s>"]), tokenizer_config=FAST | {"eos_token": "<nope>"})
    assert Ours(path).eos_id is None and "<nope>" not in Ours(path)._tokenizer.get_vocab()
    assert Ours(path, "</s>").eos_id == 0


def test_what_has_neither_piece_nor_bytes_is_unknown_not_lost(tmp_path):
    """sentencepiece's own reading; transformers 5 drops it."""
    import sentencepiece

    pieces(tmp_path / "t", size=90, byte_fallback=False, character_coverage=0.999)
    path = folder(tmp_path / "t", tokenizer_config=LLAMA)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path / "tokenizer.model"))
    for text in ("of 中文 data", "é", TEXTS[0]):
        assert Ours(path).encode_batch([text])[0] == reference.encode(text)


def test_a_file_whose_added_tokens_moved_is_refused(tmp_path):
    """What an older growth made: entries of the vocabulary stand where the added tokens were, and the template still names them."""
    path = llama3(tmp_path / "t")
    content = json.loads((path / "tokenizer.json").read_text())
    for i in range(50):
        content["model"]["vocab"][f"new{i}"] = 412 + i
    (path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="begin_of_text"):
        Ours(path)


def test_a_template_that_names_another_bos_is_refused(tmp_path):
    tokenizer = byte_bpe(special=["<s>", "</s>", "<other>"])
    with_template(tokenizer, "<other>")
    path = folder(tmp_path / "t", tokenizer, tokenizer_config=FAST | {"bos_token": "<s>"})
    with pytest.raises(ConfigError, match="begins a text with id 2, which is '<other>'; '<s>' has id 0"):
        Ours(path)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda p: (p / "added_tokens.json").write_text('{"<|x|>": 5}'), "has id 5, which is the piece"),
        (lambda p: (p / "added_tokens.json").write_text('{"<|x|>": "many"}'), "added tokens are not understood"),
        (lambda p: (p / "added_tokens.json").write_text("[1]"), "it holds a list, not an object"),
        (lambda p: (p / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}'), "T5Tokenizer is not read"),
        (lambda p: (p / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n"), "not a sentencepiece model"),
        (lambda p: pieces(p, model_type="unigram"), "is no BPE model"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused(tmp_path, spoil, message):
    path = llama2(tmp_path / "t")
    spoil(path)
    with pytest.raises(ConfigError, match=message):
        Ours(path)


def test_a_trained_sentencepiece_keeps_indentation(tmp_path):
    """What is decoded is the text, and transformers and sentencepiece give the same ids."""
    import sentencepiece
    import transformers

    text = tmp_path / "t.jsonl"
    code = "def f(x):\n    if x:\n        return  1\n\n\treturn\t2\n"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in [*TEXTS, code * 20]))
    output = tmp_path / "out"
    run(["vocab", "train", str(text), "--output", str(output), "--type", "sentencepiece", "--vocab-size", "420"])
    ours, theirs = Ours(output), transformers.AutoTokenizer.from_pretrained(output)
    itself = sentencepiece.SentencePieceProcessor(model_file=str(output / "tokenizer.model"))
    probes = [
        code,
        "a  b   c    d",
        "x\n\n\n  y",
        "\tz",
        "    indented",
        " ",
        "  \n ",
        "ends in two  ",
        "\r\n",
        "中 文",
        "",
    ]
    for probe in probes:
        ids = ours.encode_batch([probe])[0]
        assert ids == theirs(probe, add_special_tokens=False).input_ids == itself.encode(probe), probe
        assert ours.decode(ids) == theirs.decode(ids) == probe
    eight = ours.encode_batch(["x\n        y"])[0]
    assert len(eight) < 8, "runs of spaces have pieces"


def test_the_digest_knows_what_side_files_add(tmp_path):
    path = chatml_on_llama2(tmp_path / "t")
    whole = Ours(path).sha256
    shutil.copytree(path, tmp_path / "u")
    (tmp_path / "u/added_tokens.json").unlink()
    assert Ours(tmp_path / "u").sha256 != whole
