"""What is seen of a run: the row of metrics.jsonl, TensorBoard's tags, the console line with ETA."""

import math
import os
import resource
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megacpt.config.clock import Clock, Step
from megacpt.family.base import ModelConfig
from megacpt.files import Journal
from megacpt.log import duration, short_number
from megacpt.model.flops import PEAK_FLOPS, step_flops
from megacpt.survive.health import StepStats


def peak_flops(device: torch.device, given_tflops: float | None) -> tuple[float | None, str]:
    """(FLOP/s that MFU refers to, where it comes from); None for a GPU that is not in the table."""
    if given_tflops:
        return given_tflops * 1e12, "log.peak_tflops"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        found = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
        return found, f"data sheet of {name}, dense bf16" if found else f"unknown for {name}: set log.peak_tflops"
    a = torch.randn(512, 512)
    best = float("inf")
    for _ in range(8):
        begin = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - begin)
    return 2 * 512**3 / best, f"measured fp32 matmul on {torch.get_num_threads()} CPU threads"


def memory_gib(device: torch.device) -> float:
    """Peak so far: of the allocator on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def resident_gib() -> float:
    """Host memory of this process now."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux: the peak is what there is
        return memory_gib(torch.device("cpu"))
    return pages * resource.getpagesize() / 2**30


@dataclass(frozen=True)
class StepFacts:
    """What was measured of a step.

    Attributes:
        pairs: of query and key that see each other, of the whole step.
        domain_tokens: of each domain, that the run has trained up to the step.
        skipped: why the update was not made, or None.
        effective_time: seconds of steps whose updates the weights hold, over all since the run was first started.
    """

    stage: str
    stats: StepStats
    lr: float
    pairs: int
    domain_tokens: dict[str, int]
    seconds: float
    data_seconds: float
    memory_gib: float
    skipped: str | None
    effective_time: float | None


class StepMetrics:
    """Turns what a step measured into its row. attended_tokens: keys that a query sees, in the mean; attended_share: over those it would
    see if each row were one document, the part of the length that documents really use."""

    def __init__(self, config: ModelConfig, world_size: int, peak: float | None):
        self.config, self.world_size, self.peak = config, world_size, peak

    def row(self, step: Step, facts: StepFacts) -> dict[str, Any]:
        dense, exact = step_flops(self.config, step.batch_tokens, step.seq_len, facts.pairs)
        return {
            "step": step.number,
            "tokens": step.tokens_after,
            "stage": facts.stage,
            "loss": _number(facts.stats.loss),
            "grad_norm": _number(facts.stats.grad_norm),
            "lr": facts.lr,
            "batch_tokens": step.batch_tokens,
            "seq_len": step.seq_len,
            "domain_tokens": facts.domain_tokens,
            "attended_tokens": round(facts.pairs / step.batch_tokens, 1),
            "attended_share": round(2 * facts.pairs / (step.batch_tokens * (step.seq_len + 1)), 4),
            "tokens_per_second": round(step.batch_tokens / facts.seconds, 1),
            "mfu": self._share(dense, facts.seconds),
            "mfu_exact": self._share(exact, facts.seconds),
            "step_s": round(facts.seconds, 4),
            "data_s": round(facts.data_seconds, 4),
            "memory_gib": round(facts.memory_gib, 3),
            "skipped": facts.skipped,
            "effective_time": facts.effective_time,
        }

    def _share(self, flops: float, seconds: float) -> float | None:
        return round(flops / (self.peak * self.world_size * seconds), 4) if self.peak else None


def _number(value: float) -> float | None:
    """JSON knows no nan."""
    return value if math.isfinite(value) else None


def event_file() -> str:
    """A name by which TensorBoard knows its files."""
    return f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"


class TensorBoard:
    """tb/ with slash groups. A resumed run hides what it repeats (`purge_step`). Its records go through a journal and not through
    TensorBoard's own thread, which ends, with a traceback, at the first write that a full disk refuses."""

    def __init__(self, journal: Journal, world_size: int, purge_step: int | None):
        # protobuf makes these names when the module is loaded
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.journal, self.world_size, self.event = journal, world_size, Event
        self.waiting: list[bytes] = []
        self.records = RecordWriter(_Collected(self.waiting))
        self._write(file_version="brain.Event:2", step=purge_step or 0)
        if purge_step is not None:
            self._write(session_log=SessionLog(status=SessionLog.START), step=purge_step)
        self._flush()

    def _write(self, **fields: Any) -> None:
        self.records.write(self.event(wall_time=time.time(), **fields).SerializeToString())

    def _scalar(self, tag: str, value: float, step: int) -> None:
        from torch.utils.tensorboard.summary import scalar

        self._write(summary=scalar(tag, value), step=step)

    def _flush(self) -> None:
        self.journal.add(b"".join(self.waiting))
        self.waiting.clear()

    def step(self, row: dict[str, Any]) -> None:
        tags = {
            "train/loss": row["loss"],
            "train/grad_norm": row["grad_norm"],
            "train/tokens": row["tokens"],
            "train/batch_tokens": row["batch_tokens"],
            "train/seq_len": row["seq_len"],
            "optim/lr": row["lr"],
            "perf/tokens_per_s_per_gpu": row["tokens_per_second"] / self.world_size,
            "perf/mfu": row["mfu"],
            "perf/mfu_exact": row["mfu_exact"],
            "perf/step_s": row["step_s"],
            "perf/data_s": row["data_s"],
            "mem/peak_gib": row["memory_gib"],
            "data/attended_share": row["attended_share"],
            "perf/effective_time": row["effective_time"],
            "train/skipped": float(row["skipped"] is not None),
            "perf/step_s_slowest_rank": row.get("step_s_by_rank", [None])[-1],
            **{f"data/tokens/{name}": count for name, count in row["domain_tokens"].items()},
        }
        for tag, value in tags.items():
            if value is not None:
                self._scalar(tag, value, row["step"])
        self._flush()

    def validation(self, losses: dict[str, float], step: int) -> None:
        for name, loss in losses.items():
            self._scalar(f"val/{name}/loss", loss, step)
        self._flush()

    def mixture(self, shares: dict[str, float], step: int) -> None:
        for name, share in shares.items():
            self._scalar(f"data/share/{name}", share, step)
        self._flush()

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """uint8 [height, width, 3]."""
        from torch.utils.tensorboard.summary import image

        self._write(summary=image(name, pixels, dataformats="HWC"), step=step)
        self._flush()


class _Collected:
    """What a writer of records takes for its file."""

    def __init__(self, parts: list[bytes]):
        self.write = parts.append


class Console:
    """One line a step (or every few), with the time that is left at the recent rate."""

    def __init__(self, every_steps: int):
        self.every, self.rate = every_steps, None

    def line(self, row: dict[str, Any], clock: Clock) -> str | None:
        rate = row["tokens_per_second"]
        self.rate = rate if self.rate is None else 0.9 * self.rate + 0.1 * rate
        if row["step"] % self.every and row["step"] != clock.num_steps:
            return None
        mfu = f"MFU {100 * row['mfu']:.1f} % ({100 * row['mfu_exact']:.1f} % exact)  " if row["mfu"] is not None else ""
        left = duration((clock.num_tokens - row["tokens"]) / self.rate)
        return (
            f"{row['stage']} step {row['step']}/{clock.num_steps}  tokens {short_number(row['tokens'])}  "
            f"loss {_shown(row['loss'], 4)}  grad {_shown(row['grad_norm'], 3)}  lr {row['lr']:.2e}  "
            f"{short_number(row['tokens_per_second'])} tok/s  {mfu}"
            f"{row['memory_gib']:.2f} GiB  ETA {left}"
        )


def _shown(value: float | None, digits: int) -> str:
    return "not finite" if value is None else f"{value:.{digits}f}"
