"""The global gradient norm: fp32 squares summed by blocks of fixed size, the blocks in float64 in one order, so that ranks with the
same shards find the same bits, whatever the layout around them."""

# torch names its updates of lists of tensors as private, and has no others:
# pyright: reportPrivateImportUsage=false

from collections.abc import Callable

import torch
from torch import Tensor

from megacpt_kernels.backend import jit, operation, tl, triton, use_triton

_BLOCK = 8192


@torch.no_grad()
def grad_norm(
    grads: list[Tensor],
    weights: list[float] | None = None,
    reduce: Callable[[Tensor], object] = lambda total: None,
    device: torch.device | str = "cpu",
    backend: str = "auto",
) -> Tensor:
    """Norm over all tensors of all ranks, a float64 scalar on the device. No host sync.

    Args:
        grads: contiguous, of any shapes. weights: by which each tensor's squares count (1 / its copies); default 1.
        reduce: sums the float64 scalar over the ranks in place. device: of the result, where there is no tensor.
    """
    total = torch.zeros((), dtype=torch.float64, device=grads[0].device if grads else device)
    by_weight: dict[float, list[Tensor]] = {}
    for grad, weight in zip(grads, weights or [1.0] * len(grads), strict=True):
        if not grad.is_contiguous():
            raise ValueError(
                f"a gradient of shape {tuple(grad.shape)} has strides {grad.stride()}; it must be contiguous."
            )
        if grad.numel():
            by_weight.setdefault(weight, []).append(grad)
    for weight, some in sorted(by_weight.items()):
        if use_triton(backend, some[0]):
            squares = torch.cat([_launch(grad) for grad in some]).double()
        else:
            squares = torch.stack(torch._foreach_norm(some)).double().square()
        total += squares.sum() * weight
    reduce(total)
    return total.sqrt()


@operation(
    "sums_of_squares(Tensor grad) -> Tensor",
    lambda grad: grad.new_empty(-(-grad.numel() // _BLOCK), dtype=torch.float32),
)
def _launch(grad: Tensor) -> Tensor:
    out = torch.empty(triton.cdiv(grad.numel(), _BLOCK), dtype=torch.float32, device=grad.device)
    _kernel[(len(out),)](grad, out, grad.numel(), BLOCK=_BLOCK, num_warps=8, enable_fp_fusion=True)
    return out


@jit
def _kernel(grad, out, size, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(grad + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(out + block, tl.sum(x * x, 0))
