"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), the clip coefficient inside: one pass over weight, gradient and moments, 28 bytes
an element in fp32 (16 read, 12 written).

Weights and moments may be bfloat16. They are then rounded stochastically, up with the probability of the distance from below, because
rounding to nearest loses updates below half a unit in the last place. The random bits of an element depend on the seed, the update, the
name of the tensor and the element's index in the whole tensor: any sharding gives the same bits. They come from three rounds of the integer
hash lowbias32 (Chris Wellons, "Prospecting for Hash Functions", 2018, public domain).
"""

# torch names its updates of lists of tensors as private, and has no others:
# pyright: reportPrivateImportUsage=false

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megacpt_kernels.backend import find_apex, jit, operation, tl, triton, use_triton

_BLOCK = 1024
_WORD = 2**32 - 1


@dataclass(frozen=True)
class ShardPosition:
    """Which part of a tensor a local one is: rows of a rectangle of it, flattened.

    Attributes:
        start: index of the first element in the whole tensor. columns: of the local tensor. stride: columns of the whole tensor.
        key: of the tensor's name, 32 bits.
    """

    start: int = 0
    columns: int = 1
    stride: int = 1
    key: int = 0


@torch.no_grad()
def adamw_(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    inverse_clip: Tensor | None = None,
    places: Sequence[ShardPosition] | None = None,
    seed: int = 0,
    backend: str = "auto",
) -> None:
    """One update in place.

    Args:
        weights, grads, exp_avgs, exp_avg_sqs: of the same shapes, contiguous; fp32, (torch) fp64, or weights and moments bfloat16.
        step: number of this update, from 1, for the bias correction.
        inverse_clip: scalar on the device by which gradients are divided, 1 / the clip coefficient. May change `grads`. If it is not
            finite, weights and moments stay as they are, to the bit, whatever the gradients hold; the host does not wait to know.
        places, seed: for stochastic rounding; default: every tensor is whole.
        backend: auto, triton, torch, or apex (NVIDIA's fused Adam; fp32).
    """
    if not weights:
        return
    _check(weights, grads, exp_avgs, exp_avg_sqs)
    rounded = torch.bfloat16 in {tensor.dtype for tensor in (*weights, *exp_avgs, *exp_avg_sqs)}
    settings = (lr, betas, eps, weight_decay, step, inverse_clip)
    if backend == "apex":
        if rounded:
            raise ValueError('backend "apex": does not round stochastically; bfloat16 states need "triton" or "torch".')
        _apex(weights, grads, exp_avgs, exp_avg_sqs, *settings)
    elif use_triton(backend, weights[0]) or rounded:
        fast = use_triton(backend, weights[0])
        scale = torch.ones((), device=weights[0].device) if inverse_clip is None else inverse_clip.float()
        numbers = (*betas, 1 - betas[0], 1 - betas[1], lr / (1 - betas[0] ** step), (1 - betas[1] ** step) ** -0.5)
        places = places or [ShardPosition()] * len(weights)
        update: Callable[..., None] = _launch if fast else _rounded
        for *tensors, place in zip(weights, grads, exp_avgs, exp_avg_sqs, places, strict=True):
            where = (place.start, place.columns, place.stride, _keys(seed, step, place.key))
            update(*tensors, scale, *numbers, eps, 1 - lr * weight_decay, *where)
    else:
        _torch(weights, grads, exp_avgs, exp_avg_sqs, *settings)


def _check(*lists: list[Tensor]) -> None:
    for i, tensors in enumerate(zip(*lists, strict=True)):
        weight, *_ = tensors
        if any(not x.is_contiguous() or x.shape != weight.shape or x.device != weight.device for x in tensors):
            raise ValueError(
                f"tensor {i}: weight, gradient and moments must be contiguous, of one shape, on one device; they are "
                + ", ".join(f"{tuple(x.shape)} with strides {x.stride()} on {x.device}" for x in tensors)
                + "."
            )


def _torch(weights, grads, exp_avgs, exp_avg_sqs, lr, betas, eps, weight_decay, step, inverse_clip) -> None:
    skip = None if inverse_clip is None else (~inverse_clip.isfinite()).float()
    if inverse_clip is not None and weights[0].dtype == torch.float64:  # the fused kernel reads its scale in fp32
        torch._foreach_div_(grads, inverse_clip)
        inverse_clip = None
    count = torch.full((), float(step), dtype=torch.float32, device=weights[0].device)
    torch._fused_adamw_(
        weights,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        [count] * len(weights),
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=None if inverse_clip is None else inverse_clip.float(),
        found_inf=skip,
    )


def _apex(weights, grads, exp_avgs, exp_avg_sqs, lr, betas, eps, weight_decay, step, inverse_clip) -> None:
    module = find_apex(weights[0].device.type)
    if inverse_clip is not None:
        if not inverse_clip.isfinite():  # its plain Adam lets numbers pass that are none: the host has to know
            return
        torch._foreach_div_(grads, inverse_clip.to(grads[0].dtype))
    overflow = torch.zeros(1, dtype=torch.int32, device=weights[0].device)
    adamw, correct_bias = 1, 1
    lists = [grads, weights, exp_avgs, exp_avg_sqs]
    module.multi_tensor_adam(65536, overflow, lists, lr, *betas, eps, step, adamw, correct_bias, weight_decay)


def _mixed(x: int) -> int:
    """lowbias32."""
    x = ((x ^ x >> 16) * 0x7FEB352D) & _WORD
    x = ((x ^ x >> 15) * 0x846CA68B) & _WORD
    return x ^ x >> 16


def _keys(seed: int, step: int, name: int) -> int:
    return _mixed(_mixed(_mixed(seed & _WORD) ^ step & _WORD) ^ name & _WORD)


def _rounded(
    weight,
    grad,
    exp_avg,
    exp_avg_sq,
    scale,
    beta1,
    beta2,
    one_minus_beta1,
    one_minus_beta2,
    step_size,
    inv_sqrt_correction,
    eps,
    decay_factor,
    start,
    columns,
    stride,
    key,
) -> None:
    """As the kernel, in torch."""
    g = grad.float() / scale
    m = exp_avg.float() * beta1 + g * one_minus_beta1
    v = exp_avg_sq.float() * beta2 + g * g * one_minus_beta2
    w = weight.float() * decay_factor - step_size * m / (v.sqrt() * inv_sqrt_correction + eps)
    local = torch.arange(weight.numel(), device=weight.device).view(weight.shape)
    index = start + local // columns * stride + local % columns
    for salt, (tensor, value) in enumerate(((weight, w), (exp_avg, m), (exp_avg_sq, v)), 1):
        new = _round_torch(value, index, key, salt) if tensor.dtype == torch.bfloat16 else value
        tensor.copy_(torch.where(scale.isfinite(), new.to(tensor.dtype), tensor))


def _round_torch(x: Tensor, index: Tensor, key: int, salt: int) -> Tensor:
    def mix(y: Tensor) -> Tensor:
        return _xor_shift(_xor_shift(_xor_shift(y, 16) * 0x7FEB352D & _WORD, 15) * 0x846CA68B & _WORD, 16)

    noise = mix(mix(mix(index & _WORD ^ key) ^ index >> 32) ^ salt) & 0xFFFF
    bits = x.contiguous().view(torch.int32)
    up = ((bits + noise.int()) & -65536).view(torch.float32)
    return torch.where(x.isfinite(), up, x)


def _xor_shift(x: Tensor, by: int) -> Tensor:
    return x ^ x >> by


@operation(
    "adamw_(Tensor(a!) weight, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor scale, float beta1, float beta2, "
    "float one_minus_beta1, float one_minus_beta2, float step_size, float inv_sqrt_correction, float eps, float decay_factor, "
    "int start, int columns, int stride, int key) -> ()",
    lambda *arguments: None,
)
def _launch(
    weight, grad, exp_avg, exp_avg_sq, scale, beta1, beta2, one_minus_beta1, one_minus_beta2, step_size, inv_sqrt_correction,
    eps, decay_factor, start, columns, stride, key,
) -> None:  # fmt: skip
    size = weight.numel()
    if size:
        rounded_weight, rounded_avg, rounded_sq = (x.dtype == torch.bfloat16 for x in (weight, exp_avg, exp_avg_sq))
        _kernel[(triton.cdiv(size, _BLOCK),)](
            weight, grad, exp_avg, exp_avg_sq, scale, size, beta1, beta2, one_minus_beta1, one_minus_beta2, step_size,
            inv_sqrt_correction, eps, decay_factor, start, columns, stride, key - 2**32 if key >= 2**31 else key,
            ROUND_WEIGHT=rounded_weight, ROUND_AVG=rounded_avg, ROUND_SQ=rounded_sq,
            BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


@jit
def _kernel(
    weight, grad, exp_avg, exp_avg_sq, scale, size, beta1, beta2, one_minus_beta1, one_minus_beta2, step_size, inv_sqrt_correction,
    eps, decay_factor, start, columns, stride, key,
    ROUND_WEIGHT: tl.constexpr, ROUND_AVG: tl.constexpr, ROUND_SQ: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    divisor = tl.load(scale)
    if divisor < float("inf"):  # neither for nan: then nothing is read or written
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) / divisor
        m = tl.load(exp_avg + at, mask=inside, other=0.0).to(tl.float32) * beta1 + g * one_minus_beta1
        v = tl.load(exp_avg_sq + at, mask=inside, other=0.0).to(tl.float32) * beta2 + g * g * one_minus_beta2
        w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) * decay_factor
        w -= step_size * m / (tl.sqrt(v) * inv_sqrt_correction + eps)
        if ROUND_WEIGHT or ROUND_AVG or ROUND_SQ:
            begin = tl.program_id(0).to(tl.int64) * BLOCK
            lane = (begin % columns).to(tl.int32) + tl.arange(0, BLOCK)  # division by element in 32 bits
            index = start + (begin // columns + lane // columns) * stride + lane % columns
            low = index.to(tl.uint32)
            noise = _mix(_mix(low ^ key.to(tl.uint32)) ^ (index >> 32).to(tl.uint32))
            if ROUND_WEIGHT:
                w = _rounded_up(w, noise, 1)
            if ROUND_AVG:
                m = _rounded_up(m, noise, 2)
            if ROUND_SQ:
                v = _rounded_up(v, noise, 3)
        tl.store(weight + at, w.to(weight.dtype.element_ty), mask=inside)
        tl.store(exp_avg + at, m.to(exp_avg.dtype.element_ty), mask=inside)
        tl.store(exp_avg_sq + at, v.to(exp_avg_sq.dtype.element_ty), mask=inside)


@jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@jit
def _rounded_up(x, noise, SALT: tl.constexpr):
    """x plus random bits below bfloat16's last, cut: a value that bfloat16 holds exactly."""
    bits = x.to(tl.uint32, bitcast=True)
    up = (bits + (_mix(noise ^ SALT) & 0xFFFF)) & 0xFFFF0000
    return tl.where((bits & 0x7F800000) == 0x7F800000, x, up.to(tl.float32, bitcast=True))
