"""The files beside a tokenizer's own, read as transformers 5 reads them: which of them names EOS and BOS, and which tokens are added to the
vocabulary, under which ids.

special_tokens_map.json stands over tokenizer_config.json, and added_tokens.json says ids; but where tokenizer_config.json has its
`added_tokens_decoder`, that alone says ids, and the map only what tokenizer_config.json does not. The model's own generation_config.json
and config.json come last.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from megacpt.errors import ConfigError
from megacpt.files import JsonError, read_object

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class SideFiles:
    """Attributes:
    config: what the files say, the stronger one over the weaker. has_own: whether there is a tokenizer_config.json.
    declared: tokens that a file gives an id.
    special: tokens without an id there: the named ones (bos_token, …), then further ones.
    """

    config: dict[str, Any]
    has_own: bool
    declared: dict[int, AddedToken]
    special: list[AddedToken]

    def name(self, key: str) -> str | None:
        """The text of a named token."""
        return text_of(self.config.get(key))

    @property
    def is_llama(self) -> bool:
        return self.config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast")


def read_side_files(folder: Path) -> SideFiles:
    """Raises ConfigError for a file that is not understood."""
    own, laid = (_read(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json"))
    decoder = own.get("added_tokens_decoder")
    tokens = own | laid if decoder is None else laid | own
    config = _read(folder / "config.json") | _read(folder / "generation_config.json") | tokens
    try:
        named = [tokens[key] for key in (*NAMED, *(key for key in tokens if key not in NAMED)) if _names(key, tokens)]
        lists = [tokens.get(key) or [] for key in ("additional_special_tokens", "extra_special_tokens")]
        further = [token for each in lists for token in (each.values() if isinstance(each, dict) else each)]
        special = [_token(token, special=True) for token in [*named, *further]]
        if decoder is None:
            texts = {token.content for token in special}
            added = {number: text for text, number in _read(folder / "added_tokens.json").items()}
            declared = {
                int(i): AddedToken(text, normalized=text not in texts, special=text in texts)
                for i, text in added.items()
            }
        else:
            declared = {int(i): _token(token) for i, token in decoder.items()}
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError([f"{folder}: its added tokens are not understood ({error})."], "the tokenizer") from None
    return SideFiles(config, (folder / "tokenizer_config.json").is_file(), declared, special)


def _names(key: str, tokens: dict[str, Any]) -> bool:
    return key.endswith("_token") and isinstance(tokens.get(key), str | dict) and bool(text_of(tokens[key]))


def add_tokens(tokenizer: Tokenizer, side: SideFiles, file: Path) -> list[str]:
    """Adds what the side files name: tokens with ids first, in their order, then the others behind them; and their flags, which are
    stronger than those of the tokenizer's own file (transformers' TokenizersBackend). Returns what was not in it before.

    An EOS that is nowhere in the vocabulary is not invented.

    Raises:
        ConfigError: if a token does not get the id that its file gives it.
    """
    before = [repr(token) for token in tokenizer.get_added_tokens_decoder().values()]
    known = {token.content for token in [*tokenizer.get_added_tokens_decoder().values(), *side.declared.values()]}
    tokens = [token for _, token in sorted(side.declared.items()) if repr(token) not in before]
    eos, names = side.name("eos_token"), {side.name(key) for key in NAMED}
    for token in side.special:
        if token.content not in known and (token.content != eos or tokenizer.token_to_id(token.content) is not None):
            known.add(token.content)
            tokens.append(token)
    for token in tokens:
        token.special = token.special or token.content in names
    tokenizer.add_tokens(tokens)
    for i, token in side.declared.items():
        if (found := tokenizer.token_to_id(token.content)) != i:
            there = f", which is the piece {tokenizer.id_to_token(i)!r}" if tokenizer.id_to_token(i) is not None else ""
            raise ConfigError(
                [
                    f"{file.parent}: added token {token.content!r} has id {i}{there}; with {file.name} it gets id {found}. The "
                    "folder's files do not belong together."
                ],
                "the tokenizer",
            )
    return [repr(token) for token in tokens]


def text_of(token: Any) -> str | None:
    """A token's text, from its name or its description as a table."""
    return token.get("content") if isinstance(token, dict) else token


def _token(given: dict[str, Any] | str, special: bool = False) -> AddedToken:
    if isinstance(given, str):
        return AddedToken(given, special=special)
    flags = {"special": special} | {flag: bool(given[flag]) for flag in _FLAGS if flag in given}
    return AddedToken(given["content"], **flags)


def _read(file: Path) -> dict[str, Any]:
    """The file's object, without nulls; nothing if there is no file."""
    if not file.is_file():
        return {}
    try:
        content = read_object(file, 1 << 28)
    except (JsonError, OSError) as error:
        raise ConfigError([f"{file}: cannot be read: {error}"], "the tokenizer") from None
    return {key: value for key, value in content.items() if value is not None}
