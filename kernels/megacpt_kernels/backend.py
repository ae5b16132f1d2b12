"""Which implementation runs: Triton kernels on GPUs, torch everywhere. A backend that is named and cannot run is an error.

`TRITON_INTERPRET=1`, set before the first import, runs the kernels on a CPU; tests do that.
"""

import os
from types import SimpleNamespace

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton: torch
    triton, tl = None, SimpleNamespace(constexpr=None)

BACKENDS = ("auto", "triton", "torch")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def jit(function):
    """`triton.jit`, or the function itself where there is no Triton (it is then never called)."""
    return triton.jit(function) if triton else function


def use_triton(backend: str, x: Tensor) -> bool:
    """Whether Triton runs an operation on `x`.

    Raises:
        ValueError: for a backend that does not exist, or that is named and cannot run here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}: possible are {', '.join(BACKENDS)}.")
    reason = _missing(x)
    if backend == "triton" and reason:
        raise ValueError(f'backend "triton": {reason}. Use "torch" or "auto".')
    return backend == "triton" or (backend == "auto" and not reason and x.is_cuda)


def _missing(x: Tensor) -> str | None:
    if triton is None:
        return "triton is not installed"
    if x.element_size() == 8:
        return f"its kernels compute in float32, the input is {str(x.dtype).removeprefix('torch.')}"
    if not x.is_cuda and not INTERPRETED:
        return f"its kernels need a GPU, the input is on {x.device.type}"
    return None


def wide_of(x: Tensor) -> Tensor:
    """`x` in at least fp32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def block_of(size: int) -> int:
    """The power of two at or above a size."""
    return 1 << max(0, size - 1).bit_length()
