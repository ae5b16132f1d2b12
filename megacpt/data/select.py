"""Which documents of a domain are packed: its bounds and labels, what is held out, in which bucket of a curriculum. What is one item stays
together in all of it."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megacpt.data.curriculum import buckets_of, item_scores, read_scores
from megacpt.data.domain import DomainData
from megacpt.data.permutation import permute
from megacpt.errors import DataError

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Selection:
    """Which documents of a domain are packed, and how."""

    seq_len: int
    method: str = "best_fit"
    min_tokens: int = 0
    max_tokens: int = 2**31
    holdout_documents: int = 0
    holdout: bool = False
    """True packs the held-out documents, False all others."""
    labels: tuple[str, ...] = ()
    """Only documents with one of these labels; all without."""
    scores: tuple[str, ...] = ()
    """Files of scores: documents are packed bucket by bucket of their perplexity."""
    scores_digest: str = ""
    buckets: int = 1
    ascending: bool = True
    drop: float = 0.0
    long_items: str = "refuse"
    """What happens to an item that is longer than a row: "refuse" or "drop"."""

    def facts(self, domain: DomainData) -> dict[str, Any]:
        """Its values, without those that have no meaning for a domain: an index keeps its name when a new one is thought of."""
        found = asdict(self)
        if not domain.grouped:
            del found["long_items"]
        return found


def kept(domain: DomainData, selection: Selection, begin: int, end: int) -> np.ndarray:
    """bool: which of documents [begin, end), whole items, the bounds and labels let through. An item goes with all of its documents or
    none; empty ones are left out of it."""
    lengths = domain.lengths(begin, end)
    fits = (lengths >= max(selection.min_tokens, 1)) & (lengths <= selection.max_tokens)
    fits &= domain.labelled(begin, end, selection.labels)
    if domain.grouped and len(lengths):
        first = domain.item_begins(begin, end) - begin
        broken = np.logical_or.reduceat(~fits & (lengths > 0), first)
        fits &= ~np.repeat(broken, np.diff(first, append=end - begin))
    return fits


@dataclass(frozen=True)
class LongItems:
    """Items longer than a row. Attributes: document, tokens: where the longest begins, and its length."""

    count: int
    document: int
    tokens: int


def long_items(domain: DomainData, selection: Selection) -> LongItems:
    """Of those that the selection lets through, held out or not."""
    count, document, most = 0, 0, 0
    for start in range(0, domain.num_documents if domain.grouped else 0, _BLOCK):
        begin, end = domain.next_item(start), domain.next_item(min(start + _BLOCK, domain.num_documents))
        if begin == end:
            continue
        first = domain.item_begins(begin, end)
        lengths = np.where(kept(domain, selection, begin, end), domain.lengths(begin, end), 0)
        sizes = np.add.reduceat(lengths, first - begin, dtype=np.int64)
        count += int((sizes > selection.seq_len).sum())
        if sizes.max() > most:
            document, most = int(first[sizes.argmax()]), int(sizes.max())
    return LongItems(count, document, most)


def held_out(domain: DomainData, selection: Selection) -> np.ndarray:
    """Numbers of the held-out documents, sorted: drawn from those within the length bounds by a fixed permutation, so
    that every run on the same data holds out the same ones."""
    if not selection.holdout_documents:
        return np.zeros(0, np.int64)
    if domain.grouped:
        return _held_out_items(domain, selection)
    chosen, total = [], domain.num_documents
    labelled = domain.labelled(0, total, selection.labels)
    for start in range(0, total, 4096):
        drawn = permute(np.arange(start, min(start + 4096, total)), total, key=("holdout",))
        lengths = np.array([domain.length(int(d)) for d in drawn])
        fits = (lengths >= max(selection.min_tokens, 2)) & (lengths <= selection.max_tokens) & labelled[drawn]
        chosen += drawn[fits].tolist()
        if len(chosen) >= selection.holdout_documents:
            break
    if len(chosen) < selection.holdout_documents:
        raise DataError(
            f"{', '.join(domain.prefixes[:3])}: {len(chosen)} documents of at least 2 tokens within the length bounds, "
            f"fewer than holdout_documents = {selection.holdout_documents}."
        )
    return np.sort(np.array(chosen[: selection.holdout_documents], np.int64))


def _held_out_items(domain: DomainData, selection: Selection) -> np.ndarray:
    """Whole items, drawn like documents, until they have as many documents as are held out."""
    chosen: list[int] = []
    total = domain.first_item[-1]
    for item in permute(np.arange(total), total, key=("holdout",)).tolist():
        if len(chosen) >= selection.holdout_documents:
            break
        begin, end = domain.documents_of_item(item)
        fits = kept(domain, selection, begin, end)
        if domain.lengths(begin, end)[fits].max(initial=0) > 1:
            chosen += (np.flatnonzero(fits) + begin).tolist()
    if len(chosen) < selection.holdout_documents:
        raise DataError(
            f"{', '.join(domain.prefixes[:3])}: the items with a label within the length bounds have {len(chosen)} documents, fewer than "
            f"holdout_documents = {selection.holdout_documents}."
        )
    return np.sort(np.array(chosen, np.int64))


def withheld_by_bucket(domain: DomainData, selection: Selection) -> Iterator[tuple[int, np.ndarray]]:
    """(bucket, the documents that are not packed with it, rising) in the order of a curriculum; one bucket without."""
    withheld = held_out(domain, selection)
    if not selection.scores:
        yield 0, withheld
        return
    scores, lengths = read_scores(selection.scores), domain.lengths(0, domain.num_documents)
    if len(scores) != len(lengths):
        raise DataError(f"{len(scores)} scores for {len(lengths)} documents of {', '.join(domain.prefixes[:3])}.")
    rules = selection.buckets, selection.ascending, selection.drop
    if domain.grouped:
        first = domain.item_begins(0, domain.num_documents)
        of_item = buckets_of(
            item_scores(scores, lengths, first), np.add.reduceat(lengths, first, dtype=np.int64), *rules
        )
        bucket_of = np.repeat(of_item, np.diff(first, append=len(lengths)))
    else:
        bucket_of = buckets_of(scores, lengths, *rules)
    for bucket in range(selection.buckets):
        yield bucket, np.union1d(withheld, np.flatnonzero(bucket_of != bucket))
