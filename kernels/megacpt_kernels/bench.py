"""Checks, then times every operation against its floor of bytes or FLOPs and against its peers.

    python -m megacpt_kernels.bench [--csv kernels.csv] [--only rms_norm swiglu] [--seconds 280] [--tiny]

Ours is measured beside torch (the same composition, eager and compiled), Liger and the attention libraries where they are installed.
Copy and matmul rates of this device are measured first: a bandwidth is given as a part of that copy, a FLOP rate of that matmul. Each
time is the median of runs of launches between two events, after warm-up, on inputs larger than the cache. The check compares each result
with float64 before anything is timed; for a kernel that is wrong a line says so, and the end is 1. --tiny runs small shapes on any
device, to see that everything works; its times mean nothing.
"""

# torch names its updates of lists of tensors as private, and has no others:
# pyright: reportPrivateImportUsage=false

import argparse
import csv
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megacpt_kernels import (
    Documents,
    adamw_,
    add_rms_norm,
    attention,
    cross_entropy_,
    embedding,
    grad_norm,
    label_weights,
    linear_cross_entropy,
    linear_lse,
    rms_norm,
    rope_qk,
    rope_qk_,
    swiglu,
)
from megacpt_kernels.attention import available_backends
from megacpt_kernels.backend import triton
from megacpt_kernels.device import profile_of

COLUMNS: tuple[str, ...] = (
    "gpu", "driver", "torch", "triton", "op", "pass", "shape", "dtype", "backend", "model_bytes", "model_flops", "floor_us", "median_us",
    "p20_us", "p80_us", "pct_of_measured_copy", "pct_of_measured_matmul", "speedup_vs_eager", "speedup_vs_compile", "speedup_vs_liger",
    "peak_extra_MiB", "max_rel_err",
)  # fmt: skip
BOUND = 8e-3
"""Largest relative error in bfloat16 that passes: two roundings and an accumulation (as in tests/tolerances.py)."""


@dataclass
class Row:
    """One operation and pass: how to run it, by backend; what it must move or compute; what it must give."""

    op: str
    which: str
    shape: str
    runs: Mapping[str, Callable[[], object]]
    bytes: int = 0
    flops: int = 0
    check: Callable[[], float] | None = None
    found: dict[str, dict] = field(default_factory=dict)


@dataclass(frozen=True)
class Shapes:
    """Llama-3-8B's, or tiny ones."""

    tokens: int = 8192
    long: int = 131072
    hidden: int = 4096
    ffn: int = 14336
    heads: int = 32
    kv: int = 8
    head_dim: int = 128
    vocab: int = 128256
    parameters: int = 1 << 27


TINY = Shapes(64, 128, 64, 96, 4, 2, 16, 256, 1 << 12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", metavar="FILE", help="write all numbers there")
    parser.add_argument("--only", nargs="+", metavar="OP", help="these operations")
    parser.add_argument("--seconds", type=float, default=280, help="start no operation after this long")
    parser.add_argument("--tiny", action="store_true", help="small shapes, any device")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.tiny:
        sys.exit("This needs a GPU: it measures kernels. `--tiny` runs the whole program on small shapes here.")
    begin, shapes = time.monotonic(), TINY if options.tiny else Shapes()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    machine, rates = _machine(device), _ceilings(device, options.tiny)
    print(
        f"{machine['gpu']}, torch {machine['torch']}, triton {machine['triton']}, {str(dtype).removeprefix('torch.')}"
    )
    print(f"measured: copy {rates['copy'] / 1e12:.3f} TB/s, matmul {rates['matmul'] / 1e12:.1f} TFLOP/s\n")
    print(
        "| operation | pass | shape | floor, us | ours, us | % of copy or matmul | eager | compiled | Liger | best library | error |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    rows, wrong, skipped = [], [], []
    for make in GROUPS:
        name = make.__name__.removeprefix("_rows_of_")
        if options.only and name not in options.only:
            continue
        if time.monotonic() - begin > options.seconds:
            skipped.append(name)
            continue
        torch.manual_seed(0)
        for row in make(shapes, device, dtype):
            error = row.check() if row.check else float("nan")
            if error > BOUND:
                wrong.append(f"{row.op} {row.which}: relative error {error:.3g} against float64")
            for backend, run in row.runs.items():
                try:
                    row.found[backend] = _time(run, device, options.tiny)
                except Exception as problem:  # a peer that cannot run is no reason to stop
                    print(
                        f"  {row.op} {row.which} {backend}: {type(problem).__name__}: {str(problem).splitlines()[0][:120]}"
                    )
            rows += _lines(row, rates, error, machine, dtype)
            print(_table_line(row, rates, error), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            for name, unit in (("copy", "B/s"), ("matmul", "FLOP/s")):
                writer.writerow({**machine, "op": name, "shape": f"{rates[name]:.6g} {unit}"})
            writer.writerows(rows)
    if skipped:
        print(f"\nnot run, {options.seconds:.0f} s were over: {', '.join(skipped)} (--seconds, --only)")
    if wrong:
        sys.exit("\n".join(["", *wrong]))


def _machine(device: torch.device) -> dict[str, str]:
    cuda = device.type == "cuda"
    driver: Callable[[], int] | None = getattr(
        torch._C, "_cuda_getDriverVersion", None
    )  # only where torch is built with CUDA
    return {
        "gpu": profile_of(device).name or "CPU",
        "driver": str(driver()) if cuda and driver else "",
        "torch": torch.__version__,
        "triton": triton.__version__ if triton else "not installed",
    }


def _ceilings(device: torch.device, tiny: bool) -> dict[str, float]:
    """Bytes a second of a copy and FLOPs a second of a product, as this device does them now."""
    size = 1 << (20 if tiny else 30)
    source, target = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    n = 64 if tiny else 8192
    a, b = (
        torch.randn(n, n, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
        for _ in range(2)
    )
    copy = _time(lambda: target.copy_(source), device, tiny)["median"]
    return {"copy": 2 * size / copy, "matmul": 2 * n**3 / _time(lambda: a @ b, device, tiny)["median"]}


def _time(run: Callable[[], object], device: torch.device, tiny: bool) -> dict[str, float]:
    """Seconds of one call: median, 20th and 80th percentile; bytes at the peak above what was there."""
    run()
    if device.type != "cuda":
        times = []
        for _ in range(3):
            at = time.perf_counter()
            run()
            times.append(time.perf_counter() - at)
        return {"median": statistics.median(times), "p20": min(times), "p80": max(times), "peak": 0.0}
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    at = time.perf_counter()
    run()
    torch.cuda.synchronize()
    once = time.perf_counter() - at
    peak = torch.cuda.max_memory_allocated() - before
    repeat = 3 if tiny else max(5, min(50, int(0.15 / max(once, 1e-5))))
    inner = max(
        1, int(5e-4 / max(once, 1e-6))
    )  # at least half a millisecond between two events: the host is not what is timed
    times = []
    for _ in range(repeat):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(inner):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / inner)
    times.sort()

    def pick(part: float) -> float:
        return times[min(len(times) - 1, int(part * len(times)))]

    return {"median": statistics.median(times), "p20": pick(0.2), "p80": pick(0.8), "peak": float(peak)}


def _share(row: Row, rates: dict[str, float], seconds: float) -> tuple[float, float]:
    """(per cent of the measured copy, of the measured matmul)."""
    return 100 * row.bytes / seconds / rates["copy"], 100 * row.flops / seconds / rates["matmul"]


def _floor(row: Row, rates: dict[str, float]) -> float:
    return max(row.bytes / rates["copy"], row.flops / rates["matmul"])


def _lines(row: Row, rates: dict, error: float, machine: dict, dtype: torch.dtype) -> list[dict]:
    base = {name: found["median"] for name, found in row.found.items()}
    lines = []
    for backend, found in row.found.items():
        copy, matmul = _share(row, rates, found["median"])
        faster = {peer: f"{seconds / found['median']:.3f}" for peer, seconds in base.items()}
        lines.append({
            **machine, "op": row.op, "pass": row.which, "shape": row.shape, "dtype": str(dtype).removeprefix("torch."), "backend": backend,
            "model_bytes": row.bytes, "model_flops": row.flops, "floor_us": f"{1e6 * _floor(row, rates):.2f}",
            "median_us": f"{1e6 * found['median']:.2f}", "p20_us": f"{1e6 * found['p20']:.2f}", "p80_us": f"{1e6 * found['p80']:.2f}",
            "pct_of_measured_copy": f"{copy:.1f}" if row.bytes else "", "pct_of_measured_matmul": f"{matmul:.1f}" if row.flops else "",
            "speedup_vs_eager": faster.get("eager", ""), "speedup_vs_compile": faster.get("compiled", ""),
            "speedup_vs_liger": faster.get("liger", ""),
            "peak_extra_MiB": f"{found['peak'] / 2**20:.1f}", "max_rel_err": f"{error:.3g}" if backend == "ours" else "",
        })  # fmt: skip
    return lines


def _table_line(row: Row, rates: dict, error: float) -> str:
    microseconds = {name: f"{1e6 * found['median']:.1f}" for name, found in row.found.items()}
    share = ""
    if "ours" in row.found:
        copy, matmul = _share(row, rates, row.found["ours"]["median"])
        share = f"{copy if row.bytes and copy >= matmul else matmul:.0f} %"
    known = ("ours", "eager", "compiled", "liger")
    libraries = {name: found["median"] for name, found in row.found.items() if name not in known}
    best = min(libraries, key=libraries.__getitem__) if libraries else None
    cells = [
        row.op, row.which, row.shape, f"{1e6 * _floor(row, rates):.1f}", microseconds.get("ours", ""), share,
        microseconds.get("eager", ""), microseconds.get("compiled", ""), microseconds.get("liger", ""),
        f"{best} {microseconds[best]}" if best else "", f"{error:.2g}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _tuple_of(y: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return y if isinstance(y, tuple) else (y,)


def _error(got: Tensor | tuple[Tensor, ...], want: Tensor | tuple[Tensor, ...]) -> float:
    """The largest relative difference of some tensors from float64 ones."""
    pairs = zip(_tuple_of(got), _tuple_of(want), strict=True)
    return max(((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in pairs)


def _both(
    op: str,
    shape: str,
    ours,
    eager,
    inputs: list[Tensor],
    forward: int,
    backward: int,
    liger=None,
    rows_checked: int = 64,
) -> Iterator[Row]:
    """Forward and backward of a function, beside the plain one eager and compiled. The first rows are checked in float64."""
    functions = {"ours": ours, "eager": eager, "compiled": torch.compile(eager)} | ({"liger": liger} if liger else {})
    given = [x.detach().clone().requires_grad_() for x in inputs]
    cotangents = [torch.randn_like(y) for y in _tuple_of(ours(*given))]

    def checked() -> float:
        few = [x[:rows_checked] if x.shape[0] == inputs[0].shape[0] else x for x in inputs]
        some = [x.detach().clone().requires_grad_() for x in few]
        exact = [x.detach().double().requires_grad_() for x in few]
        got, want = _tuple_of(ours(*some)), _tuple_of(eager(*exact))
        cut = [c[: y.shape[0]] for c, y in zip(cotangents, got, strict=True)]
        first = torch.autograd.grad(got, some, cut)
        second = torch.autograd.grad(want, exact, [c.double() for c in cut])
        return _error((*got, *first), (*want, *second))

    def with_no_grad(f: Callable) -> Callable[[], object]:
        return torch.no_grad()(lambda: f(*[x.detach() for x in given]))

    yield Row(op, "forward", shape, {name: with_no_grad(f) for name, f in functions.items()}, forward, check=checked)
    runs = {}
    for name, f in functions.items():
        fresh = [x.detach().clone().requires_grad_() for x in inputs]
        try:
            out = _tuple_of(f(*fresh))
        except Exception:  # shown already with the forward
            continue
        runs[name] = lambda out=out, fresh=fresh: torch.autograd.grad(out, fresh, cotangents, retain_graph=True)
    yield Row(op, "backward", shape, runs, backward, check=checked)


def _liger(module: str, name: str):
    """A function of Liger's, or None where it is not installed or there is no GPU."""
    if importlib.util.find_spec("liger_kernel") is None or not torch.cuda.is_available():
        return None
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name)


def _plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float() if x.dtype == torch.bfloat16 else x
    return (weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)).to(x.dtype)


def _rows_of_rms_norm(s: Shapes, device, dtype) -> Iterator[Row]:
    x, weight = (
        torch.randn(s.tokens, s.hidden, device=device, dtype=dtype),
        torch.randn(s.hidden, device=device, dtype=dtype),
    )
    size, peer = x.numel() * x.element_size(), _liger("rms_norm", "LigerRMSNormFunction")
    liger = peer and (lambda x, w: peer.apply(x, w, 1e-5, 0.0, "llama", False))

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return rms_norm(x, w, 1e-5)

    yield from _both("rms_norm", f"{s.tokens}x{s.hidden}", ours, _plain_norm, [x, weight], 2 * size, 3 * size, liger)


def _rows_of_add_rms_norm(s: Shapes, device, dtype) -> Iterator[Row]:
    shapes = (s.tokens, s.hidden), (s.tokens, s.hidden), (s.hidden,)
    x, residual, weight = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
    size, peer = x.numel() * x.element_size(), _liger("fused_add_rms_norm", "LigerFusedAddRMSNormFunction")
    liger = peer and (lambda x, r, w: peer.apply(x, r, w, 1e-5, 0.0, "llama", False))

    def plain(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return _plain_norm(x + r, w), x + r

    def ours(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, r, w, 1e-5)

    yield from _both(
        "add_rms_norm", f"{s.tokens}x{s.hidden}", ours, plain, [x, residual, weight], 4 * size, 4 * size, liger
    )


def _rows_of_rope(s: Shapes, device, dtype) -> Iterator[Row]:
    q = torch.randn(s.tokens, s.heads, s.head_dim, device=device, dtype=dtype)
    k = torch.randn(s.tokens, s.kv, s.head_dim, device=device, dtype=dtype)
    angles = torch.outer(
        torch.arange(s.tokens, device=device).float(), 500000 ** -torch.linspace(0, 1, s.head_dim // 2, device=device)
    )
    cos, sin = angles.cos(), angles.sin()
    positions = torch.arange(s.tokens, device=device, dtype=torch.int32) % (s.tokens // 3)

    def plain(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        rows = positions[: len(q)]
        c, t = (torch.cat([x, x], -1)[rows][:, None].to(q.dtype) for x in (cos, sin))

        def turned(x: Tensor) -> Tensor:
            return torch.cat([-x[..., s.head_dim // 2 :], x[..., : s.head_dim // 2]], -1)

        return q * c + turned(q) * t, k * c + turned(k) * t

    moved = 2 * (q.numel() + k.numel()) * q.element_size()

    def ours(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return rope_qk(q, k, cos, sin, positions[: len(q)])

    shape = f"{s.tokens}x({s.heads}+{s.kv})x{s.head_dim}"
    yield from _both("rope_qk", shape, ours, plain, [q, k], moved, moved)
    yield Row("rope_qk_", "in place", shape, {"ours": lambda: rope_qk_(q, k, cos, sin, positions)}, moved)


def _rows_of_swiglu(s: Shapes, device, dtype) -> Iterator[Row]:
    gate, up = (torch.randn(s.tokens, s.ffn, device=device, dtype=dtype) for _ in range(2))
    size, peer = gate.numel() * gate.element_size(), _liger("swiglu", "LigerSiLUMulFunction")
    liger = peer and (lambda g, u: peer.apply(g, u))

    def plain(g: Tensor, u: Tensor) -> Tensor:
        return F.silu(g) * u

    yield from _both("swiglu", f"{s.tokens}x{s.ffn}", swiglu, plain, [gate, up], 3 * size, 5 * size, liger)


def _rows_of_cross_entropy(s: Shapes, device, dtype) -> Iterator[Row]:
    logits = torch.randn(s.tokens, s.vocab, device=device, dtype=dtype)
    target = torch.randint(0, s.vocab, (s.tokens,), device=device)
    size, peer = logits.numel() * logits.element_size(), _liger("cross_entropy", "LigerCrossEntropyFunction")

    def checked() -> float:
        few, ids = logits[:64].clone(), target[:64]
        exact = few.double().requires_grad_()
        want = F.cross_entropy(exact, ids, reduction="none")
        (grad,) = torch.autograd.grad(want.sum() * 0.5, exact)
        nll, _ = cross_entropy_(few, ids, 0, s.vocab, label_weights(ids, 0.5))
        return _error((nll, few), (want.detach(), grad))

    def plain() -> Tensor:
        x = logits.detach().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(x.float(), target, reduction="sum"), x)[0]

    def liger() -> Tensor:
        assert peer is not None
        x = logits.detach().requires_grad_()
        return torch.autograd.grad(peer.apply(x, target, None, -100, 0.0, 0.0, "sum")[0], x)[0]

    compiled = torch.compile(lambda x: F.cross_entropy(x.float(), target, reduction="sum"))

    def plain_compiled() -> Tensor:
        x = logits.detach().requires_grad_()
        return torch.autograd.grad(compiled(x), x)[0]

    def ours(weights: Tensor | None) -> Callable[[], object]:
        return lambda: cross_entropy_(logits, target, 0, s.vocab, weights)

    shape = f"{s.tokens}x{s.vocab}"
    runs = {"ours": ours(label_weights(target, 1e-3)), "eager": plain, "compiled": plain_compiled} | (
        {"liger": liger} if peer else {}
    )
    yield Row("cross_entropy_", "forward", shape, {"ours": ours(None)}, size, check=checked)
    yield Row("cross_entropy_", "both", shape, runs, 3 * size, check=checked)


def _rows_of_linear_cross_entropy(s: Shapes, device, dtype) -> Iterator[Row]:
    peer = _liger("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
    weight = torch.randn(s.vocab, s.hidden, device=device, dtype=dtype) / s.hidden**0.5
    for tokens in (s.tokens, s.long):
        x, target = (
            torch.randn(tokens, s.hidden, device=device, dtype=dtype),
            torch.randint(0, s.vocab, (tokens,), device=device),
        )
        flops = 6 * tokens * s.hidden * s.vocab

        def run(f, x=x) -> Callable:
            def both():
                a, w = x.detach().requires_grad_(), weight.detach().requires_grad_()
                return torch.autograd.grad(f(a, w), (a, w))

            return both

        def checked(x=x, target=target) -> float:
            few = x[:64]
            a, w = few.detach().requires_grad_(), weight.detach().requires_grad_()
            weights = torch.linspace(-1, 1, len(few), device=device)
            got = torch.autograd.grad(linear_cross_entropy(a, w, target[: len(few)], 0, s.vocab, weights), (a, w))
            b, v = few.double().requires_grad_(), weight.double().requires_grad_()
            nll = F.cross_entropy(b @ v.t(), target[: len(few)], reduction="none")
            return _error(got, torch.autograd.grad((weights * nll).sum(), (b, v)))

        shape = f"{tokens}x{s.hidden}x{s.vocab}"
        weights = label_weights(target)

        def ours(a: Tensor, w: Tensor, target: Tensor = target, weights: Tensor = weights) -> Tensor:
            return linear_cross_entropy(a, w, target, 0, s.vocab, weights, scale=1e-4)

        runs = {"ours": run(ours)}
        if tokens == s.tokens:
            runs["eager"] = run(lambda a, w, target=target: F.cross_entropy((a @ w.t()).float(), target))
            if peer:
                runs["liger"] = run(
                    lambda a, w, target=target: peer.apply(a, w, target, None, None, -100, 0.0, 0.0, "sum")[0]
                )
        yield Row(
            "linear_cross_entropy", "both", shape, runs, flops=flops, check=checked if tokens == s.tokens else None
        )
    x, target = (
        torch.randn(s.tokens, s.hidden, device=device, dtype=dtype),
        torch.randint(0, s.vocab, (s.tokens,), device=device),
    )

    def exact() -> float:
        want = (x[:64].double() @ weight.double().t()).logsumexp(-1)
        return _error(linear_lse(x[:64], weight, target[:64], 0, s.vocab)[0], want)

    runs = {
        "ours": lambda: linear_lse(x, weight, target, 0, s.vocab),
        "eager": lambda: (x @ weight.t()).float().logsumexp(-1),
    }
    yield Row(
        "linear_lse",
        "forward",
        f"{s.tokens}x{s.hidden}x{s.vocab}",
        runs,
        flops=2 * s.tokens * s.hidden * s.vocab,
        check=exact,
    )


def _rows_of_adamw(s: Shapes, device, dtype) -> Iterator[Row]:

    def make(kind: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(s.parameters, device=device).abs().to(kind)

    weight, grad, first, second, clip = make(), make(), make(), make(), torch.full((), 2.0, device=device)
    settings: dict[str, Any] = dict(lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, step=7)

    def checked() -> float:
        few = [x[:4096].clone() for x in (weight, grad, first, second)]
        w, g, m, v = (x.double() for x in few)
        adamw_([few[0]], [few[1]], [few[2]], [few[3]], **settings, inverse_clip=clip)
        g = g / 2
        m, v = m * 0.9 + g * 0.1, v * 0.95 + g * g * 0.05
        w = w * (1 - 1e-5) - 1e-4 / (1 - 0.9**7) * m / ((v / (1 - 0.95**7)).sqrt() + 1e-8)
        return _error((few[0], few[2], few[3]), (w, m, v))

    def eager():
        torch._foreach_div_([grad], clip)
        adamw_([weight], [grad], [first], [second], **settings, backend="torch")

    def ours(backend: str = "auto") -> None:
        adamw_([weight], [grad], [first], [second], **settings, inverse_clip=clip, backend=backend)

    runs: dict[str, Callable[[], object]] = {"ours": ours, "eager": eager}
    if device.type == "cuda" and importlib.util.find_spec("amp_C"):
        runs["apex"] = lambda: ours(backend="apex")
    yield Row("adamw_", "fp32 states", f"{s.parameters}", runs, 28 * s.parameters, check=checked)
    first, second = make(torch.bfloat16), make(torch.bfloat16)
    yield Row("adamw_", "bf16 states", f"{s.parameters}", {"ours": ours}, 20 * s.parameters)

    def want() -> float:
        return abs(grad_norm([grad]).item() / grad.double().norm().item() - 1)

    runs = {"ours": lambda: grad_norm([grad]), "eager": lambda: torch.nn.utils.get_total_norm([grad])}
    yield Row("grad_norm", "", f"{s.parameters}", runs, 4 * s.parameters, check=want)


def _rows_of_embedding(s: Shapes, device, dtype) -> Iterator[Row]:
    table = torch.randn(s.vocab, s.hidden, device=device, dtype=dtype)
    ids = torch.randint(0, s.vocab, (s.tokens,), device=device)
    moved = 2 * s.tokens * s.hidden * table.element_size()
    both = (lambda t: embedding(ids, t), lambda t: F.embedding(ids, t))
    written = moved + table.numel() * table.element_size()
    yield from _both("embedding", f"{s.tokens}x{s.hidden}", *both, [table], moved, written, rows_checked=s.vocab)


def _rows_of_attention(s: Shapes, device, dtype) -> Iterator[Row]:
    """One document, and documents of about a thousand tokens; every backend that is there."""
    for tokens in (s.tokens, s.long):
        for mean in (tokens, max(2, tokens // (8 if tokens == s.tokens else 128))):
            generator = torch.Generator().manual_seed(1)
            cuts = torch.randperm(tokens - 1, generator=generator)[: tokens // mean - 1] + 1
            documents = Documents.of([0, *sorted(cuts.tolist())], tokens, device)
            lengths = [b - a for a, b in zip(documents.q, documents.q[1:], strict=False)]
            pairs = sum(n * (n + 1) // 2 for n in lengths)
            q, k, v = (
                torch.randn(tokens, heads, s.head_dim, device=device, dtype=dtype).requires_grad_()
                for heads in (s.heads, s.kv, s.kv)
            )
            grad = torch.randn(q.shape, device=device, dtype=dtype)
            backends = [name for name, reason in available_backends(device.type, dtype).items() if not reason]
            if device.type == "cuda":
                backends.remove("sdpa")
            if len(lengths) > 64 and "cudnn" in backends:
                backends.remove("cudnn")  # a call a document
            shown = {name: "ours" if name == "triton" else name for name in backends}

            def call(name: str, d: Documents = documents, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Any:
                return attention(q, k, v, d, backend=name)

            def checked(q=q, k=k, v=v, call=call) -> float:
                """The first document's first 256 queries, forward and backward."""
                n = min(256, q.shape[0])
                few = [x[:n].detach().clone().requires_grad_() for x in (q, k, v)]
                exact = [x.detach().double().requires_grad_() for x in few]
                small = Documents.of([0, n // 3], n, device)
                backend = "triton" if device.type == "cuda" else "auto"
                got, want = call(backend, small, *few), call("sdpa", small, *exact)
                cut = torch.randn_like(got)
                return _error(
                    (got, *torch.autograd.grad(got, few, cut)), (want, *torch.autograd.grad(want, exact, cut.double()))
                )

            shape = f"{tokens} in {len(lengths)} documents"
            runs = {shown[name]: torch.no_grad()(lambda name=name, call=call: call(name)) for name in backends}
            yield Row("attention", "forward", shape, runs, flops=4 * s.head_dim * s.heads * pairs, check=checked)
            runs = {}
            for name in backends:
                out = call(name)
                runs[shown[name]] = lambda out=out, q=q, k=k, v=v, grad=grad: torch.autograd.grad(
                    out, (q, k, v), grad, retain_graph=True
                )
            yield Row("attention", "backward", shape, runs, flops=10 * s.head_dim * s.heads * pairs)


GROUPS = (
    _rows_of_rms_norm, _rows_of_add_rms_norm, _rows_of_rope, _rows_of_swiglu, _rows_of_cross_entropy, _rows_of_linear_cross_entropy,
    _rows_of_adamw, _rows_of_embedding, _rows_of_attention,
)  # fmt: skip


if __name__ == "__main__":
    main()
