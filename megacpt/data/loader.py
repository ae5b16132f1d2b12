"""Rows to batches: tokens, labels, positions and document starts, on the host, the same for every layout.

positions restart at each document; labels[i] = tokens[i + 1] inside a document, else -100; the room that is left in a
row is one document of EOS without labels. A document cut at a row's edge is two documents.
"""

import math
import queue
import threading
import zlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from megacpt.config.clock import Clock
from megacpt.config.decisions import NONE, Decisions
from megacpt.config.recipe import Recipe
from megacpt.config.sections.stage import Stage
from megacpt.data.curriculum import digest_of
from megacpt.data.domain import DomainData
from megacpt.data.manifest import expand_files, expand_paths, make_room_for
from megacpt.data.mixture import Order, row_of
from megacpt.data.packing import PackingIndex, open_index
from megacpt.data.select import Selection
from megacpt.errors import ConfigError, DataError

IGNORE = -100


@dataclass(frozen=True)
class Batch:
    """Some rows.

    Attributes:
        tokens, labels, positions: int64 [rows, seq_len].
        document_starts: int64, places in the flattened rows at which documents begin; the first is 0.
        row_offsets: int64 [rows + 1], the documents of row i are document_starts[row_offsets[i]:row_offsets[i + 1]].
        domain: name of each row's domain, "" for a filler row.
        weights: float32 [rows, seq_len], how heavy each label is in the loss: weights[i] belongs to labels[i], so to the token at i + 1;
            None: all alike, 1. Not read without a label.
        item: int32 [documents], the item that each document belongs to, numbered from 0 in the batch; None: each is its own.
    """

    tokens: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    document_starts: np.ndarray
    row_offsets: np.ndarray
    domain: list[str]
    weights: np.ndarray | None = None
    item: np.ndarray | None = None


@dataclass(frozen=True)
class Pick:
    """One row of one domain; None in its place is a filler row."""

    domain: str
    epoch: int
    row: int


def make_batch(
    rows: Sequence[tuple[PackingIndex, str, int] | None], seq_len: int, pad_id: int, vocab_size: int
) -> Batch:
    """Reads rows of packed domains; None gives a row of padding without labels.

    Raises:
        DataError: for a token id outside the vocabulary, with its document.
    """
    shape = (len(rows), seq_len)
    tokens = np.full(shape, pad_id, np.int64)
    labels = np.full(shape, IGNORE, np.int64)
    positions = np.zeros(shape, np.int64)
    starts, offsets = [], [0]
    weights = np.ones(shape, np.float32) if any(entry and entry[0].domain.weighted for entry in rows) else None
    for i, entry in enumerate(rows):
        at = 0
        index, name, row = entry or (None, "", 0)
        for document, offset, length in index.row(row) if index else []:
            assert index is not None
            piece = index.domain.read(document, offset, length)
            if length and not 0 <= int(piece.min()) <= int(piece.max()) < vocab_size:
                wrong = int(piece.max()) if int(piece.max()) >= vocab_size else int(piece.min())
                raise DataError(
                    f"domain {name}, document {document}: token id {wrong} is outside the model's vocabulary of "
                    f"{vocab_size}. The data was prepared with another tokenizer, or is damaged."
                )
            tokens[i, at : at + length] = piece
            labels[i, at : at + length - 1] = piece[1:]
            positions[i, at : at + length] = np.arange(length)
            if weights is not None:
                weights[i, at : at + length - 1] = index.domain.label_weights(document, offset, length)
            starts.append(i * seq_len + at)
            at += length
        if at < seq_len:
            positions[i, at:] = np.arange(seq_len - at)
            starts.append(i * seq_len + at)
        offsets.append(len(starts))
    return Batch(
        tokens,
        labels,
        positions,
        np.array(starts, np.int64),
        np.array(offsets, np.int64),
        [entry[1] if entry else "" for entry in rows],
        weights,
        _numbered_items(rows, offsets) if any(entry and entry[0].domain.grouped for entry in rows) else None,
    )


def _numbered_items(rows: Sequence[tuple[PackingIndex, str, int] | None], row_offsets: Sequence[int]) -> np.ndarray:
    """int32 [documents]: their items, numbered through the rows. The padding behind a row's documents is an item of its own."""
    numbers: list[int] = []
    for entry, documents in zip(rows, np.diff(row_offsets), strict=True):
        own = entry[0].items(entry[2]) if entry else []
        own += [own[-1] + 1 if own else 0] * (int(documents) - len(own))
        before = numbers[-1] + 1 if numbers else 0
        numbers += [before + number for number in own]
    return np.array(numbers, np.int32)


def deal(num_rows: int, data_ranks: int, rows_per_micro_batch: int, rank: int) -> list[list[int | None]]:
    """Row numbers of every micro-batch of one data rank; None where the last micro-batch is filled.

    All ranks have the same number of micro-batches, so any number of ranks trains any batch.
    """
    per_round = data_ranks * rows_per_micro_batch
    micro_batches = []
    for begin in range(0, num_rows, per_round):
        mine = range(begin + rank * rows_per_micro_batch, begin + (rank + 1) * rows_per_micro_batch)
        micro_batches.append([row if row < num_rows else None for row in mine])
    return micro_batches


def open_domains(recipe: Recipe, names: Sequence[str]) -> dict[str, DomainData]:
    """Raises DataError for damaged data, ConfigError if this process may not open so many files."""
    prefixes = {name: expand_paths(recipe.data[name].paths) for name in names}
    if problems := make_room_for([prefix for found in prefixes.values() for prefix in found]):
        raise ConfigError(problems)
    return {name: DomainData(found) for name, found in prefixes.items()}


def pad_token(domains: dict[str, DomainData], fallback: int | None) -> int:
    """What fills the room behind a row's documents: EOS as the data has it, else `fallback`. It has no label, so 0 does too."""
    known = (domain.manifests[0].get("eos_token_id") for domain in domains.values())
    return next((token for token in known if token is not None), fallback or 0)


def selection_of(recipe: Recipe, name: str, seq_len: int, holdout: bool = False) -> Selection:
    """What of a domain is packed: its length bounds, and either the held-out documents or all others."""
    domain, order = recipe.data[name], recipe.data[name].order
    plain = Selection(
        seq_len,
        recipe.packing.method,
        domain.min_tokens or 0,
        domain.max_tokens or 2**31,
        domain.holdout_documents,
        holdout,
        tuple(domain.labels),
        long_items=recipe.packing.long_items,
    )
    if order is None or holdout:
        return plain
    scores = tuple(expand_files(order.scores))
    ordered = dict(buckets=order.buckets, ascending=order.ascending, drop=order.drop)
    return replace(plain, scores=scores, scores_digest=digest_of(scores), **ordered)


def stage_orders(recipe: Recipe, clock: Clock, decisions: Decisions = NONE) -> list[Order]:
    """The order of every stage. A domain's rows go on where an earlier stage of the same seq_len left them."""
    orders: list[Order] = []
    consumed: dict[int, dict[str, int]] = {}
    for i, stage in enumerate(recipe.stages):
        before = consumed.setdefault(stage.seq_len, {})
        seed = zlib.crc32(f"{recipe.run.seed}/{stage.name}".encode())
        orders.append(Order(decisions.weights(stage), seed, before, decisions.skips(stage.name)))
        for name, count in orders[-1].consumed(clock.stage_tokens(i) // stage.seq_len).items():
            before[name] = before.get(name, 0) + count
    return orders


def domain_tokens(recipe: Recipe, clock: Clock, orders: Sequence[Order], step: int) -> dict[str, int]:
    """Tokens of each domain that the run has trained after a step."""
    tokens = dict.fromkeys(recipe.data, 0)
    for i, stage in enumerate(recipe.stages):
        taken = min(clock.tokens_at(step) - clock.stage_first_token[i], clock.stage_tokens(i)) // stage.seq_len
        for name, count in orders[i].trained(taken).items() if taken > 0 else ():
            tokens[name] += count * stage.seq_len
    return tokens


@dataclass(frozen=True)
class StepCounts:
    """What the sums of a step may be divided by: its totals over all ranks, known before the first micro-batch.

    Attributes:
        labels: those with a weight above 0. weight: the sum of the weights of all labels. items: those with such a label.
    """

    labels: int
    weight: float
    items: int


class StageData:
    """The rows of one stage in order.

    Args:
        order: of the stage, from `stage_orders`.
        pad_id: EOS. vocab_size: the model's true vocabulary.
    """

    def __init__(
        self, recipe: Recipe, stage: Stage, order: Order, domains: dict[str, DomainData], pad_id: int, vocab_size: int
    ):
        self.seq_len, self.seed, self.pad_id, self.vocab_size = stage.seq_len, recipe.run.seed, pad_id, vocab_size
        self.mixture = order
        self.indices: dict[str, PackingIndex] = {}
        for name in self.mixture.domains:
            selection = selection_of(recipe, name, stage.seq_len)
            self.indices[name] = open_index(domains[name], selection, recipe.packing.directory)
            if self.indices[name].num_rows == 0:
                raise DataError(
                    f"domain {name} has no rows for training: {domains[name].num_documents} documents, of which "
                    f"{selection.holdout_documents} are held out."
                )

    def picks(self, first_sequence: int, count: int) -> list[Pick]:
        """Rows [first_sequence, first_sequence + count) of the stage."""
        picks = []
        for sequence in range(first_sequence, first_sequence + count):
            name, number = self.mixture.at(sequence)
            index = self.indices[name]
            place = row_of(number, index.num_rows, self.seed, name, self.seq_len, index.bucket_rows)
            picks.append(Pick(name, *place))
        return picks

    def count(self, picks: Sequence[Pick]) -> StepCounts:
        """What the labels of some rows come to, from the index alone."""
        sums = [self.indices[pick.domain].sums(pick.row) for pick in picks]
        weight = math.fsum(row.weight for row in sums)  # whatever the order of the rows
        return StepCounts(sum(row.labels for row in sums), weight, sum(row.items for row in sums))

    def visible_pairs(self, picks: Sequence[Pick]) -> int:
        """Pairs of query and key that attention sees in some rows, from the index alone: n (n + 1) / 2 of a document of n tokens. The
        padding behind a row's documents counts as one."""
        pairs = 0
        for pick in picks:
            lengths = [length for _, _, length in self.indices[pick.domain].row(pick.row)]
            pairs += sum(n * (n + 1) // 2 for n in [*lengths, self.seq_len - sum(lengths)])
        return pairs

    def batch(self, picks: Sequence[Pick | None]) -> Batch:
        rows = [(self.indices[pick.domain], pick.domain, pick.row) if pick else None for pick in picks]
        return make_batch(rows, self.seq_len, self.pad_id, self.vocab_size)


@dataclass(frozen=True)
class StepData:
    """One step as one data rank sees it."""

    micro_batches: list[Batch]
    """Or what model/inputs.py made of them ahead."""
    counts: StepCounts
    num_pairs: int
    """Visible pairs of query and key of the whole step."""


def load_step(
    data: StageData, first_sequence: int, num_rows: int, data_ranks: int, rank: int, rows_per_micro_batch: int
) -> StepData:
    picks = data.picks(first_sequence, num_rows)
    dealt = deal(num_rows, data_ranks, rows_per_micro_batch, rank)
    batches = [data.batch([picks[row] if row is not None else None for row in rows]) for rows in dealt]
    return StepData(batches, data.count(picks), data.visible_pairs(picks))


def prefetch(make: Callable[[int], StepData], numbers: range, depth: int = 2) -> Generator[StepData, None, None]:
    """`make(n)` for each n, a few steps ahead in a thread. An error there is raised here."""
    ready: queue.Queue = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def work() -> None:
        for number in numbers:
            try:
                item = partial(_give, make(number))
            except BaseException as error:
                item = partial(_raise, error)
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if stop.is_set() or item.func is _raise:
                return

    threading.Thread(target=work, name="prefetch", daemon=True).start()
    try:
        for _ in numbers:
            yield ready.get()()
    finally:
        stop.set()


def _give(value: StepData) -> StepData:
    return value


def _raise(error: BaseException) -> None:
    raise error
