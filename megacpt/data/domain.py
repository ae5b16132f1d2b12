"""The prepared sets of a domain, read as one."""

import hashlib
import json
from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np

from megacpt.data.beside import ItemTable, TokenWeights
from megacpt.data.indexed import CheckedFile, IndexedDataset, Numbers
from megacpt.data.manifest import BESIDE, read_manifest
from megacpt.errors import DataError


class DomainData:
    """The prepared sets of a domain as one run of documents, numbered through.

    Args:
        verify: compare the indices and what stands beside them with the checksums in their manifests.
    Attributes:
        weighted: whether any set says what tokens weigh. grouped: whether the sets say which documents are one item.
    """

    def __init__(self, prefixes: list[str], verify: bool = True):
        self.prefixes = prefixes
        self.manifests = [read_manifest(prefix) for prefix in prefixes]
        self.sets = [
            IndexedDataset(prefix, check=False, crc32=manifest["idx"]["crc32"] if verify else None)
            for prefix, manifest in zip(prefixes, self.manifests, strict=True)
        ]
        self.first = [0, *accumulate(data.num_documents for data in self.sets)]
        self.num_documents = self.first[-1]
        self.num_tokens = sum(data.num_tokens for data in self.sets)
        self._labels: dict[int, Numbers] = {}
        self._verify = verify
        self.weighted = any("weights" in manifest for manifest in self.manifests)
        self.grouped = any("items" in manifest for manifest in self.manifests)
        apart = [prefix for prefix, m in zip(prefixes, self.manifests, strict=True) if "items" not in m]
        if self.grouped and apart:
            raise DataError(
                f"{', '.join(apart[:3])}: was prepared without --item-field, other sets of the domain with it. Prepare all alike, or make "
                "them two domains."
            )
        self._weights = [
            TokenWeights(prefix, data.num_documents, self._facts_of(m, "weights")) if "weights" in m else None
            for prefix, data, m in zip(prefixes, self.sets, self.manifests, strict=True)
        ]

    def fingerprint(self) -> str:
        """By content: the CRCs and sizes that the manifests record."""
        facts = [[m["idx"], m["bin"], *(m[kind] for kind in ("labels", *BESIDE) if kind in m)] for m in self.manifests]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def lengths(self, begin: int, end: int) -> np.ndarray:
        """Lengths of documents [begin, end) over the sets."""
        blocks = []
        for first, data in zip(self.first, self.sets, strict=False):
            a, b = max(begin - first, 0), min(end - first, data.num_documents)
            if a < b:
                blocks.append(data.lengths_of(a, b))
        return np.concatenate(blocks) if blocks else np.zeros(0, np.int32)

    def labelled(self, begin: int, end: int, wanted: tuple[str, ...]) -> np.ndarray:
        """bool: which of documents [begin, end) have one of some labels; all if none are wanted.

        Raises:
            DataError: if a set was prepared without labels, or its file is not what its manifest says.
        """
        if not wanted:
            return np.ones(end - begin, bool)
        parts = []
        for which, (first, data) in enumerate(zip(self.first, self.sets, strict=False)):
            a, b = max(begin - first, 0), min(end - first, data.num_documents)
            if a < b:
                names = self._labels_of(which)
                numbers = [i for i, name in enumerate(self.manifests[which]["labels"]["names"]) if name in wanted]
                parts.append(np.isin(names[a:b], numbers))
        return np.concatenate(parts) if parts else np.zeros(0, bool)

    def _labels_of(self, which: int) -> Numbers:
        """uint16 [documents of a set]."""
        if which not in self._labels:
            prefix, facts = self.prefixes[which], self.manifests[which].get("labels")
            if facts is None:
                raise DataError(f"{prefix}: was prepared without labels. Prepare it with --domain-field.")
            count = self.sets[which].num_documents
            try:
                file = CheckedFile(Path(f"{prefix}.labels"), 2 * count, facts["crc32"])
            except OSError as error:
                raise DataError(f"{prefix}.labels: {error.strerror}. Prepare the data again.") from None
            self._labels[which] = Numbers(file, "<u2", 0, count)
        return self._labels[which]

    def read(self, document: int, offset: int, length: int) -> np.ndarray:
        which = bisect_right(self.first, document) - 1
        return self.sets[which].read(document - self.first[which], offset, length)

    def length(self, document: int) -> int:
        which = bisect_right(self.first, document) - 1
        return self.sets[which].length_of(document - self.first[which])

    # --- weights ------------------------------------------------------------------------------------------------------

    def label_weights(self, document: int, offset: int, length: int) -> np.ndarray:
        """float32 [length - 1]: of the labels in tokens [offset, offset + length) of a document, the weight of the token that each is."""
        which = bisect_right(self.first, document) - 1
        weights = self._weights[which]
        if weights is None:
            return np.ones(length - 1, np.float32)
        return weights.read(document - self.first[which], offset + 1, offset + length)

    def label_sums(
        self, documents: np.ndarray, offsets: np.ndarray, lengths: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of the labels in some pieces of documents: (the sums of their weights float64, how many weigh more than 0 int64)."""
        sums, heavy = (lengths - 1).astype(np.float64), (lengths - 1).astype(np.int64)
        order = np.argsort(documents, kind="stable")
        edges = np.searchsorted(documents[order], self.first)
        for weights, first, begin, end in zip(self._weights, self.first, edges, edges[1:], strict=False):
            mine = order[begin:end]
            if weights is not None and len(mine):
                begins = offsets[mine].astype(np.int64) + 1
                sums[mine], heavy[mine] = weights.sums(documents[mine] - first, begins, begins + lengths[mine] - 1)
        return sums, heavy

    # --- items --------------------------------------------------------------------------------------------------------

    def next_item(self, document: int) -> int:
        """The first document from this one on with which an item begins; the number of documents behind the last."""
        if not self.grouped or document >= self.num_documents:
            return document
        which = bisect_right(self.first, document) - 1
        return self.first[which] + self._items[which].next_begin(document - self.first[which])

    def item_begins(self, begin: int, end: int) -> np.ndarray:
        """The documents in [begin, end) with which items begin."""
        if not self.grouped:
            return np.arange(begin, end)
        parts = [np.zeros(0, np.int64)]
        for first, items in zip(self.first, self._items, strict=False):
            a, b = max(begin - first, 0), min(end - first, items.documents)
            if a < b:
                parts.append(items.begins(a, b) + first)
        return np.concatenate(parts)

    @cached_property
    def first_item(self) -> list[int]:
        """Items before each set, and all of them."""
        return [0, *accumulate(items.count for items in self._items)]

    def documents_of_item(self, item: int) -> tuple[int, int]:
        """The first document of an item, and the first behind it."""
        which = bisect_right(self.first_item, item) - 1
        own = item - self.first_item[which]
        begin, end = self._items[which].first[own : own + 2].tolist()
        return self.first[which] + begin, self.first[which] + end

    @cached_property
    def _items(self) -> list[ItemTable]:
        return [
            ItemTable(prefix, data.num_documents, self._facts_of(manifest, "items"))
            for prefix, data, manifest in zip(self.prefixes, self.sets, self.manifests, strict=True)
        ]

    def _facts_of(self, manifest: dict, kind: str) -> dict:
        return manifest[kind] if self._verify else manifest[kind] | {"crc32": None}

    def check_beside(self) -> None:
        """Raises DataError if weights or items contradict the documents."""
        for weights, data in zip(self._weights, self.sets, strict=True):
            if weights is not None:
                weights.check(data.lengths_of)
        for items in self._items if self.grouped else ():
            items.check()
