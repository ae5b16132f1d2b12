"""Text to tokens: pieces of the input go to processes, their outputs are joined in the order of the input.

    PREFIX.parts/plan.json          what is being made; another plan there is discarded
    PREFIX.parts/000012.{bin,len,json}   one finished piece, and what stands beside it; its .json is renamed into place last
    PREFIX.bin, .idx, .json         joined, with .labels, .weights, .items; each renamed into place, the manifest last

So a killed run leaves nothing that looks finished, and the next one does only the pieces that are missing. A piece's
output depends on the piece alone: the result does not depend on the number of workers.
"""

import fcntl
import hashlib
import itertools
import json
import multiprocessing
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megacpt.data.join import SHOWN_BAD_LINES, disk_error, join, read_piece_report
from megacpt.data.manifest import FORMAT, KINDS
from megacpt.data.text import Piece, cut, find_files
from megacpt.data.tokenize_piece import Options, start_worker, tokenize_piece
from megacpt.data.tokenizer import Tokenizer
from megacpt.errors import ConfigError, DataError
from megacpt.files import write_atomically
from megacpt.log import duration, info, short_number

_MORE_FIELDS = ("segments_field", "prompt_field", "completion_field", "item_field")


def prepare(
    inputs: list[str],
    output: str,
    options: Options,
    workers: int = 0,
    part: tuple[int, int] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Tokenizes files into PREFIX.bin/.idx/.json and returns the manifest.

    Args:
        inputs: files or folders of jsonl, parquet or plain text.
        output: the prefix; with `part` (I, N) the prefix is `output-0000I`.
        workers: processes; 0 is one a core.

    Raises:
        ConfigError: for arguments that cannot be right, all at once.
        DataError: for input that cannot be read, too many bad lines, or a full disk.
    """
    prefix = f"{output}-{part[0]:05d}" if part else output
    finished = [f"{prefix}.{kind}" for kind in (*KINDS, "json") if os.path.exists(f"{prefix}.{kind}")]
    if finished and not overwrite:
        raise ConfigError([f"{', '.join(finished)}: exists. Give another --output, or --overwrite."], "the arguments")
    tokenizer = Tokenizer(options.tokenizer, options.eos_token)
    if options.eos and tokenizer.eos_id is None:
        raise ConfigError(
            [
                f"{options.tokenizer}: names no end-of-text token that is in its vocabulary. Give --eos-token TEXT, or --no-eos."
            ],
            "the tokenizer",
        )
    files = find_files(inputs, options.format)
    pieces = cut(files)
    if problems := _field_problems(options, pieces):
        raise ConfigError(problems, "the arguments")
    if options.engine == "gigatoken":
        _require_gigatoken()
    if part:
        pieces = _share(pieces, *part, whole_files=options.item_field is not None)
    vocab_size = options.vocab_size or tokenizer.vocab_size
    os.makedirs(os.path.dirname(os.path.abspath(prefix)), exist_ok=True)
    parts = Path(prefix + ".parts")
    parts.mkdir(exist_ok=True)
    with open(parts / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError([f"{prefix}: another megacpt prepare is writing it."], "the arguments") from None
        _open_plan(parts, pieces, options, tokenizer)
        for path in finished:
            os.remove(path)
        try:
            _tokenize_all(parts, pieces, options, vocab_size, workers or os.cpu_count() or 1)
            manifest = join(prefix, parts, len(pieces), _facts_of(options, tokenizer, vocab_size, files, part))
        except OSError as error:
            raise disk_error(error, prefix) from error
        shutil.rmtree(parts)
    return manifest


def _field_problems(options: Options, pieces: list[Piece]) -> list[str]:
    """What is wrong with the fields that are to be read."""
    problems, text = [], Options.text_field
    if (options.prompt_field is None) != (options.completion_field is None):
        problems.append("--prompt-field and --completion-field: give both or none.")
    if options.segments_field is not None and (options.prompt_field or options.completion_field):
        problems.append("--segments-field and --prompt-field, --completion-field: give one of the two.")
    if options.weighted and options.text_field != text:
        problems.append(f"--text-field {options.text_field}: is not read where segments or a prompt are. Remove it.")
    if options.weighted and options.engine != "tokenizers":
        problems.append(f"--engine {options.engine}: does not say where a token begins. Use --engine tokenizers.")
    own = [flag for name, flag in options.fields.flags.items() if flag != "--text-field"]
    if own and any(piece.kind == "text" for piece in pieces):
        problems.append(f"{', '.join(own)}: plain text files have no fields.")
    return problems


def _facts_of(
    options: Options, tokenizer: Tokenizer, vocab_size: int, files: list[tuple[str, str]], part: tuple[int, int] | None
) -> dict[str, Any]:
    """What the manifest says of how the data was made."""
    return {
        "vocab_size": vocab_size,
        "eos_token_id": tokenizer.eos_id,
        "bos_token_id": tokenizer.bos_id,
        "bos_prepended": bool(options.bos and tokenizer.bos_id is not None),
        "eos_appended": options.eos,
        "domain_field": options.domain_field,
        **{key: value for key in _MORE_FIELDS if (value := getattr(options, key)) is not None},
        "tokenizer": {"path": options.tokenizer, "sha256": tokenizer.sha256},
        "part": list(part) if part else None,
        "sources": [{"path": path, "bytes": os.path.getsize(path)} for path, _ in files[:1000]],
        "num_sources": len(files),
    }


def _require_gigatoken() -> None:
    try:
        import gigatoken  # noqa: F401 # pyright: ignore[reportMissingImports] optional
    except ImportError:
        raise ConfigError(
            ["--engine gigatoken: is not installed. pip install gigatoken, or use --engine tokenizers."],
            "the arguments",
        ) from None


def _share(pieces: list[Piece], index: int, count: int, whole_files: bool) -> list[Piece]:
    """Part `index` of `count`: contiguous pieces, split where the bytes are even; an item may reach over pieces of a file."""
    units = [i if not whole_files else piece.paths for i, piece in enumerate(pieces)]
    groups = [
        [piece for _, piece in found]
        for _, found in itertools.groupby(zip(units, pieces, strict=True), lambda pair: pair[0])
    ]
    sizes = np.array([sum(piece.num_bytes for piece in group) for group in groups])
    middles = np.cumsum(sizes) - sizes / 2
    owner = np.minimum((middles * count / max(sizes.sum(), 1)).astype(int), count - 1)
    return [piece for group, i in zip(groups, owner, strict=True) if i == index for piece in group]


def _open_plan(parts: Path, pieces: list[Piece], options: Options, tokenizer: Tokenizer) -> None:
    """Keeps finished pieces of the same plan, discards those of another."""
    stamps = {path: [os.stat(path).st_size, os.stat(path).st_mtime_ns] for piece in pieces for path in piece.paths}
    plan = {
        "format": FORMAT,
        "pieces": [asdict(p) for p in pieces],
        "stamps": stamps,
        "options": asdict(options),
        "tokenizer": tokenizer.sha256,
    }
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    path = parts / "plan.json"
    if path.exists() and path.read_text() != digest:
        info(f"{parts}: holds pieces of another input or other options; they are discarded.")
    if not path.exists() or path.read_text() != digest:
        for stale in parts.iterdir():
            if stale.name != "lock":
                stale.unlink()
        write_atomically(path, digest)


def _tokenize_all(parts: Path, pieces: list[Piece], options: Options, vocab_size: int, workers: int) -> None:
    todo = [i for i in range(len(pieces)) if not (parts / f"{i:06d}.json").exists()]
    done_before = len(pieces) - len(todo)
    if done_before:
        info(f"continuing: {done_before} of {len(pieces)} pieces were finished before.")
    total = sum(pieces[i].num_bytes for i in todo)
    workers = max(1, min(workers, len(todo)))
    bad = sum(read_piece_report(parts, i)["bad_lines"] for i in range(len(pieces)) if i not in set(todo))
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    threads = max(1, (os.cpu_count() or 1) // workers)
    if not todo:
        return
    pool = ProcessPoolExecutor(workers, context, start_worker, (options, vocab_size, counter, threads))
    try:
        with _Progress(total, counter) as progress:
            futures = {pool.submit(tokenize_piece, str(parts), i, pieces[i]): i for i in todo}
            for future in as_completed(futures):
                report = future.result()
                progress.tokens += report["tokens"]
                bad += report["bad_lines"]
                if bad > options.max_bad_lines:
                    raise DataError(_bad_lines_message(parts, pieces, bad, options.max_bad_lines, report))
    except BrokenProcessPool:
        raise DataError(
            f"a worker was killed (out of memory?). Run the same command again: it continues with the pieces that are "
            f"missing in {parts}. Fewer --workers need less memory."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _bad_lines_message(parts: Path, pieces: list[Piece], bad: int, limit: int, last: dict[str, Any]) -> str:
    shown = list(last["bad_examples"])
    for i in range(len(pieces)):
        if (parts / f"{i:06d}.json").exists():
            shown += [b for b in read_piece_report(parts, i)["bad_examples"] if b not in shown]
    lines = "\n".join(f"  {path}:{line}: {reason}" for path, line, reason in shown[:SHOWN_BAD_LINES])
    return f"{bad} records could not be read, more than --max-bad-lines {limit}:\n{lines}\nFix them or raise the limit."


class _Progress:
    """A bar on a terminal, a line every ten seconds elsewhere; bytes from a counter that the workers share."""

    def __init__(self, total: int, counter):
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self.total, self.counter, self.tokens = total, counter, 0
        self.bar = Progress(
            TextColumn("prepare"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}% {task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self.task = self.bar.add_task("", total=total, rate="")

    def __enter__(self):
        import threading

        self._stop = threading.Event()
        self._begin = self._said = time.monotonic()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if self.bar.console.is_terminal:
            self.bar.start()
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            self._show()

    def _show(self, last: bool = False) -> None:
        done, now = self.counter.value, time.monotonic()
        rate = done / max(now - self._begin, 1e-9)
        self.bar.update(self.task, completed=done, rate=f"{rate / 1e6:.1f} MB/s")
        if not self.bar.console.is_terminal and (last or now - self._said >= 10):
            self._said = now
            left = duration((self.total - done) / rate) if rate else "?"
            info(f"prepare {100 * done / max(self.total, 1):.0f} % at {rate / 1e6:.1f} MB/s, ETA {left}")

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()
        self._show(last=True)
        self.bar.stop()
        seconds = max(time.monotonic() - self._begin, 1e-9)
        if self.tokens:
            info(f"tokenized {short_number(self.tokens)} tokens at {short_number(self.tokens / seconds)} tokens/s")
