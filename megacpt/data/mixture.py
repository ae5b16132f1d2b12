"""Which row is next: a pure function from a stage's sequence number to (domain, sequence of that domain).

Sequences are dealt in blocks. In block b a domain of weight w has floor((b+1)·B·w) - floor(b·B·w) sequences, so every
block is within one sequence of the weights and the run as a whole is exact. Inside a block each domain's sequences
are spread evenly, with a random phase for each. Nothing depends on ranks, workers or micro-batches (idea of blocks:
Levanter's MixtureDataset).
"""

import hashlib
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from megacpt.data.permutation import permute

BLOCK = 1024
_ONE = 1 << 32


class Mixture:
    """The order of one stage.

    Args:
        weights: share of tokens by domain, any positive scale.
        seed: of the order inside blocks.
        first: sequences of each domain that stages before have consumed.
    """

    def __init__(self, weights: dict[str, float], seed: int, first: dict[str, int] | None = None):
        total = sum(weights.values())
        self.domains = [name for name, weight in weights.items() if weight > 0]
        self.shares = [max(1, round(weights[name] / total * _ONE)) for name in self.domains]
        self.seed = seed
        self.first = {name: (first or {}).get(name, 0) for name in self.domains}
        self._block = lru_cache(maxsize=64)(self._make_block)

    def _before(self, block: int) -> list[int]:
        """Sequences of each domain before a block."""
        return [block * BLOCK * share // _ONE for share in self.shares]

    def _find(self, sequence: int) -> int:
        """The block that holds a sequence of the stage."""
        block = sequence // BLOCK
        while sum(self._before(block + 1)) <= sequence:
            block += 1
        while sum(self._before(block)) > sequence:
            block -= 1
        return block

    def _make_block(self, block: int) -> tuple[int, np.ndarray, np.ndarray]:
        """(first sequence, domain of each sequence, its number inside the domain)."""
        before, after = self._before(block), self._before(block + 1)
        counts = [b - a for a, b in zip(before, after, strict=True)]
        digest = hashlib.blake2b(repr((self.seed, "block", block, self.domains)).encode(), digest_size=8).digest()
        random = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "little")))
        domain = np.repeat(np.arange(len(counts)), counts)
        number = np.concatenate([np.arange(c) for c in counts])
        place = (number + random.random(len(number))) / np.repeat(np.maximum(counts, 1), counts)
        order = np.argsort(place, kind="stable")
        return sum(before), domain[order], (number + np.repeat(before, counts))[order]

    def at(self, sequence: int) -> tuple[str, int]:
        """(domain, sequence of that domain since the run began) of a sequence of the stage."""
        first, domain, number = self._block(self._find(sequence))
        k = sequence - first
        name = self.domains[int(domain[k])]
        return name, int(number[k]) + self.first[name]

    def consumed(self, sequences: int) -> dict[str, int]:
        """Sequences of each domain among the first `sequences` of the stage."""
        block = self._find(sequences) if sequences else 0
        first, domain, _ = self._block(block)
        inside = np.bincount(domain[: sequences - first], minlength=len(self.domains))
        return {
            name: before + int(k) for name, before, k in zip(self.domains, self._before(block), inside, strict=True)
        }


class Order:
    """The order of one stage whose weights change: one Mixture from each of some sequences on.

    Args:
        changes: (first sequence of the stage, weights), growing, the first at 0.
        seed: of the stage. first: sequences of each domain that stages before have consumed.
        skips: (sequence of the stage, how many): so many were left out there, and are never trained.
    """

    def __init__(
        self,
        changes: Sequence[tuple[int, dict[str, float]]],
        seed: int,
        first: dict[str, int] | None = None,
        skips: Sequence[tuple[int, int]] = (),
    ):
        assert changes[0][0] == 0, changes
        self.skips = sorted(skips)
        changes = [(self._place(at) if at else 0, weights) for at, weights in changes]
        self.starts = [at for at, _ in changes]
        self.mixtures: list[Mixture] = []
        taken = dict(first or {})
        for i, (at, weights) in enumerate(changes):
            if i:
                for name, count in self.mixtures[-1].consumed(at - self.starts[i - 1]).items():
                    taken[name] = taken.get(name, 0) + count
            self.mixtures.append(Mixture(weights, zlib.crc32(f"{seed}/{at}".encode()) if at else seed, taken))
        self.domains = list(dict.fromkeys(name for mixture in self.mixtures for name in mixture.domains))

    def at(self, sequence: int) -> tuple[str, int]:
        """(domain, sequence of that domain since the run began) of a sequence of the stage."""
        sequence = self._place(sequence)
        i = bisect_right(self.starts, sequence) - 1
        return self.mixtures[i].at(sequence - self.starts[i])

    def consumed(self, sequences: int) -> dict[str, int]:
        """Sequences of each domain that are used up after the first `sequences` of the stage: trained or skipped."""
        return self._among(self._place(sequences))

    def trained(self, sequences: int) -> dict[str, int]:
        """Sequences of each domain among the first `sequences` of the stage."""
        total = self.consumed(sequences)
        for i, (at, count) in enumerate(self.skips):
            if at <= sequences:
                begin = at + sum(earlier for _, earlier in self.skips[:i])
                before, after = self._among(begin), self._among(begin + count)
                total = {name: value - after[name] + before[name] for name, value in total.items()}
        return total

    def _place(self, sequence: int) -> int:
        """Where a sequence stands among all, those that were skipped too."""
        return sequence + sum(count for at, count in self.skips if at <= sequence)

    def _among(self, sequences: int) -> dict[str, int]:
        total: dict[str, int] = dict.fromkeys(self.domains, 0)
        for i, mixture in enumerate(self.mixtures):
            until = self.starts[i + 1] if i + 1 < len(self.starts) else sequences
            count = min(until, sequences) - self.starts[i]
            for name, taken in mixture.consumed(count).items() if count > 0 else ():
                total[name] += taken
        return total


def row_of(
    number: int, num_rows: int, seed: int, domain: str, seq_len: int, buckets: Sequence[int] = ()
) -> tuple[int, int]:
    """(epoch, row) of a domain's sequence `number`: every epoch is another permutation of the rows.

    Args:
        buckets: rows before each bucket of a curriculum, and all: buckets come in order, each with a permutation of its own.
    """
    epoch, place = divmod(number, num_rows)
    if len(buckets) <= 2:
        return epoch, int(permute(np.array([place]), num_rows, key=(seed, domain, seq_len, epoch))[0])
    bucket = bisect_right(buckets, place) - 1
    begin, size = buckets[bucket], buckets[bucket + 1] - buckets[bucket]
    inside = permute(np.array([place - begin]), size, key=(seed, domain, seq_len, epoch, bucket))
    return epoch, begin + int(inside[0])
