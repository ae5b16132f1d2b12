"""Which implementation runs: Triton kernels on GPUs, torch everywhere. A backend that is named and cannot run is an error.

`TRITON_INTERPRET=1`, set before the first import, runs the kernels on a CPU; tests do that.
"""

import functools
import importlib.util
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton: torch
    triton, tl = None, SimpleNamespace(constexpr=None)

BACKENDS = ("auto", "triton", "torch")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def jit(function: Callable) -> Any:
    """`triton.jit`, or the function itself where there is no Triton (it is then never called). Any: a kernel is called as `kernel[grid](…)`
    with tensors for its pointers and plain numbers for its constexprs, which no annotation of Triton's describes."""
    return triton.jit(function) if triton else function


_library = torch.library.Library("megacpt_kernels", "FRAGMENT")


def operation(schema: str, fake: Callable):
    """Makes a launcher of kernels an operation of torch, `torch.ops.megacpt_kernels.NAME`: FakeTensorMode runs `fake`, which only makes
    empty results, and torch.compile takes it as one node."""

    def register(function: Callable) -> Callable:
        name = schema.split("(")[0]
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        for device in ("CPU", "CUDA"):
            _library.impl(name, function, device)
        torch.library.register_fake(f"megacpt_kernels::{name}", fake, lib=_library)
        return getattr(torch.ops.megacpt_kernels, name).default

    return register


def use_triton(backend: str, x: Tensor) -> bool:
    """Whether Triton runs an operation on `x`.

    Raises:
        ValueError: for a backend that does not exist, or that is named and cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}: possible are {', '.join(BACKENDS)}.")
    if backend == "torch":
        return False
    reason = missing_triton(x.device.type, x.dtype)
    if backend == "triton" and reason:
        raise ValueError(f'backend "triton": {reason}. Use "torch" or "auto".')
    return not reason and (backend == "triton" or x.is_cuda)


def missing_triton(device_type: str, dtype: torch.dtype) -> str:
    """Why Triton's kernels cannot run, '' if they can."""
    if triton is None:
        return "triton is not installed"
    if dtype.itemsize == 8:
        return f"its kernels compute in float32, the input is {str(dtype).removeprefix('torch.')}"
    if device_type != "cuda" and not INTERPRETED:
        return f"its kernels need a GPU, the input is on {device_type}"
    return ""


@functools.cache
def find_apex(device_type: str):
    """NVIDIA apex's kernels, by the name that only it has (`apex` on PyPI is a web toolkit).

    Raises:
        ValueError: where it is not installed or there is no GPU.
    """
    if importlib.util.find_spec("amp_C") is None:
        raise ValueError(
            'backend "apex": NVIDIA apex is not installed (no module amp_C). Build it from its repository, or use "auto".'
        )
    if device_type != "cuda":
        raise ValueError(f'backend "apex": needs a GPU, the tensors are on {device_type}. Use "torch" or "auto".')
    return importlib.import_module("amp_C")


def same_device(**tensors: Tensor) -> None:
    """Raises ValueError if the tensors stand on different devices."""
    if len({x.device for x in tensors.values()}) > 1:
        raise ValueError("devices differ: " + ", ".join(f"{name} on {x.device}" for name, x in tensors.items()) + ".")


def wide_of(x: Tensor) -> Tensor:
    """`x` in at least fp32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def block_of(size: int) -> int:
    """The power of two at or above a size."""
    return 1 << max(0, size - 1).bit_length()
