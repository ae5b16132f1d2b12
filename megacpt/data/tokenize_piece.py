"""One piece of the input to tokens, in a worker process: the work that `prepare` gives to each.

What is written for piece i: i.bin tokens, i.len int32 lengths; where the options ask, i.lab uint32 labels (numbers of the report's
names), i.num int32 runs of each document with i.run, the runs of weights, and i.itm bool, whether a document goes on with the item of the
one before it in the piece.
"""

import contextlib
import json
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from megacpt.data.beside import RUN
from megacpt.data.indexed import token_dtype
from megacpt.data.join import SHOWN_BAD_LINES, disk_error, is_same_item
from megacpt.data.records import BadLine, Document, Fields
from megacpt.data.text import Piece, line_in_file, read_piece
from megacpt.data.tokenizer import FastTokenizer, Tokenizer
from megacpt.errors import DataError
from megacpt.files import write_atomically

_BATCH_CHARS = 1 << 20


@dataclass(frozen=True)
class Options:
    """What the output depends on, besides the input itself."""

    tokenizer: str
    text_field: str = "text"
    format: str = "auto"
    bos: bool = True
    eos: bool = True
    eos_token: str | None = None
    engine: str = "tokenizers"
    max_bad_lines: int = 10
    vocab_size: int | None = None
    """The model's vocabulary, when it is smaller or larger than the tokenizer's."""
    domain_field: str | None = None
    """Field with a label of each document, kept beside the tokens, so that a domain can be a view of the set."""
    segments_field: str | None = None
    """Field with a list of {"text", "weight"}, in place of the text."""
    prompt_field: str | None = None
    completion_field: str | None = None
    """Two fields in place of the text: the first weighs 0, the second 1."""
    item_field: str | None = None
    """Documents that follow one another with the same value here are one item."""

    @property
    def fields(self) -> Fields:
        return Fields(
            self.text_field, self.domain_field, self.segments_field, self.prompt_field, self.completion_field,
            self.item_field,
        )  # fmt: skip

    @property
    def weighted(self) -> bool:
        return self.segments_field is not None or self.prompt_field is not None


@dataclass
class _Worker:
    tokenizer: Any
    options: Options
    dtype: np.dtype
    vocab_size: int
    prefix: list[int]
    suffix: list[int]
    counter: Any


_worker: _Worker | None = None


def start_worker(options: Options, vocab_size: int, counter, threads: int) -> None:
    global _worker
    os.environ["RAYON_NUM_THREADS"], os.environ["TOKENIZERS_PARALLELISM"] = str(threads), "true"
    tokenizer = Tokenizer(options.tokenizer, options.eos_token)
    ends = [tokenizer.eos_id] if options.eos and tokenizer.eos_id is not None else []
    assert bool(ends) == options.eos, f"{options.tokenizer} has no EOS"
    _worker = _Worker(
        FastTokenizer(tokenizer) if options.engine == "gigatoken" else tokenizer,
        options,
        token_dtype(vocab_size),
        vocab_size,
        [tokenizer.bos_id] if options.bos and tokenizer.bos_id is not None else [],
        ends,
        counter,
    )


class _Output:
    """The files of a piece while it is written."""

    def __init__(self, stem: str, options: Options, stack: contextlib.ExitStack):
        kinds = ["bin", "len"]
        kinds += ["lab"] if options.domain_field else []
        kinds += ["run", "num"] if options.weighted else []
        kinds += ["itm"] if options.item_field else []
        self.files = {kind: stack.enter_context(open(f"{stem}.{kind}", "wb")) for kind in kinds}

    def add(self, kind: str, values: np.ndarray) -> None:
        self.files[kind].write(values.tobytes())

    def sync(self) -> None:
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())


def tokenize_piece(parts: str, index: int, piece: Piece) -> dict[str, Any]:
    """Writes one piece's tokens, lengths and what stands beside them, then its report. Returns the report."""
    worker = _worker
    assert worker is not None, "start_worker begins each process"
    stem = os.path.join(parts, f"{index:06d}")
    bad: list[BadLine] = []
    report = {
        "documents": 0, "tokens": 0, "empty": 0, "weightless": 0, "runs": 0, "spanning": 0, "bad_lines": 0, "bad_examples": [],
        "labels": [], "path": piece.paths[0], "first_item": None, "last_item": None,
    }  # fmt: skip
    names: dict[str, int] = {}
    waiting: list[Document] = []
    chars = seen = 0
    try:
        with contextlib.ExitStack() as stack:
            output = _Output(stem, worker.options, stack)

            def flush() -> None:
                nonlocal waiting, chars
                if waiting:
                    _write_batch(worker, waiting, names, output, report, piece)
                waiting, chars = [], 0

            for record, position in read_piece(piece, worker.options.fields):
                if isinstance(record, BadLine):
                    bad.append(record)
                    if len(bad) > worker.options.max_bad_lines:
                        break
                elif not record.text:
                    report["empty"] += 1
                else:
                    waiting.append(record)
                    chars += len(record.text)
                    if chars >= _BATCH_CHARS:
                        flush()
                if position - seen > 1 << 20:
                    with worker.counter.get_lock():
                        worker.counter.value += min(position, piece.num_bytes) - min(seen, piece.num_bytes)
                    seen = position
            flush()
            report["labels"] = list(names)
            with worker.counter.get_lock():
                worker.counter.value += piece.num_bytes - min(seen, piece.num_bytes)
            output.sync()
    except OSError as error:
        raise disk_error(error, stem) from error
    report["bad_lines"] = len(bad)
    report["bad_examples"] = [(b.path, line_in_file(piece, b.line), b.reason) for b in bad[:SHOWN_BAD_LINES]]
    if len(bad) <= worker.options.max_bad_lines:
        write_atomically(stem + ".json", json.dumps(report))
    return report


def _write_batch(
    worker: _Worker,
    documents: list[Document],
    names: dict[str, int],
    output: _Output,
    report: dict[str, Any],
    piece: Piece,
) -> None:
    """Tokens of some documents and what stands beside them. One without a label that weighs is left out, if it is an item of its own."""
    encoded, kept, runs = _encode(worker, documents, report), [], []
    flat: list[int] = []
    for document, (ids, weights) in zip(documents, encoded, strict=True):
        if weights is not None and not (weights[1:] > 0).any():
            report["weightless"] += 1
            if not worker.options.item_field:
                continue
        kept.append((document, ids))
        flat += ids
        if worker.options.weighted:
            runs.append(_runs_of(weights))
    tokens, lengths = np.array(flat, dtype=np.int64), np.array([len(ids) for _, ids in kept], "<i4")
    if len(tokens) and (tokens.max() >= worker.vocab_size or tokens.min() < 0):
        at = int(np.argmax((tokens >= worker.vocab_size) | (tokens < 0)))
        text = kept[int(np.searchsorted(np.cumsum(lengths), at, side="right"))][0].text
        raise DataError(
            f"{piece.paths[0]}: token id {tokens[at]} is outside the vocabulary of {worker.vocab_size} entries, in the "
            f"document that begins {text[:60]!r}. The tokenizer is not the model's, or --vocab-size is wrong."
        )
    output.add("bin", tokens.astype(worker.dtype))
    output.add("len", lengths)
    if worker.options.domain_field:
        output.add("lab", np.array([names.setdefault(document.label, len(names)) for document, _ in kept], "<u4"))
    if worker.options.weighted:
        output.add("num", np.array([len(each) for each in runs], "<i4"))
        output.add("run", np.concatenate(runs) if runs else np.zeros(0, RUN))
    if worker.options.item_field:
        output.add("itm", _continued([document.item for document, _ in kept], report))
    report["documents"] += len(kept)
    report["tokens"] += len(tokens)
    report["runs"] += sum(map(len, runs))


def _encode(
    worker: _Worker, documents: list[Document], report: dict[str, Any]
) -> list[tuple[list[int], np.ndarray | None]]:
    """(ids with BOS and EOS, float32 weight of each; None where all weigh 1) of each document.

    The whole text is tokenized, and a token has the weight of the part in which it begins. BOS has that of the first part, EOS that of the
    last.
    """
    texts, before, behind = [document.text for document in documents], worker.prefix, worker.suffix
    if not worker.options.weighted:
        return [([*before, *ids, *behind], None) for ids in worker.tokenizer.encode_batch(texts)]
    found = []
    for document, (ids, begins, token_ends) in zip(documents, worker.tokenizer.encode_with_places(texts), strict=True):
        weights = None
        if document.parts:
            ends, each = (np.array(column) for column in zip(*document.parts, strict=True))
            part, last = (_part_at(ends, place) for place in (begins, token_ends - 1))
            weights = np.concatenate([each[:1].repeat(len(before)), each[part], each[-1:].repeat(len(behind))])
            weights = weights.astype(np.float32)
            report["spanning"] += int(((last > part) & (each[part] != each[last])).sum())
        found.append(([*before, *ids, *behind], weights))
    return found


def _part_at(ends: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The part in which each character is."""
    return np.minimum(np.searchsorted(ends, places, side="right"), len(ends) - 1)


def _runs_of(weights: np.ndarray | None) -> np.ndarray:
    """Run lengths of a document's weights; none where all are 1."""
    if weights is None or (weights == 1).all():
        return np.zeros(0, RUN)
    ends = np.append(np.flatnonzero(np.diff(weights)) + 1, len(weights))
    runs = np.zeros(len(ends), RUN)
    runs["end"], runs["weight"] = ends, weights[ends - 1]
    return runs


def _continued(items: list[str | int | None], report: dict[str, Any]) -> np.ndarray:
    """bool: whether each document belongs to the item of the one before it in its piece."""
    if not items:
        return np.zeros(0, bool)
    if not report["documents"]:
        report["first_item"] = items[0]
    before = [report["last_item"], *items[:-1]]
    report["last_item"] = items[-1]
    return np.array([is_same_item(item, other) for item, other in zip(items, before, strict=True)], bool)
