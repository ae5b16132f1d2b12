"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467): y = x / sqrt(mean(x^2) + eps) * weight, in at least fp32; alone, or of a
sum with the residual, which is then returned too.

Saves what is normed and one number a row; backward is written out, so that nothing else is kept. The weight's gradient is summed in
two stages of fixed order, without atomics: the same bits twice.
"""

import torch
from torch import Tensor

from megacpt_kernels.backend import block_of, jit, operation, same_device, tl, use_triton, wide_of
from megacpt_kernels.device import profile_of


def rms_norm(x: Tensor, weight: Tensor, eps: float, backend: str = "auto") -> Tensor:
    """Args:
        x: [t, h].
        weight: [h].
    Returns:
        [t, h] in x's type, rounded once.
    """
    _check(x, weight)
    return _RMSNorm.apply(x, weight, eps, use_triton(backend, x))


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Args:
        x, residual: [t, h].
        weight: [h].
    Returns:
        (y, h): h = x + residual in x's type, and its norm times the weight.
    """
    _check(x, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(f"residual is {tuple(residual.shape)} {residual.dtype}, x is {tuple(x.shape)} {x.dtype}.")
    same_device(x=x, residual=residual)
    return _AddRMSNorm.apply(x, residual, weight, eps, use_triton(backend, x))


def _check(x: Tensor, weight: Tensor) -> None:
    if x.ndim != 2 or weight.shape != x.shape[1:]:
        raise ValueError(f"x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}; they are [t, h] and [h].")
    same_device(x=x, weight=weight)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, fast: bool) -> Tensor:
        y, _, inverse = (_forward_triton if fast else _forward)(x, None, weight, eps)
        ctx.fast = fast
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (dy,) = grads
        dx, dweight = (_backward_triton if ctx.fast else _backward)(dy, None, *ctx.saved_tensors)
        return dx, dweight, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, residual: Tensor, weight: Tensor, eps: float, fast: bool):
        y, h, inverse = (_forward_triton if fast else _forward)(x, residual, weight, eps)
        ctx.fast = fast
        ctx.save_for_backward(h, weight, inverse)
        return y, h

    @staticmethod
    def backward(ctx, *grads: Tensor):
        dy, dh = grads
        dx, dweight = (_backward_triton if ctx.fast else _backward)(dy, dh, *ctx.saved_tensors)
        return dx, dx, dweight, None, None


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(y, what was normed, 1 / root mean square [t])."""
    h = x if residual is None else x + residual
    wide = wide_of(h)
    inverse = torch.rsqrt(wide.square().mean(-1).add_(eps))
    return (wide * inverse.unsqueeze(1)).mul_(weight).to(x.dtype), h, inverse


def _backward(dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    inverse = inverse.unsqueeze(1)
    normed, dy_wide = wide_of(h) * inverse, wide_of(dy)
    dweight = (dy_wide * normed).sum(0)
    dnormed = dy_wide * weight
    dx = dnormed.addcmul_(normed, (dnormed * normed).mean(-1, keepdim=True), value=-1).mul_(inverse)
    if dh is not None:
        dx = dx + dh
    return dx.to(h.dtype), dweight.to(weight.dtype)


def _forward_triton(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    y, h, inverse = _launch_forward(x, residual, weight, eps)
    return y, x if residual is None else h, inverse


@operation(
    "rms_norm_forward(Tensor x, Tensor? residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    lambda x, residual, weight, eps: (
        torch.empty_like(x),
        x.new_empty(0 if residual is None else x.shape),
        x.new_empty(x.shape[0], dtype=torch.float32),
    ),
)
def _launch_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    y, inverse = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
    h = x.new_empty(0) if residual is None else torch.empty_like(x)
    if rows:
        block = block_of(columns)
        _forward_kernel[(rows,)](
            x, residual, weight, y, h, inverse, columns, eps,
            ADD=residual is not None, BLOCK=block, num_warps=_warps(block), enable_fp_fusion=True,
        )  # fmt: skip
    return y, h, inverse


def _backward_triton(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    dx, partial = _launch_backward(dy.contiguous(), None if dh is None else dh.contiguous(), h, weight, inverse)
    return dx, partial.sum(0).to(weight.dtype)


@operation(
    "rms_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor weight, Tensor inverse) -> (Tensor, Tensor)",
    lambda dy, dh, h, weight, inverse: (
        torch.empty_like(h),
        h.new_empty((_programs(h), h.shape[1]), dtype=torch.float32),
    ),
)
def _launch_backward(
    dy: Tensor, dh: Tensor | None, h: Tensor, weight: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """dx, and the weight's gradient in one part a program."""
    rows, columns = h.shape
    dx, programs = torch.empty_like(h), _programs(h)
    partial = torch.empty(programs, columns, dtype=torch.float32, device=h.device)
    block = block_of(columns)
    _backward_kernel[(programs,)](
        dy, dh, h, weight, inverse, dx, partial, rows, columns,
        ADD=dh is not None, BLOCK=block, num_warps=_warps(block), enable_fp_fusion=True,
    )  # fmt: skip
    return dx, partial


def _warps(block: int) -> int:
    return 4 if block <= 2048 else 8 if block <= 8192 else 16


def _programs(x: Tensor) -> int:
    """Programs of backward, each of which sums the weight's gradient over some rows: two a multiprocessor."""
    return 2 * profile_of(x.device).multiprocessors if x.is_cuda else 4


@jit
def _forward_kernel(
    x, residual, weight, y, h, inverse, columns, eps, ADD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    value = tl.load(x + row * columns + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        value += tl.load(residual + row * columns + at, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(h.dtype.element_ty)
        tl.store(h + row * columns + at, rounded, mask=inside)
        value = rounded.to(tl.float32)  # the norm is of what is kept
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / columns + eps)
    tl.store(inverse + row, scale)
    gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * columns + at, (value * scale * gain).to(y.dtype.element_ty), mask=inside)


@jit
def _backward_kernel(
    dy, dh, h, weight, inverse, dx, partial, rows, columns, ADD: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    at = tl.arange(0, BLOCK)
    inside = at < columns
    gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, tl.cdiv(tl.maximum(rows - program, 0), programs)):
        row = program.to(tl.int64) + i * programs
        start = row * columns
        scale = tl.load(inverse + row)
        normed = tl.load(h + start + at, mask=inside, other=0.0).to(tl.float32) * scale
        grad = tl.load(dy + start + at, mask=inside, other=0.0).to(tl.float32)
        total += grad * normed
        grad = grad * gain
        grad = (grad - normed * (tl.sum(grad * normed, 0) / columns)) * scale
        if ADD:
            grad += tl.load(dh + start + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + start + at, grad.to(dx.dtype.element_ty), mask=inside)
    tl.store(partial + program.to(tl.int64) * columns + at, total, mask=inside)
