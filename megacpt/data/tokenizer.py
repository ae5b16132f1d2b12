"""Tokenizers as data preparation needs them: text in, ids out. Hugging Face directories, tokenizer.json, sentencepiece."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megacpt.errors import ConfigError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


class Tokenizer:
    """A tokenizer file and the ids that preparation needs.

    Attributes:
        vocab_size: one more than the largest id.
        bos_id, eos_id: None where there is none.
        sha256: of the tokenizer's file.
    """

    def __init__(self, path: str | Path, eos_token: str | None = None):
        self.path = str(path)
        file = _tokenizer_file(Path(path))
        self.sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        config = _side_files(file.parent)
        if file.suffix == ".model":
            import sentencepiece

            try:
                self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
            except (RuntimeError, OSError) as error:
                raise ConfigError(
                    [
                        f"{file}: not a sentencepiece model ({str(error).splitlines()[0]}). Meta's tiktoken file is not read; "
                        "use the tokenizer.json of the Hugging Face form."
                    ],
                    "the tokenizer",
                ) from None
            self._tokenizer = None
            self.vocab_size = self._pieces.vocab_size()
            id_of = lambda token: i if (i := self._pieces.piece_to_id(token)) != self._pieces.unk_id() else None
            self.eos_id = id_of(eos_token) if eos_token else _non_negative(self._pieces.eos_id())
            self.bos_id = _non_negative(self._pieces.bos_id()) if config.get("add_bos_token", True) else None
        else:
            import tokenizers

            try:
                self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
            except Exception as error:  # the library raises plain Exception
                raise ConfigError([f"{file}: not a tokenizer.json ({error})."], "the tokenizer") from None
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
            self._pieces = None
            self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
            self.eos_id = _find_eos(self._tokenizer, config, eos_token)
            template = self._tokenizer.encode("a").ids
            plain = self._tokenizer.encode("a", add_special_tokens=False).ids
            self.bos_id = template[0] if len(template) > len(plain) and template[0] != plain[0] else None
        if eos_token and self.eos_id is None:
            raise ConfigError([f"--eos-token {eos_token}: is not in the vocabulary of {file}."], "the tokenizer")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without BOS and EOS."""
        if self._tokenizer is None:
            return self._pieces.encode(list(texts))
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def spell(self, other: "Tokenizer", token: int) -> list[int]:
        """Own ids of another tokenizer's token, by its text; by its bytes where they are no text by themselves. Without BOS."""
        text = other.decode([token])
        if "\ufffd" in text and self._tokenizer is not None and other._tokenizer is not None:
            found = self._tokenizer.model.tokenize(other._tokenizer.id_to_token(token))
            return [piece.id for piece in found]
        return [i for i in self.encode_batch([text])[0] if i != self.bos_id]

    def decode(self, ids: Sequence[int]) -> str:
        ids = [int(i) for i in ids]
        return (
            self._pieces.decode(ids)
            if self._tokenizer is None
            else self._tokenizer.decode(ids, skip_special_tokens=False)
        )


class FastTokenizer:
    """gigatoken in place of `tokenizers`, after its ids were seen to agree (`prepare --engine gigatoken`)."""

    CHECKED_DOCUMENTS = 1000

    def __init__(self, tokenizer: Tokenizer):
        import gigatoken

        self._slow = tokenizer
        self._fast = gigatoken.Tokenizer(str(_tokenizer_file(Path(tokenizer.path))))
        self._checked = 0

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        ids = self._fast.encode_batch_list(list(texts))
        count = min(len(texts), self.CHECKED_DOCUMENTS - self._checked)
        if count > 0:
            for i, (ours, theirs) in enumerate(zip(ids, self._slow.encode_batch(texts[:count]), strict=False)):
                if not np.array_equal(ours, theirs):
                    raise ConfigError(
                        [
                            f"--engine gigatoken: its ids differ from the tokenizer's on {texts[i][:60]!r}. "
                            "Use --engine tokenizers."
                        ],
                        "the tokenizer",
                    )
            self._checked += count
        return ids


def _tokenizer_file(path: Path) -> Path:
    if path.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):
            if (path / name).is_file():
                return path / name
        raise ConfigError([f"{path}: holds neither tokenizer.json nor tokenizer.model."], "the tokenizer")
    if path.is_file() and path.suffix in (".json", ".model"):
        return path
    raise ConfigError(
        [f"{path}: no tokenizer. Give a Hugging Face directory, a tokenizer.json or a sentencepiece .model."],
        "the tokenizer",
    )


def _side_files(directory: Path) -> dict:
    """tokenizer_config.json over generation_config.json over config.json, what there is of them."""
    merged: dict = {}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            try:
                content = json.loads((directory / name).read_text(encoding="utf-8"))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ConfigError([f"{directory / name}: not valid JSON: {error}"], "the tokenizer") from None
            merged.update({k: v for k, v in content.items() if v is not None})
    return merged


def _find_eos(tokenizer, config: dict, eos_token: str | None) -> int | None:
    name = eos_token or config.get("eos_token")
    name = name.get("content") if isinstance(name, dict) else name
    if name is not None:
        return tokenizer.token_to_id(name)
    ids = config.get("eos_token_id")
    if ids is not None:
        return ids[0] if isinstance(ids, list) else ids
    known = (tokenizer.token_to_id(token) for token in ("<|end_of_text|>", "</s>", "<|endoftext|>", "<eos>"))
    return next((i for i in known if i is not None), None)


def _non_negative(number: int) -> int | None:
    return number if number >= 0 else None
