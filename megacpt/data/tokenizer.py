"""Tokenizers as data preparation needs them: text in, ids out. Hugging Face directories, tokenizer.json, sentencepiece."""

import functools
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers

from megacpt.data.pieces import as_llama, from_sentencepiece
from megacpt.data.side_files import SideFiles, add_tokens, read_side_files
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
    "chat_template.json",
)
"""All that a folder may hold of a tokenizer."""
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
"""Of them, those that hold a vocabulary of their own."""


class Tokenizer:
    """A tokenizer with all of its folder's files taken into account, and the ids that preparation needs.

    Attributes:
        vocab_size: one more than the largest id.
        bos_id, eos_id: None where there is none.
        sha256: of the tokenizer's file, and of what other files of the folder add to its ids.

    Raises:
        ConfigError: if there is none, or its files contradict each other.
    """

    def __init__(self, path: str | Path, eos_token: str | None = None):
        self.path = str(path)
        file = _tokenizer_file(Path(path))
        content, side = file.read_bytes(), read_side_files(file.parent)
        if file.suffix == ".model":
            self._tokenizer, side = from_sentencepiece(file, side)
        else:
            self._tokenizer = _from_json(file, content, side)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        added = add_tokens(self._tokenizer, side, file)
        keys = ("legacy", "add_prefix_space") if file.suffix == ".model" or side.is_llama else ()
        more = {key: side.config[key] for key in (*keys, "split_special_tokens") if side.config.get(key) is not None}
        if more.get("split_special_tokens"):
            self._tokenizer.encode_special_tokens = True
        digest = content + json.dumps([more, added], sort_keys=True).encode() if more or added else content
        self.sha256 = hashlib.sha256(digest).hexdigest()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.eos_id = _find_eos(self._tokenizer, side, eos_token)
        self.bos_id = _find_bos(self._tokenizer, side, file)
        if eos_token and self.eos_id is None:
            raise ConfigError([f"--eos-token {eos_token}: is not in the vocabulary of {file}."], "the tokenizer")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without BOS and EOS."""
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_with_places(self, texts: Sequence[str]) -> list[tuple[list[int], np.ndarray, np.ndarray]]:
        """(the same ids, the character at which each token begins, the one at which it ends) of each text. Spaces that belong to a token
        are counted to it; tokens that share a character, as the bytes of one, all begin at it. Places do not fall."""
        found = []
        for encoding in self._untrimmed.encode_batch(list(texts), add_special_tokens=False):
            places = np.array(encoding.offsets, np.int64).reshape(-1, 2)
            begins, ends = np.maximum.accumulate(places).T
            found.append((encoding.ids, begins, ends))
        return found

    @functools.cached_property
    def _untrimmed(self) -> tokenizers.Tokenizer:
        """Without what comes behind the model: a template gives no ids here, and byte-level ones cut the space off a token's offsets."""
        plain = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        plain.post_processor = None
        plain.encode_special_tokens = self._tokenizer.encode_special_tokens
        return plain

    def token(self, number: int) -> str | None:
        """The entry of an id, as the vocabulary spells it; None where there is none."""
        return self._tokenizer.id_to_token(number)

    def id_of(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    @functools.cached_property
    def alphabet(self) -> str:
        """What entries are spelled in: "bytes" as byte-level BPE does, "pieces" with "▁" for a space, or "text"."""
        parts = (self._tokenizer.pre_tokenizer, self._tokenizer.decoder, self._tokenizer.normalizer)
        described = "".join(part.__getstate__().decode() for part in parts if part is not None)
        return "bytes" if "ByteLevel" in described else "pieces" if "▁" in described else "text"

    def spell(self, other: "Tokenizer", token: int) -> list[int]:
        """Own ids of the parts of another tokenizer's token. Without BOS."""
        entry = other.token(token)
        if entry is None:
            return []
        if (own := self.id_of(entry)) is not None:
            return [own]
        if self.alphabet == other.alphabet != "text":
            return [piece.id for piece in self._tokenizer.model.tokenize(entry)]
        return self.encode_batch([other.decode([token])])[0]

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


class FastTokenizer:
    """gigatoken in place of `tokenizers`, after its ids were seen to agree (`prepare --engine gigatoken`)."""

    CHECKED_DOCUMENTS = 1000

    def __init__(self, tokenizer: Tokenizer):
        import gigatoken  # pyright: ignore[reportMissingImports] optional

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


def _from_json(file: Path, content: bytes, side: SideFiles) -> tokenizers.Tokenizer:
    """Raises ConfigError for what is no tokenizer.json, and for added tokens that get other ids than the file says."""
    try:
        tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        written = json.loads(content)
        added = written.get("added_tokens", [])
    except Exception as error:  # the library raises plain Exception
        raise ConfigError([f"{file}: not a tokenizer.json ({error})."], "the tokenizer") from None
    for token in added:
        if (found := tokenizer.token_to_id(token["content"])) != token["id"]:
            raise ConfigError(
                [
                    f"{file}: added token {token['content']!r} has id {token['id']} there, but the library reads it as {found}: it is not "
                    "in the vocabulary, and the vocabulary reaches over its id. Take the original file."
                ],
                "the tokenizer",
            )
    return as_llama(tokenizer, side, file) if side.is_llama else tokenizer


def _find_eos(tokenizer: tokenizers.Tokenizer, side: SideFiles, eos_token: str | None) -> int | None:
    """As named on the command line, by the folder's files, or by its model; guessed only where nobody names it."""
    name = eos_token or side.name("eos_token")
    if name is not None:
        return tokenizer.token_to_id(name)
    ids = side.config.get("eos_token_id")
    ids = ids[0] if isinstance(ids, list) and ids else ids
    if isinstance(ids, int):
        return ids
    known = (tokenizer.token_to_id(token) for token in ("<|end_of_text|>", "</s>", "<|endoftext|>", "<eos>"))
    return next((i for i in known if i is not None), None)


def _find_bos(tokenizer: tokenizers.Tokenizer, side: SideFiles, file: Path) -> int | None:
    """What the tokenizer's own template puts before a text.

    Raises:
        ConfigError: if the template's id is no token, or another than the named one.
    """
    plain = _some_text(tokenizer)
    if plain is None:
        return None
    text, ids = plain
    template = tokenizer.encode(text).ids
    before = next((i for i in range(len(template)) if template[i : i + len(ids)] == ids), 0)
    if before == 0:
        return None
    name, bos = side.name("bos_token"), template[0]
    named = None if name is None else tokenizer.token_to_id(name)
    if tokenizer.id_to_token(bos) is None or (named is not None and named not in template[:before]):
        raise ConfigError(
            [
                f"{file}: its template begins a text with id {bos}, which is {tokenizer.id_to_token(bos)!r}; "
                f"{name!r} has id {named}. The file was changed after its template was made. Take the original file."
            ],
            "the tokenizer",
        )
    return bos


def _some_text(tokenizer: tokenizers.Tokenizer) -> tuple[str, list[int]] | None:
    """A text that the vocabulary knows, and its ids."""
    entries = (entry for entry, _ in sorted(tokenizer.get_vocab(with_added_tokens=False).items(), key=lambda e: e[1]))
    for text in itertools.chain(("a", "A", "0", "."), itertools.islice(entries, 1000)):
        if ids := tokenizer.encode(text, add_special_tokens=False).ids:
            return text, ids
    return None
