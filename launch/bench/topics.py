"""Documents a second of `megacpt topics label`'s model beside the bare hashing of the same n-grams, by turns in one process.

    python launch/bench/topics.py TEXT.jsonl[.zst] [--topics 22 --rounds 5]

The labelling may take at most a quarter more: its ratio is to be at least 0.8.
"""

import argparse
import statistics
import time

import numpy as np

from megacpt.data.topics import BATCH, Topics
from megacpt.data.vocabulary import texts_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+")
    parser.add_argument("--topics", type=int, default=22)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    texts = list(texts_of(options.inputs, most_bytes=4 << 20))
    settings = {"features": 1 << 18, "ngrams": [1, 3], "characters": 4096}
    random = np.random.default_rng(0)
    weights = random.standard_normal((options.topics, settings["features"])).astype(np.float32)
    model = Topics([str(i) for i in range(options.topics)], weights, np.zeros(options.topics, np.float32), settings)
    batches = [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
    ratios, rates = [], []
    for _ in range(options.rounds):
        begin = time.perf_counter()
        for batch in batches:
            model.hasher.transform([text[: settings["characters"]] for text in batch])
        bare = time.perf_counter() - begin
        begin = time.perf_counter()
        for batch in batches:
            model.label(batch)
        whole = time.perf_counter() - begin
        ratios.append(bare / whole)
        rates.append(len(texts) / whole)
    print(f"{len(texts)} documents, {options.topics} topics: {statistics.median(rates):.0f} documents/s")
    print(f"of the bare hashing: {'  '.join(f'{r:.3f}' for r in ratios)}, median {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
