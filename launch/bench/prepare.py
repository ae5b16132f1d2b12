"""`megacpt prepare` beside bare `tokenizers.encode_batch_fast` on the same text and cores, by turns, and its peak memory.

    python launch/bench/prepare.py [--megabytes 100] [--rounds 3] [--large-megabytes 2000] [TEXT.jsonl …]

Without files the text is the standard library's sources, repeated. The bare rate leaves out reading and writing.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path

import numpy as np


def texts_of(paths: list[str]) -> list[str]:
    if paths:
        return [json.loads(line)["text"] for path in paths for line in open(path, encoding="utf-8")]
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("**/*.py"))
    texts = [f.read_text(encoding="utf-8", errors="ignore") for f in files if "site-packages" not in f.parts]
    return [t for t in texts if 200 < len(t) < 200_000]


def write(texts: list[str], megabytes: int, path: Path) -> list[str]:
    """The texts over and over, to about this size. Each repetition starts with another word, so no cache serves it whole."""
    used, size = [], 0
    with open(path, "w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            text = f"{len(used)} {texts[len(used) % len(texts)]}"
            size += len(text.encode())
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            used.append(text) if megabytes <= 500 else used.append("")
    return used


def peak_of(command: list[str]) -> tuple[float, float]:
    """(seconds, peak of the proportional memory of the whole process tree in MB)."""
    import psutil

    begin, peak, stop = time.perf_counter(), 0.0, threading.Event()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def watch() -> None:
        nonlocal peak
        tree = psutil.Process(process.pid)
        while not stop.wait(0.2):
            try:
                members = [tree, *tree.children(recursive=True)]
                peak = max(peak, sum(m.memory_full_info().uss for m in members) / 1e6)
            except psutil.Error:
                continue

    thread = threading.Thread(target=watch)
    thread.start()
    _, errors = process.communicate()
    stop.set()
    thread.join()
    assert process.returncode == 0, errors
    return time.perf_counter() - begin, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*")
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--large-megabytes", type=int, default=0, help="a second size, for memory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--engine", default="tokenizers")
    options = parser.parse_args()
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    texts = texts_of(options.texts)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.train_from_iterator(
            iter(texts),
            trainers.BpeTrainer(
                vocab_size=options.vocab,
                special_tokens=["</s>"],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        tokenizer.save(str(work / "tokenizer.json"))
        used = write(texts, options.megabytes, work / "t.jsonl")
        size = sum(len(t.encode()) for t in used) / 1e6
        command = [
            sys.executable,
            "-m",
            "megacpt",
            "prepare",
            str(work / "t.jsonl"),
            "--tokenizer",
            str(work / "tokenizer.json"),
            "--output",
            str(work / "o"),
            "--overwrite",
            "--engine",
            options.engine,
        ]
        ratios = []
        print(
            f"{size:.0f} MB, {len(used)} documents, vocabulary {options.vocab}, {os.cpu_count()} cores, engine {options.engine}"
        )
        for _ in range(options.rounds):
            begin = time.perf_counter()
            for i in range(0, len(used), 500):
                tokenizer.encode_batch_fast(used[i : i + 500], add_special_tokens=False)
            bare = size / (time.perf_counter() - begin)
            seconds, peak = peak_of(command)
            ratios.append(size / seconds / bare)
            print(
                f"bare encode_batch_fast {bare:.2f} MB/s; megacpt prepare {size / seconds:.2f} MB/s, start to end; ratio "
                f"{ratios[-1]:.3f}; peak memory {peak:.0f} MB"
            )
        if ratios:
            print(f"median ratio {np.median(ratios):.3f}")
        if options.large_megabytes:
            del used
            write(texts, options.large_megabytes, work / "t.jsonl")
            seconds, peak = peak_of(command)
            rate = options.large_megabytes / seconds
            print(f"{options.large_megabytes} MB: {rate:.2f} MB/s, peak memory {peak:.0f} MB")


if __name__ == "__main__":
    main()
