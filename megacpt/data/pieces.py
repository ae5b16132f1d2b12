"""A sentencepiece model as a tokenizer of the `tokenizers` library, as transformers 5 makes LlamaTokenizer from it: BPE whose merges are
ranked by the id of what they form, bytes for what has no piece, no normalisation, "▁" for a space and before the text.

Source: transformers 5, LlamaTokenizer and SentencePieceExtractor (read, and compared by ids in tests/data/test_tokenizer.py).
"""

import json
import multiprocessing
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from megacpt.data.side_files import SideFiles, text_of
from megacpt.errors import ConfigError
from megacpt.log import warn

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
"""Types of pieces in sentencepiece_model.proto."""
BARE = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Classes that put no space before the text."""
CLASSES = (None, "LlamaTokenizer", "LlamaTokenizerFast", *BARE)


def read_model(file: Path):
    """The parsed proto.

    Raises:
        ConfigError: if it is none, or not BPE.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2 as proto

    model = proto.ModelProto()  # pyright: ignore[reportAttributeAccessIssue] protobuf makes it on import
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


def from_sentencepiece(file: Path, side: SideFiles) -> tuple[tokenizers.Tokenizer, SideFiles]:
    """(the tokenizer without what stands beside its pieces, the side files with what the model itself names).

    Raises:
        ConfigError: if its kind is not known here.
    """
    kind = side.config.get("tokenizer_class")
    if kind not in CLASSES:
        raise _refused(file, f"tokenizer_class {kind} is not read from a .model. {CONVERT}")
    model = read_model(file)
    named = {key: model.pieces[i].piece for key, i in _named_pieces(model)}
    config = (named if side.has_own else config_of_model(file)) | side.config
    if kind in BARE:
        config["add_prefix_space"] = False
    _warn_of_differences(file, model, config)
    vocabulary = {piece.piece: i for i, piece in enumerate(model.pieces)}
    unknown = next((piece.piece for piece in model.pieces if piece.type == piece.UNKNOWN), None)
    tokenizer = _llama(vocabulary, ranked_merges(vocabulary), unknown, config)
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type != USER_DEFINED)
            for piece in model.pieces
            if piece.type in (CONTROL, USER_DEFINED) or piece.type == piece.UNKNOWN
        ]
    )
    bos = text_of(config.get("bos_token"))
    if config.get("add_bos_token") and (i := tokenizer.token_to_id(bos or "<s>")) is not None:
        bos = bos or "<s>"
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, i)])
    return tokenizer, replace(side, config=config)


def config_of_model(file: Path) -> dict[str, Any]:
    """tokenizer_config.json that makes transformers read a sentencepiece model as it is read here where there is none."""
    model = read_model(file)
    prefix = model.normalizer_spec.add_dummy_prefix
    names = {key: model.pieces[i].piece for key, i in _named_pieces(model)}
    return {
        "tokenizer_class": "LlamaTokenizer", **names, "add_bos_token": "bos_token" in names, "add_prefix_space": prefix, "legacy": False,
    }  # fmt: skip


def _named_pieces(model) -> list[tuple[str, int]]:
    """bos_token, eos_token and unk_token with the ids that the model gives them."""
    trainer = model.trainer_spec
    pairs = (("bos_token", trainer.bos_id), ("eos_token", trainer.eos_id), ("unk_token", trainer.unk_id))
    return [(key, i) for key, i in pairs if 0 <= i < len(model.pieces)]


def _llama(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], unknown: str | None, config: dict[str, Any]
) -> tokenizers.Tokenizer:
    """transformers 5's LlamaTokenizer, but for the unknown token: it has none, and drops what has neither piece nor bytes."""
    unknown = unknown if unknown in vocabulary else None
    model = models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    prefix = config.get("add_prefix_space") is not False
    scheme = "never" if not prefix else "always" if config.get("legacy") else "first"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    stripped = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *stripped]
    )
    return tokenizer


def as_llama(tokenizer: tokenizers.Tokenizer, side: SideFiles, file: Path) -> tokenizers.Tokenizer:
    """What transformers 5 makes of a tokenizer.json with the class LlamaTokenizer: vocabulary, merges, template and added tokens are those
    of the file, what happens to spaces is LlamaTokenizer's. Byte-level ones stay as they are."""
    content = json.loads(tokenizer.to_str())
    model, steps = content["model"], json.dumps([content[key] for key in ("pre_tokenizer", "normalizer", "decoder")])
    if model["type"] != "BPE" or '"ByteLevel"' in steps:
        return tokenizer
    if not _only_marks_spaces(content):
        _warn_once(
            f"{file}: is read as it is written. transformers 5 would drop its normalizer and pre-tokenizer, as the tokenizer_class is "
            "LlamaTokenizer; PreTrainedTokenizerFast keeps them."
        )
        return tokenizer
    merges = [tuple(pair) for pair in model["merges"]]
    made = _llama(model["vocab"], merges, model["unk_token"], side.config)
    if tokenizer.post_processor is not None:
        made.post_processor = tokenizer.post_processor
    made.add_tokens([token for _, token in sorted(tokenizer.get_added_tokens_decoder().items())])
    return made


def _only_marks_spaces(content: dict[str, Any]) -> bool:
    """Whether "▁" for a space, and before the text, is all that happens before BPE."""
    steps: list[dict[str, Any]] = []
    for key, inner in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        step = content[key] or {"type": "Sequence", inner: []}
        steps += step[inner] if step["type"] == "Sequence" else [step]
    mark = {"Prepend": "prepend", "Replace": "content", "Metaspace": "replacement"}
    return all(step.get(mark.get(step["type"], "")) == "▁" and step.get("split") is not True for step in steps)


def _warn_once(message: str) -> None:
    """Not again from every worker."""
    if multiprocessing.parent_process() is None:
        warn(message)


def _warn_of_differences(file: Path, model, config: dict[str, Any]) -> None:
    """Where transformers, and with it this reading, departs from what sentencepiece itself would do with the model."""
    scores = [piece.score for piece in model.pieces if piece.type == piece.NORMAL]
    prefix = config.get("add_prefix_space") is not False
    found = {
        "normalizes characters": bool(model.normalizer_spec.precompiled_charsmap),
        "drops repeated spaces": model.normalizer_spec.remove_extra_whitespaces,
        "puts a space in front" if not prefix else "puts no space in front": prefix != model.normalizer_spec.add_dummy_prefix,
        "ranks its pieces otherwise than by id": any(a < b for a, b in zip(scores, scores[1:], strict=False)),
    }  # fmt: skip
    if any(found.values()):
        said = ", ".join(what for what, is_so in found.items() if is_so)
        _warn_once(f"{file}: sentencepiece itself {said}; transformers, and so this reading of it, does not.")
    if "add_bos_token" not in config:
        _warn_once(f"{file}: tokenizer_config.json has no add_bos_token: no BOS, as in transformers 5.")


def ranked_merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to form a piece from two others, by the id of the piece, then by the lengths of the two."""
    found = []
    for whole, rank in vocabulary.items():
        halves = ((whole[:cut], whole[cut:]) for cut in range(1, len(whole)))
        known = sorted((vocabulary[a], vocabulary[b], a, b) for a, b in halves if a in vocabulary and b in vocabulary)
        found += [(rank, len(a), len(b), a, b) for *_, a, b in known]
    return [(a, b) for *_, a, b in sorted(found, key=lambda entry: entry[:3])]


def _refused(file: Path, why: str) -> ConfigError:
    return ConfigError([f"{file}: {why}"], "the tokenizer")
