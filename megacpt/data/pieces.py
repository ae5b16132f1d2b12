"""A sentencepiece model as a tokenizer of the `tokenizers` library, as transformers 5 makes LlamaTokenizer from it: BPE whose merges are
ranked by the id of what they form, bytes for what has no piece, no normalisation, "▁" for a space and before the text.

Source: transformers 5, LlamaTokenizer and SentencePieceExtractor (read, and compared by ids in tests/data/test_tokenizer.py).
"""

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from megacpt.errors import ConfigError

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
"""Types of pieces in sentencepiece_model.proto."""
CLASSES = (None, "LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")


def read_model(file: Path):
    """The parsed proto.

    Raises:
        ConfigError: if it is none, or not BPE.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
    except DecodeError as error:
        raise _refused(file, f"not a sentencepiece model ({error}). {TIKTOKEN}") from None
    if not model.pieces:
        raise _refused(file, f"not a sentencepiece model (it holds no pieces). {TIKTOKEN}")
    if model.trainer_spec.model_type != model.trainer_spec.BPE:
        raise _refused(file, f"is no BPE model. {CONVERT}")
    return model


TIKTOKEN = "Meta's tiktoken file is not read; use the tokenizer.json of the Hugging Face form."
CONVERT = "Save it once with transformers' AutoTokenizer (save_pretrained), which writes a tokenizer.json."


def from_sentencepiece(file: Path, config: dict[str, Any], added: dict[int, AddedToken]) -> tokenizers.Tokenizer:
    """The tokenizer.

    Args:
        config: of tokenizer_config.json: `tokenizer_class`, `legacy` and `add_prefix_space` count.
        added: tokens beside the pieces, by id.
    Raises:
        ConfigError: if its kind is not known here, or an added token has the id of a piece.
    """
    if config.get("tokenizer_class") not in CLASSES:
        raise _refused(file, f"tokenizer_class {config['tokenizer_class']} is not read from a .model. {CONVERT}")
    model = read_model(file)
    pieces = [piece.piece for piece in model.pieces]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    clashes = [
        f"added token {token.content!r} has id {i}, which is the piece {pieces[i]!r}"
        for i, token in added.items()
        if i < len(pieces) and pieces[i] != token.content
    ]
    if clashes:
        raise _refused(file, f"{clashes[0]}. The folder's files do not belong together.")
    merges = ranked_merges(vocabulary)
    unknown = next((piece.piece for piece in model.pieces if piece.type == piece.UNKNOWN), "<unk>")
    whole = vocabulary | {token.content: i for i, token in added.items()}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(whole, merges, unk_token=unknown if unknown in whole else None, fuse_unk=True, byte_fallback=True)
    )
    prefix = config.get("add_prefix_space") is not False
    scheme = "never" if not prefix else "always" if config.get("legacy") else "first"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    stripped = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *stripped]
    )
    own = [
        AddedToken(piece.piece, normalized=False, special=piece.type != USER_DEFINED)
        for piece in model.pieces
        if piece.type in (CONTROL, USER_DEFINED) or piece.type == piece.UNKNOWN
    ]
    tokenizer.add_tokens([*own, *(token for _, token in sorted(added.items()))])
    if config.get("add_bos_token", True):
        bos = text_of(config.get("bos_token")) or "<s>"
        if (i := tokenizer.token_to_id(bos)) is not None:
            tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, i)])
    return tokenizer


def ranked_merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to form a piece from two others, by the id of the piece, then by the lengths of the two."""
    found = []
    for whole, rank in vocabulary.items():
        halves = ((whole[:cut], whole[cut:]) for cut in range(1, len(whole)))
        known = sorted((vocabulary[a], vocabulary[b], a, b) for a, b in halves if a in vocabulary and b in vocabulary)
        found += [(rank, len(a), len(b), a, b) for *_, a, b in known]
    return [(a, b) for *_, a, b in sorted(found, key=lambda entry: entry[:3])]


def text_of(token: Any) -> str | None:
    """A token's text, from its name or its description as a table."""
    return token.get("content") if isinstance(token, dict) else token


def _refused(file: Path, why: str) -> ConfigError:
    return ConfigError([f"{file}: {why}"], "the tokenizer")
