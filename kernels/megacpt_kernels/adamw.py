"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), the clip coefficient inside: one pass over weight, gradient and moments, 28 bytes
an element in fp32 (16 read, 12 written)."""

import torch
from torch import Tensor

from megacpt_kernels.backend import jit, tl, triton, use_triton

_BLOCK = 1024


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
    backend: str = "auto",
) -> None:
    """One update in place.

    Args:
        weights, grads, exp_avgs, exp_avg_sqs: of the same shapes, contiguous, fp32 or (torch) fp64.
        step: number of this update, from 1, for the bias correction.
        inverse_clip: scalar on the device by which gradients are divided, 1 / the clip coefficient. May change `grads` (torch).
    """
    if not weights:
        return
    if use_triton(backend, weights[0]):
        _triton(weights, grads, exp_avgs, exp_avg_sqs, lr, betas, eps, weight_decay, step, inverse_clip)
    else:
        _torch(weights, grads, exp_avgs, exp_avg_sqs, lr, betas, eps, weight_decay, step, inverse_clip)


def _torch(weights, grads, exp_avgs, exp_avg_sqs, lr, betas, eps, weight_decay, step, inverse_clip) -> None:
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
    )


def _triton(weights, grads, exp_avgs, exp_avg_sqs, lr, betas, eps, weight_decay, step, inverse_clip) -> None:
    scale = torch.ones((), device=weights[0].device) if inverse_clip is None else inverse_clip.float()
    for tensors in zip(weights, grads, exp_avgs, exp_avg_sqs, strict=True):
        for tensor in tensors:
            if not tensor.is_contiguous() or tensor.shape != tensors[0].shape:
                raise ValueError(
                    f"tensors of one weight differ or are not contiguous: {[tuple(t.shape) for t in tensors]}."
                )
        size = tensors[0].numel()
        if size:
            _kernel[(triton.cdiv(size, _BLOCK),)](
                *tensors, scale, size, betas[0], betas[1], 1 - betas[0], 1 - betas[1], lr / (1 - betas[0] ** step),
                (1 - betas[1] ** step) ** -0.5, eps, 1 - lr * weight_decay, BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip


@jit
def _kernel(
    weight, grad, exp_avg, exp_avg_sq, scale, size, beta1, beta2, rest1, rest2, rate, root, eps, keep, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) / tl.load(scale)
    m = tl.load(exp_avg + at, mask=inside, other=0.0).to(tl.float32) * beta1 + g * rest1
    v = tl.load(exp_avg_sq + at, mask=inside, other=0.0).to(tl.float32) * beta2 + g * g * rest2
    w = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) * keep
    w -= rate * m / (tl.sqrt(v) * root + eps)
    tl.store(weight + at, w.to(weight.dtype.element_ty), mask=inside)
    tl.store(exp_avg + at, m.to(exp_avg.dtype.element_ty), mask=inside)
    tl.store(exp_avg_sq + at, v.to(exp_avg_sq.dtype.element_ty), mask=inside)
