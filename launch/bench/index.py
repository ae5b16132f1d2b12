"""Builds and opens the packing index of many documents of synthetic (log-normal) lengths: time and peak memory.

    python launch/bench/index.py [--documents 100000000] [--seq-len 8192] [--workers 2]

The .bin is a sparse file: packing reads lengths, not tokens.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000_000)
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--folder", help="default: the system's temporary folder")
    options = parser.parse_args()
    from megacpt.data.domain import DomainData
    from megacpt.data.indexed import write_index
    from megacpt.data.manifest import FORMAT, crc32_of
    from megacpt.data.packing import open_index
    from megacpt.data.select import Selection

    class Lengths:
        """The same blocks each time they are asked for."""

        def __iter__(self):
            random = np.random.default_rng(0)
            for begin in range(0, options.documents, 1 << 20):
                count = min(1 << 20, options.documents - begin)
                yield np.clip(random.lognormal(6.2, 1.25, count), 16, 400_000).astype(np.int32)

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        work = Path(folder)
        write_index(work / "d.idx", np.dtype(np.uint16), Lengths(), options.documents)
        tokens = sum(int(block.sum(dtype=np.int64)) for block in Lengths())
        with open(work / "d.bin", "wb") as file:
            file.truncate(2 * tokens)
        sizes = {k: {"bytes": (work / f"d.{k}").stat().st_size, "crc32": 0} for k in ("bin", "idx")}
        sizes["idx"]["crc32"] = crc32_of(work / "d.idx")
        (work / "d.json").write_text(
            json.dumps(
                {
                    "format": FORMAT,
                    "documents": options.documents,
                    "tokens": tokens,
                    "vocab_size": 9,
                    "eos_token_id": 0,
                    **sizes,
                }
            )
        )
        before = anonymous()
        begin = time.perf_counter()
        index = open_index(
            DomainData([str(work / "d")]),
            Selection(options.seq_len, holdout_documents=1000),
            str(work / "c"),
            options.workers,
        )
        built = time.perf_counter() - begin
        begin = time.perf_counter()
        index = open_index(
            DomainData([str(work / "d")]), Selection(options.seq_len, holdout_documents=1000), str(work / "c")
        )
        opened = time.perf_counter() - begin
        some = np.random.default_rng(0).integers(0, index.num_rows, 2048).tolist()
        begin = time.perf_counter()
        pieces = sum(len(index.row(row)) for row in some)
        read = time.perf_counter() - begin
        grown = max(anonymous_peak() - before, 0)
        disk = sum(f.stat().st_size for f in (work / "c").rglob("*.bin"))
        cores = max(1, options.workers)
        print(
            f"{options.documents:,} documents, {tokens / 1e9:.1f} B tokens, rows of {options.seq_len}, {options.workers} workers"
        )
        print(
            f"built in {built:.1f} s, {options.documents / built / cores / 1e3:.0f}K documents/s a core; {index.num_rows:,} rows, "
            f"padding {1 - tokens / (index.num_rows * options.seq_len):.4%}"
        )
        print(
            f"opened in {opened:.2f} s; {len(some):,} random rows, {pieces:,} pieces, read in {read * 1e3:.0f} ms; "
            f"index {disk / options.documents:.2f} bytes a document on disk"
        )
        print(
            f"peak memory of the build {grown / 1e6:.0f} MB beyond the start = {grown / options.documents:.2f} bytes a document "
            f"(of this process, mapped pages of the input included)"
        )


def anonymous() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def anonymous_peak() -> int:
    return max(resource.getrusage(who).ru_maxrss * 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


if __name__ == "__main__":
    main()
