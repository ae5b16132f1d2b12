"""Compiles every Triton kernel as it ships, without a GPU, and holds its resources against a budget.

    python -m megacpt_kernels.compile_check [--arch 90 80 100] [--write kernels/README.md]

The kernels go through their own specialisation (`warmup` on a driver that only knows an architecture) to machine code. Registers and
shared memory come from cuobjdump, spills from ptxas, vector widths from the disassembly; all three tools are in Triton's wheel. Ends
with 1 if a kernel spills, needs more registers than its budget or more shared memory than there is, or loads fewer than 128 bits at
once. Runs in a process of its own, without TRITON_INTERPRET.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

from megacpt_kernels import backend

SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that a program may have, by architecture (CUDA C programming guide, table of compute capabilities)."""
MARKS = ("<!-- compiled -->", "<!-- end of compiled -->")


@dataclass(frozen=True)
class Case:
    """A kernel as it ships: arguments (types stand for tensors), options, most registers a thread, fewest 128-bit accesses, whether
    Hopper's warpgroup products (HGMMA) are meant, and options that differ before Hopper."""

    name: str
    kernel: Any
    arguments: tuple
    options: dict
    registers: int
    loads: int
    stores: int
    multiplies: bool = False
    older: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Resources:
    registers: int
    spills: int
    shared: int
    loads: int
    stores: int
    products: int = 0


class _Driver:
    """As much of a driver as compiling needs. Compiled kernels are kept by device, so each architecture is a device."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch

    def get_current_stream(self, device=None):
        return 0


def cases() -> list[Case]:
    """Llama-3-8B's shapes: hidden 4,096, FFN 14,336, 32 and 8 heads of 128, vocabulary 128,256, bfloat16."""
    import megacpt_kernels  # noqa: F401  (its functions hide its modules of the same names)

    names = (
        "rms_norm",
        "rope",
        "swiglu",
        "cross_entropy",
        "adamw",
        "embedding",
        "grad_norm",
        "linear_cross_entropy",
        "flash_attention",
    )
    norm, rope, swiglu, loss, adamw, embedding, total, linear, flash = (
        sys.modules[f"megacpt_kernels.{name}"] for name in names
    )
    half, single, integer, long = torch.bfloat16, torch.float32, torch.int32, torch.int64
    rows = dict(BLOCK=4096, num_warps=norm._warps(4096))
    flat = dict(BLOCK=swiglu._BLOCK, num_warps=4)
    wide = dict(BLOCK=4096, num_warps=8)

    def forward(residual: torch.dtype | None) -> tuple:
        return half, residual, half, half, half, single, 4096, 1e-5

    def backward(dh: torch.dtype | None) -> tuple:
        return half, dh, half, half, single, half, single, 8192, 4096

    heads = (half, half, half, half, single, single, integer, *(4096, 128, 1024, 128) * 2, 32, 8, 64)
    strides, shape = (4096, 128, 1024, 128, 1024, 128), (8192, 0.088, 4, 128)

    def update(state: torch.dtype) -> tuple:
        return single, single, state, state, single, 2**24, *(0.5,) * 8, 2**24, 4096, 4096, 12345

    def rounding(on: bool) -> dict:
        return dict(ROUND_WEIGHT=False, ROUND_AVG=on, ROUND_SQ=on, BLOCK=adamw._BLOCK, num_warps=4)

    return [
        Case("rms_norm forward", norm._forward_kernel, forward(None), dict(ADD=False, **rows), 64, 2, 1),
        Case("add_rms_norm forward", norm._forward_kernel, forward(half), dict(ADD=True, **rows), 64, 3, 2),
        Case("rms_norm backward", norm._backward_kernel, backward(None), dict(ADD=False, **rows), 128, 3, 1),
        Case("add_rms_norm backward", norm._backward_kernel, backward(half), dict(ADD=True, **rows), 128, 4, 1),
        Case("rope_qk", rope._rotate_kernel, heads, dict(SIGN=1, HALF=64, HEADS=16, num_warps=4), 96, 4, 4),
        Case("swiglu forward", swiglu._forward_kernel, (half, half, half, 8192 * 14336), flat, 48, 2, 1),
        Case("swiglu backward", swiglu._backward_kernel, (half,) * 5 + (8192 * 14336,), flat, 64, 3, 2),
        Case("cross_entropy statistics", loss._statistics_kernel, (half, long, single, 128256, 128256, 8192), wide, 64, 2, 0),
        Case(
            "cross_entropy gradient", loss._gradient_kernel, (half, long, single, single, single, 128256, 128256, 128256),
            wide, 64, 2, 2,
        ),
        Case("adamw", adamw._kernel, update(single), rounding(False), 64, 4, 3),
        Case("adamw, bfloat16 moments", adamw._kernel, update(half), rounding(True), 96, 3, 1),
        Case("grad_norm", total._kernel, (single, single, 2**24), dict(BLOCK=total._BLOCK, num_warps=8), 64, 4, 0),
        Case(
            "embedding forward", embedding._forward_kernel, (long, half, half, 128256, 4096),
            dict(BLOCK=embedding._BLOCK, num_warps=1), 64, 1, 1,
        ),
        Case(
            "embedding backward", embedding._backward_kernel, (half, long, long, half, 8192, 128256, 4096),
            dict(BLOCK=embedding._BLOCK, num_warps=1), 64, 1, 1,
        ),
        Case(
            "linear_lse", linear._lse_kernel, (half, half, long, single, 8192, 128256, 4096, 128256), linear.LSE, 255, 2, 0, True
        ),
        Case(
            "attention forward", flash._forward_kernel, (half, half, half, integer, half, single, *strides, *shape),
            dict(D=128) | flash.FORWARD, 255, 8, 8, True, flash.AMPERE,
        ),
        Case(
            "attention backward, queries", flash._queries_kernel,
            (half, half, half, integer, half, single, single, half, *strides, *shape), dict(D=128) | flash.QUERIES,
            255, 8, 8, True, flash.AMPERE,
        ),
        Case(
            "attention backward, keys", flash._keys_kernel,
            (half, half, half, integer, integer, half, single, single, half, half, *strides, 8192, *shape), dict(D=128) | flash.KEYS,
            255, 8, 8, True,
        ),
        Case(
            "attention backward, delta", flash._delta_kernel, (half, half, single, 8192, 32, 128), dict(D=128, M=32, num_warps=4),
            96, 8, 0,
        ),
    ]  # fmt: skip


def resources_of(case: Case, arch: int) -> Resources:
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.runtime import driver

    target: Any = _Driver(GPUTarget("cuda", arch, 32))  # Triton names a base class, and asks for these few methods
    driver.set_active(target)
    try:
        compiled = case.kernel.warmup(
            *case.arguments, grid=(1,), enable_fp_fusion=True, **case.options | (case.older if arch < 90 else {})
        )
        compiled = compiled.result() if hasattr(compiled, "result") else compiled
    finally:
        driver._active = None  # resetting it would look for a GPU
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as folder:
        binary, source = Path(folder) / "kernel.cubin", Path(folder) / "kernel.ptx"
        binary.write_bytes(compiled.asm["cubin"])
        source.write_text(compiled.asm["ptx"])

        def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
            return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)

        usage = run(tools / "cuobjdump", "-res-usage", binary).stdout
        code = run(tools / "nvdisasm", "-c", binary).stdout
        named = re.search(r"\.target\s+(sm_\w+)", compiled.asm["ptx"])
        assert named is not None, "the PTX names no architecture"
        verbose = run(get_ptxas(arch).path, "-v", f"--gpu-name={named[1]}", source, "-o", Path(folder) / "out").stderr
    used = dict(re.findall(r"(REG|SHARED):(\d+)", usage.split(f"Function {compiled.metadata.name}")[-1]))
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", verbose)
    assert spills is not None, f"ptxas says nothing of spills: {verbose}"

    def count(pattern: str) -> int:
        return len(re.findall(pattern, code))

    return Resources(
        int(used["REG"]),
        int(spills[1]) + int(spills[2]),
        compiled.metadata.shared,
        count(r"LDG(STS)?\.E\S*\.128"),
        count(r"STG\.E\S*\.128"),
        count(r"HGMMA"),
    )


def over_budget(case: Case, found: Resources, arch: int) -> list[str]:
    """What breaks the budget. Registers and vector widths are held on sm_90, spills and shared memory everywhere."""
    problems = []
    if found.spills:
        problems.append(f"spills {found.spills} bytes")
    if found.shared > SHARED[arch]:
        problems.append(f"{found.shared} bytes of shared memory, there are {SHARED[arch]}")
    if arch == 90:
        if found.registers > case.registers:
            problems.append(f"{found.registers} registers, budget {case.registers}")
        if found.loads < case.loads or found.stores < case.stores:
            problems.append(
                f"{found.loads} loads and {found.stores} stores of 128 bits, wanted {case.loads} and {case.stores}"
            )
        if case.multiplies and not found.products:
            problems.append("no HGMMA")
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[90], choices=sorted(SHARED))
    parser.add_argument("--write", metavar="README.md", help="put the table between its marks")
    options = parser.parse_args()
    if backend.INTERPRETED:
        sys.exit("TRITON_INTERPRET is set: the kernels are interpreted here, not compiled. Unset it.")
    lines = [
        "| kernel | architecture | warps | registers | spills, bytes | shared, bytes | 128-bit loads, stores | HGMMA | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    bad = False
    for arch in options.arch:
        for case in cases():
            found = resources_of(case, arch)
            problems = over_budget(case, found, arch)
            bad |= bool(problems)
            lines.append(
                f"| {case.name} | sm_{arch} | {case.options['num_warps']} | {found.registers} | {found.spills} | {found.shared} | "
                f"{found.loads}, {found.stores} | {found.products} | {'; '.join(problems) or 'ok'} |"
            )
    print(f"triton {triton.__version__}\n\n" + "\n".join(lines))
    if options.write:
        path = Path(options.write)
        before, rest = path.read_text().split(MARKS[0])
        table = (
            f"{MARKS[0]}\nWritten by the check with triton {triton.__version__}.\n\n"
            + "\n".join(lines)
            + f"\n{MARKS[1]}"
        )
        path.write_text(before + table + rest.split(MARKS[1])[1])
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
