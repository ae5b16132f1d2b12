"""Tokenizers that grow: train one on a new corpus, and append what it knows to an old one, whose ids stay as they are.

What is new stands behind what is old, in its own order: pieces of a sentencepiece model with scores below all old ones, merges of a BPE
behind the old ones, as far as their parts exist. The old merges run first, so text in which no new token occurs is cut as before.
(Chinese-LLaMA gave new pieces score 0, above all; transformers 5 ranks pieces by id, so that its ids were others than sentencepiece's.)

That every old id stays is not left to the format: the result is loaded, and all ids are compared, before it is published. Imports no torch.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megacpt.data.pieces import UNUSED, USER_DEFINED, read_model
from megacpt.data.records import BadLine, Fields
from megacpt.data.text import cut, find_files, read_piece
from megacpt.data.tokenizer import TOKENIZER_FILES, Tokenizer
from megacpt.errors import ConfigError
from megacpt.files import new_folder, read_object, write_atomically


def texts_of(
    inputs: list[str], kind: str = "auto", field: str = "text", most_bytes: int | None = None
) -> Iterator[str]:
    """Documents of text files, up to a number of bytes; unreadable records are skipped."""
    taken = 0
    for piece in cut(find_files(inputs, kind)):
        for record, _ in read_piece(piece, Fields(field)):
            if isinstance(record, BadLine):
                continue
            yield record.text
            taken += len(record.text.encode())
            if most_bytes and taken >= most_bytes:
                return


def train(inputs: list[str], output: Path, kind: str, vocab_size: int, eos_token: str, sample_bytes: int | None) -> int:
    """Trains a tokenizer and writes a Hugging Face directory. Returns its number of entries.

    Args:
        kind: "bpe" (byte-level, as Llama 3) or "sentencepiece" (BPE with byte fall-back, as Llama 2, but without a space before the text:
            with it, transformers 5 takes away one of those that the text begins with).
    """
    if output.exists():
        raise ConfigError([f"{output}: exists. Give another --output or remove it."], "the arguments")
    texts = texts_of(inputs, most_bytes=sample_bytes)
    with new_folder(output) as partial:
        train_one = _train_sentencepiece if kind == "sentencepiece" else _train_bpe
        config = train_one(texts, partial, vocab_size, eos_token)
        write_atomically(partial / "tokenizer_config.json", json.dumps(config, indent=1) + "\n")
    return Tokenizer(output).vocab_size


def _train_sentencepiece(texts: Iterator[str], output: Path, vocab_size: int, eos_token: str) -> dict[str, Any]:
    """Writes tokenizer.model. Returns what tokenizer_config.json says; the end-of-text token is Llama 2's."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.splitlines() if line.strip()),
        model_prefix=str(output / "tokenizer"), vocab_size=vocab_size, model_type="bpe", byte_fallback=True,
        character_coverage=0.9995, hard_vocab_limit=False, minloglevel=2, normalization_rule_name="identity",
        max_sentence_length=1 << 20, remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
        add_dummy_prefix=False,
    )  # fmt: skip
    (output / "tokenizer.vocab").unlink()
    return {
        "tokenizer_class": "LlamaTokenizer", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>", "add_bos_token": True,
        "add_prefix_space": False, "legacy": False,
    }  # fmt: skip


def _train_bpe(texts: Iterator[str], output: Path, vocab_size: int, eos_token: str) -> dict[str, Any]:
    """Writes tokenizer.json. Returns what tokenizer_config.json says."""
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
    return {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos_token}


def merge(base: Path, new: Path, output: Path, most: int | None) -> tuple[int, int]:
    """Writes the base tokenizer with what the new one adds. Returns (entries before, entries after).

    Args:
        most: entries to append at most, the new tokenizer's first ones.
    Raises:
        ConfigError: if the two are of different kinds, or an old id would move; nothing is written then.
    """
    if output.exists():
        raise ConfigError([f"{output}: exists. Give another --output or remove it."], "the arguments")
    kinds = [next((n for n in ("tokenizer.json", "tokenizer.model") if (d / n).is_file()), None) for d in (base, new)]
    kind = kinds[0]
    if kind is None or kind != kinds[1]:
        raise ConfigError(
            [f"{base} holds {kinds[0]}, {new} holds {kinds[1]}: both must be tokenizer.json (byte-level BPE) or both tokenizer.model "
             "(sentencepiece)."], "the tokenizers",
        )  # fmt: skip
    old = Tokenizer(base)
    with new_folder(output) as partial:
        for name in TOKENIZER_FILES:
            if (base / name).is_file() and name != kind:
                shutil.copyfile(base / name, partial / name)
        write = _merge_pieces if kind == "tokenizer.model" else _merge_merges
        write(base, new, partial / kind, most, old)
        merged = Tokenizer(partial)
        if problems := moved_ids(old, merged):
            raise ConfigError([f"{base}: {problem} Nothing was written." for problem in problems], "the tokenizers")
    return old.vocab_size, merged.vocab_size


def moved_ids(old: Tokenizer, new: Tokenizer) -> list[str]:
    """What is no longer as it was, over all ids of the old tokenizer; nothing if the new one holds it."""
    entries = ((i, entry) for i in range(old.vocab_size) if (entry := old.token(i)) is not None)
    moved = [(i, entry) for i, entry in entries if new.token(i) != entry]
    problems = []
    if moved:
        first, entry = moved[0]
        problems.append(
            f"{len(moved)} of {old.vocab_size} ids are other tokens than before, the first is {first}: {entry!r}, now "
            f"{new.token(first)!r} ({entry!r} has id {new.id_of(entry)} now). Old ids must stay."
        )
    for what, before, after in (("BOS", old.bos_id, new.bos_id), ("EOS", old.eos_id, new.eos_id)):
        if before is not None and before != after:
            problems.append(f"{what} was id {before} and is {after} now.")
    return problems


def _merge_pieces(base: Path, new: Path, output: Path, most: int | None, tokenizer: Tokenizer) -> None:
    """Tokens that stand beside the base's pieces become pieces with the same ids, so that new ones come behind them."""
    old, other = (read_model(directory / "tokenizer.model") for directory in (base, new))
    for i in range(len(old.pieces), tokenizer.vocab_size):
        entry = tokenizer.token(i)
        kind = UNUSED if entry is None else USER_DEFINED
        old.pieces.add(piece=f"<unused_{i}>" if entry is None else entry, score=0.0, type=kind)
    known, added = {piece.piece for piece in old.pieces}, 0
    lowest = min((piece.score for piece in old.pieces), default=0.0)
    for piece in other.pieces:
        if piece.piece in known or piece.type != piece.NORMAL or (most is not None and added >= most):
            continue
        known.add(piece.piece)
        added += 1
        old.pieces.add(piece=piece.piece, score=lowest - added)
    old.trainer_spec.vocab_size = len(old.pieces)
    output.write_bytes(old.SerializeToString())


def _merge_merges(base: Path, new: Path, output: Path, most: int | None, tokenizer: Tokenizer) -> None:
    """Added tokens that stand behind the base's vocabulary enter it with the ids that they have: the library counts those that are not in
    it from the vocabulary's end, which moves."""
    old, other = (_read_bpe(directory / "tokenizer.json") for directory in (base, new))
    if tokenizer.alphabet != (theirs := Tokenizer(new).alphabet):
        raise ConfigError(
            [
                f"{base} spells its entries in {tokenizer.alphabet}, {new} in {theirs}: their merges do not fit together."
            ],
            "the tokenizers",
        )
    vocabulary, merges = old["model"]["vocab"], old["model"]["merges"]
    parts = set(vocabulary)
    for i in range(tokenizer.vocab_size):
        if (entry := tokenizer.token(i)) is not None:
            vocabulary.setdefault(entry, i)
    known, following = set(vocabulary), tokenizer.vocab_size
    as_list = not merges or isinstance(merges[0], list)
    appended: dict[str, int] = {}

    def room() -> bool:
        return most is None or len(appended) < most

    if tokenizer.alphabet != "bytes":  # there a character may have no entry
        for entry in sorted((e for e in other["model"]["vocab"] if len(e) == 1), key=other["model"]["vocab"].get):
            if entry not in known and room():
                appended[entry] = following + len(appended)
        parts |= set(appended)
    for left, right in map(_pair, other["model"]["merges"]):
        whole = left + right
        if whole in known or left not in parts or right not in parts or (whole not in appended and not room()):
            continue
        appended.setdefault(whole, following + len(appended))
        parts.add(whole)
        merges.append([left, right] if as_list else f"{left} {right}")
    vocabulary |= appended
    output.write_text(json.dumps(old, ensure_ascii=False), encoding="utf-8")


def _pair(merge: list[str] | str) -> tuple[str, ...]:
    return tuple(merge) if isinstance(merge, list) else tuple(merge.split(" "))


def _read_bpe(path: Path) -> dict:
    try:
        content = read_object(path, 1 << 28)
        kind = content["model"].get("type") or ("BPE" if "merges" in content["model"] else "no BPE")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError([f"{path}: not a tokenizer.json ({error})."], "the tokenizers") from None
    if kind != "BPE":
        raise ConfigError([f"{path}: is {kind}, not BPE."], "the tokenizers")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if content["model"].get(key):
            raise ConfigError(
                [f"{path}: its {key} is {content['model'][key]!r}; such merges are not appended."], "the tokenizers"
            )
    return content


def characters_per_token(tokenizer: Tokenizer, texts: list[str]) -> float:
    return sum(map(len, texts)) / max(1, sum(map(len, tokenizer.encode_batch(texts))))
