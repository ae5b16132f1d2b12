"""What this machine has: versions, devices, attention backends, NCCL, disk. For people, and for a first look at a node."""

import importlib.metadata
import platform
import resource
import shutil
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from megacpt.config.layout import resolve_layout
from megacpt.config.sections.parallel import Parallel
from megacpt.errors import ConfigError

if TYPE_CHECKING:
    import torch

AXES = ("tp", "cp", "pp", "dp_shard", "dp_replicate")

_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "pydantic",
    "tokenizers",
    "sentencepiece",
    "safetensors",
    "pyarrow",
    "zstandard",
    "tensorboard",
    "rich",
    "transformers",
    "flash-attn",
    "flash-attn-4",
    "gigatoken",
    "liger-kernel",
    "lm_eval",
)


def report(world_size: int = 1) -> list[str]:
    """Lines to print.

    Args:
        world_size: of the run that is meant.
    """
    import torch
    import torch.distributed as dist
    from megacpt_kernels.attention import available_backends, resolve_backend
    from megacpt_kernels.backend import find_apex, use_triton
    from megacpt_kernels.device import profile_of
    from torch.cuda import nccl

    import megacpt

    lines = [f"megacpt {megacpt.__version__}, Python {platform.python_version()}, {platform.platform()}", "packages:"]
    for name in _PACKAGES:
        try:
            lines.append(f"  {name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"  {name}: not installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines.append(f"devices: {torch.cuda.device_count()} CUDA, {torch.get_num_threads()} CPU threads")
    for i in range(torch.cuda.device_count()):
        facts = profile_of(f"cuda:{i}")
        lines.append(f"  {i}: {facts.name}, {facts.memory / 2**30:.0f} GiB, {facts.architecture}")
    lines.append(f"attention on {device} (auto in bfloat16: {resolve_backend('auto', device, torch.bfloat16)}):")
    lines += [f"  {name}: {reason or 'available'}" for name, reason in available_backends(device).items()]
    try:
        use_triton("triton", torch.empty(0, device=device))
        lines.append(f"operations on {device}: triton (auto), torch")
    except ValueError as error:
        lines.append(f"operations on {device}: torch (auto). {error}")
    lines += operations_checked(device)
    try:
        find_apex(device)
        lines.append("optimizer: apex is available")
    except ValueError as error:
        lines.append(f"optimizer: {error}")
    nccl_version = (
        ".".join(map(str, nccl.version())) if dist.is_nccl_available() and device == "cuda" else "not available"
    )
    lines.append(f"NCCL {nccl_version}; gloo {'available' if dist.is_gloo_available() else 'not available'}")
    lines.append(open_files(world_size))
    lines.append(f"disk here: {shutil.disk_usage('.').free / 1e9:.0f} GB free")
    return lines


def open_files(world_size: int) -> str:
    """Whether a process may open what a run of so many ranks needs; a run itself raises the limit to what is allowed."""
    from megacpt.parallel.mesh import files_needed

    unlimited = resource.RLIM_INFINITY
    most, needed = resource.getrlimit(resource.RLIMIT_NOFILE)[1], files_needed(world_size)
    allowed = "any number" if most == unlimited else f"{most:,}"
    if most == unlimited or most >= needed:
        return f"open files: {allowed} allowed, rank 0 of {world_size:,} needs up to {needed:,}"
    return (
        f"open files: {allowed} allowed, but rank 0 of {world_size:,} NEEDS up to {needed:,} (a connection to each rank when a checkpoint "
        f"is planned, one when it serves the rendezvous). Raise the hard limit where ranks are started: `ulimit -Hn {needed}`, nofile "
        "in /etc/security/limits.conf, or LimitNOFILE= of the service (slurmd, containerd)."
    )


def operations_checked(device: str) -> list[str]:
    """Runs the operations that this machine would train with on a few tokens, values checked, against float64 on the CPU."""
    import torch
    from megacpt_kernels import (
        Documents,
        attention,
        embedding,
        label_weights,
        linear_cross_entropy,
        rms_norm,
        rope_qk,
        swiglu,
    )

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    ids, table, weight = torch.tensor([0, 5, 5, 7, 1, 2, 3, 4]), random(8, 64), random(64)
    q, k, v, positions = (
        random(8, 4, 16),
        random(8, 2, 16),
        random(8, 2, 16),
        torch.tensor([0, 1, 2, 0, 1, 2, 3, 4]).int(),
    )
    angles = torch.rand(5, 8, generator=generator)
    compute = {
        "embedding": lambda to: embedding(to(ids), to(table), check=8),
        "rms_norm": lambda to: rms_norm(to(table), to(weight), 1e-5),
        "swiglu": lambda to: swiglu(to(table), to(table)),
        "rope_qk": lambda to: rope_qk(to(q), to(k), to(angles.cos()), to(angles.sin()), to(positions), check=True)[0],
        "attention": lambda to: attention(to(q), to(k), to(v), Documents.of([0, 3], 8, to(ids).device), check=True),
        "linear_cross_entropy": lambda to: linear_cross_entropy(
            to(table), to(table), to(ids), 0, 8, label_weights(to(ids)), check=True
        ),
    }
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def here(x: torch.Tensor) -> torch.Tensor:
        return x.to(device, dtype if x.dtype == torch.float64 else x.dtype)

    lines = []
    for name, run in compute.items():
        try:
            got, want = run(here).detach().cpu().double(), run(lambda x: x)
            error = ((got - want).norm() / want.norm()).item()
            verdict = "ok" if error < 2e-2 else "WRONG"
            lines.append(
                f"  {name}: {verdict}, relative difference from float64 {error:.1e} in {str(dtype).removeprefix('torch.')}"
            )
        except Exception as problem:  # a report goes on
            lines.append(f"  {name}: FAILED, {type(problem).__name__}: {problem}")
    return ["operations, run:", *lines]


def axes(parallel: Parallel, size: int | None = None, repeats: int = 10) -> list[str]:
    """Times an all-reduce on every axis of a layout, on all ranks, and names the slowest node. Collective; lines to print.

    Args:
        size: bytes of the tensor; default 64 MiB on a GPU, 1 MiB on a CPU.
    Raises:
        ConfigError: if the degrees do not multiply to the world size.
    """
    import torch
    import torch.distributed as dist

    from megacpt.parallel.mesh import build_mesh, device_of_process, picture, start_process_group

    device = device_of_process()
    start_process_group(device)
    try:
        layout = resolve_layout(parallel, dist.get_world_size())
    except ValueError as error:
        raise ConfigError([f"parallel: {error}"], "the arguments") from None
    mesh = build_mesh(layout, device)
    size = size or (1 << 26 if device.type == "cuda" else 1 << 20)
    tensor = torch.ones(size // 4, device=device)
    mine: dict[str, Any] = {"host": platform.node()}
    for axis in AXES:
        group = mesh.groups[axis]
        if group.size() > 1:
            mine[axis] = min(_seconds(lambda group=group: dist.all_reduce(tensor, group=group), device, repeats))
            tensor.fill_(1)
    everyone: list[dict] = [{} for _ in range(layout.world_size)]
    dist.all_gather_object(everyone, mine)
    return [picture(layout), *slowest(everyone, size, {axis: mesh.groups[axis].size() for axis in AXES})]


def slowest(everyone: list[dict], size: int, ranks: dict[str, int]) -> list[str]:
    """A line for each axis, and the node whose groups are slowest compared with the others of their axis."""
    lines, excess = [], {}
    for axis, n in ranks.items():
        if n == 1:
            continue
        times = [rank[axis] for rank in everyone]
        usual, worst = statistics.median(times), max(times)
        at = times.index(worst)
        rate = 2 * (n - 1) / n * size / usual / 1e9
        lines.append(
            f"{axis} ({n} ranks): all-reduce of {size / 2**20:g} MiB {usual * 1e3:.2f} ms, {rate:.2f} GB/s; slowest "
            f"{worst * 1e3:.2f} ms on rank {at} ({everyone[at]['host']})"
        )
        for rank, seconds in zip(everyone, times, strict=True):
            excess.setdefault(rank["host"], []).append(seconds / usual)
    if excess:
        host = max(excess, key=lambda name: statistics.mean(excess[name]))
        lines.append(f"slowest node: {host}, {statistics.mean(excess[host]):.2f} times the median of its axes")
    return lines


def _seconds(run: Callable[[], object], device: "torch.device", repeats: int) -> list[float]:
    import torch

    from megacpt.parallel.mesh import meet

    times = []
    for _ in range(repeats + 2):
        meet(device)
        begin = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return times[2:]
