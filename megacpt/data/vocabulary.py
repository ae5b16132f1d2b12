"""Tokenizers that grow: train one on a new corpus, and append what it knows to an old one, whose ids stay as they are.

sentencepiece: pieces of the new model that the old one lacks are appended with score 0 (as Chinese-LLaMA did), so they win as soon as
they can be formed. Byte-level BPE has no scores: the new tokenizer's merges are appended behind the old ones, as far as their parts exist,
in their own order; the old merges run first, so text in which no new token occurs is cut as before. Imports no torch.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from megacpt.data.text import BadLine, cut, find_files, read_piece
from megacpt.data.tokenizer import TOKENIZER_FILES, Tokenizer
from megacpt.errors import ConfigError


def texts_of(
    inputs: list[str], kind: str = "auto", field: str = "text", most_bytes: int | None = None
) -> Iterator[str]:
    """Documents of text files, up to a number of bytes; unreadable records are skipped."""
    taken = 0
    for piece in cut(find_files(inputs, kind)):
        for text, *_ in read_piece(piece, field):
            if isinstance(text, BadLine):
                continue
            yield text
            taken += len(text.encode())
            if most_bytes and taken >= most_bytes:
                return


def train(inputs: list[str], output: Path, kind: str, vocab_size: int, eos_token: str, sample_bytes: int | None) -> int:
    """Trains a tokenizer and writes a Hugging Face directory. Returns its number of entries.

    Args:
        kind: "bpe" (byte-level, as Llama 3) or "sentencepiece" (BPE with byte fall-back, as Llama 2).
    """
    if output.exists():
        raise ConfigError([f"{output}: exists. Give another --output or remove it."], "the arguments")
    output.mkdir(parents=True)
    texts = texts_of(inputs, most_bytes=sample_bytes)
    if kind == "sentencepiece":
        import sentencepiece

        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.splitlines() if line.strip()),
            model_prefix=str(output / "tokenizer"), vocab_size=vocab_size, model_type="bpe", byte_fallback=True,
            character_coverage=0.9995, hard_vocab_limit=False, minloglevel=2, normalization_rule_name="identity",
            max_sentence_length=1 << 20,
        )  # fmt: skip
        (output / "tokenizer.vocab").unlink()
        config = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "bos_token": "<s>", "add_bos_token": True}
    else:
        from tokenizers import Tokenizer as Fast
        from tokenizers import decoders, models, pre_tokenizers, trainers

        fast = Fast(models.BPE())
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[eos_token], initial_alphabet=alphabet, show_progress=False
        )
        fast.train_from_iterator(texts, trainer)
        fast.save(str(output / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos_token}
    (output / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    return Tokenizer(output).vocab_size


def merge(base: Path, new: Path, output: Path, most: int | None) -> tuple[int, int]:
    """Writes the base tokenizer with what the new one adds. Returns (entries before, entries after).

    Args:
        most: entries to append at most, the new tokenizer's first ones.
    Raises:
        ConfigError: if the two are of different kinds.
    """
    if output.exists():
        raise ConfigError([f"{output}: exists. Give another --output or remove it."], "the arguments")
    kinds = [next((n for n in ("tokenizer.json", "tokenizer.model") if (d / n).is_file()), None) for d in (base, new)]
    if None in kinds or kinds[0] != kinds[1]:
        raise ConfigError(
            [f"{base} holds {kinds[0]}, {new} holds {kinds[1]}: both must be tokenizer.json (byte-level BPE) or both tokenizer.model "
             "(sentencepiece)."], "the tokenizers",
        )  # fmt: skip
    before = Tokenizer(base).vocab_size
    output.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        if (base / name).is_file() and name != kinds[0]:
            shutil.copyfile(base / name, output / name)
    write = _merge_pieces if kinds[0] == "tokenizer.model" else _merge_merges
    write(base / kinds[0], new / kinds[0], output / kinds[0], most)
    return before, Tokenizer(output).vocab_size


def _merge_pieces(base: Path, new: Path, output: Path, most: int | None) -> None:
    from sentencepiece import sentencepiece_model_pb2 as proto

    models = []
    for path in (base, new):
        model = proto.ModelProto()
        model.ParseFromString(path.read_bytes())
        models.append(model)
    old, other = models
    known, added = {piece.piece for piece in old.pieces}, 0
    for piece in other.pieces:
        if piece.piece in known or piece.type != piece.NORMAL or (most is not None and added >= most):
            continue
        known.add(piece.piece)
        old.pieces.add(piece=piece.piece, score=0.0)
        added += 1
    old.trainer_spec.vocab_size = len(old.pieces)
    output.write_bytes(old.SerializeToString())


def _merge_merges(base: Path, new: Path, output: Path, most: int | None) -> None:
    old, other = (json.loads(path.read_text(encoding="utf-8")) for path in (base, new))
    for path, content in ((base, old), (new, other)):
        if content["model"].get("type") != "BPE":
            raise ConfigError([f"{path}: is {content['model'].get('type')}, not BPE."], "the tokenizers")
    vocabulary, merges = old["model"]["vocab"], old["model"]["merges"]
    taken = {*vocabulary, *(token["content"] for token in old["added_tokens"])}
    following = max([*vocabulary.values(), *(token["id"] for token in old["added_tokens"])]) + 1
    pair = lambda merge: tuple(merge) if isinstance(merge, list) else tuple(merge.split(" "))
    as_list = not merges or isinstance(merges[0], list)
    added = 0
    for left, right in map(pair, other["model"]["merges"]):
        whole = left + right
        if whole in taken or left not in vocabulary or right not in vocabulary or (most is not None and added >= most):
            continue
        vocabulary[whole] = following + added
        taken.add(whole)
        merges.append([left, right] if as_list else f"{left} {right}")
        added += 1
    output.write_text(json.dumps(old, ensure_ascii=False), encoding="utf-8")


def characters_per_token(tokenizer: Tokenizer, texts: list[str]) -> float:
    return sum(map(len, texts)) / max(1, sum(map(len, tokenizer.encode_batch(texts))))
