"""Head and loss in one: logits exist only for a chunk of tokens, on this rank's part of the vocabulary.

Shapes: t local tokens, T = t * ranks, h hidden, v vocabulary rows of this rank.

The loss is a sum of log-likelihoods with weights that are known beforehand, so each chunk's gradient is taken right after its forward
and the logits are never kept or computed twice: 6 T h v FLOPs instead of 8. Every loss on log-probabilities has such a gradient,
sum_t w_t grad nll_t with w_t = -dL/dlog p_t; what w_t depends on, `linear_lse` gives before, without a gradient. A chunk takes the same
tokens from every rank: while one is multiplied the next one's tokens are gathered, and its input gradients are summed over the ranks
while the weight's gradient is computed. `linear_lse` needs no gradient and on a GPU no logits either: they stay on the chip.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megacpt_kernels.backend import block_of, jit, operation, same_device, tl, triton, use_triton
from megacpt_kernels.cross_entropy import IGNORE, check_targets, check_weights, combined, cross_entropy_
from megacpt_kernels.device import profile_of
from megacpt_kernels.gemm import TORCH_GEMM, TorchGemm

LSE = dict(M=128, N=128, K=64, num_warps=8, num_stages=3)
"""Tile of `linear_lse`: tokens, vocabulary rows, hidden."""


@dataclass(frozen=True)
class Done:
    tensor: Tensor

    def wait(self) -> Tensor:
        return self.tensor


@dataclass(frozen=True)
class Ranks:
    """Those that share the vocabulary, and each of which holds a part of the tokens.

    Attributes:
        start_gather: [n, …] of each rank -> something whose `wait()` is [n * size, …], rank by rank.
        start_scatter_sum: [n * size, …] -> something whose `wait()` is this rank's [n, …] of the sum.
    """

    size: int = 1
    start_gather: Callable[[Tensor], Any] = Done
    start_scatter_sum: Callable[[Tensor], Any] = Done

    def gather_statistics(self, statistics: Tensor) -> Tensor:
        return self.start_gather(statistics.unsqueeze(0)).wait()


ALONE = Ranks()


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    vocab_start: int,
    valid: int,
    token_weights: Tensor,
    ranks: Ranks = ALONE,
    *,
    scale: float = 1.0,
    z_loss: float = 0.0,
    chunk_logits: int | None = None,
    backend: str = "auto",
    gemm: TorchGemm = TORCH_GEMM,
    check: bool = False,
) -> Tensor:
    """scale * sum_t token_weights[t] * (nll_t + z_loss * lse_t^2) over the labels, the same on all ranks. At least fp32.

    Args:
        x: [t, h]. weight: [v, h]. target: int64 [T], rank by rank, the same on all; -100 without label.
        vocab_start: id of row 0. valid: rows that are real.
        token_weights: float32 or float64 [T], in the order of `target`, the same on all ranks; of any sign, 0 for no loss and no
            gradient, not read where there is no label. They get no gradient.
        scale: what all weights share, as 1 / the step's total: it multiplies the sum, so that weights of 1 stay exact.
        chunk_logits: most logits of this rank at once; default 2^29 on a GPU, what stays in cache on a CPU.
        gemm: who multiplies.
    """
    _check(x, weight, target, ranks)
    check_weights(token_weights, target)
    return _LinearCrossEntropy.apply(
        x, weight, target, vocab_start, valid, token_weights, ranks, scale, z_loss, chunk_logits, backend, gemm, check
    )


@torch.no_grad()
def linear_lse(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    vocab_start: int,
    valid: int,
    ranks: Ranks = ALONE,
    *,
    backend: str = "auto",
    gemm: TorchGemm = TORCH_GEMM,
    check: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-sum-exp [T], the target's logit [T] or 0, the largest logit [T]), at least fp32, no gradient. Arguments as above."""
    _check(x, weight, target, ranks)
    tokens, column = ranks.start_gather(x).wait(), target - vocab_start
    if check:
        check_targets(target, column, valid, ranks.gather_statistics)
    if use_triton(backend, x) and gemm.is_plain:
        maximum, sums, hits = _launch_lse(tokens.contiguous(), weight.contiguous(), column, valid).unbind(1)
        largest = maximum.amax(0)
        own = torch.stack([largest, (sums * (maximum - largest).exp()).nan_to_num().sum(0), hits.sum(0)])
        whole = ranks.gather_statistics(own)
        return *combined(whole), whole[:, 0].amax(0)
    step, parts = _chunk(weight, None), []
    for part, ids in zip(tokens.split(step), target.split(step), strict=True):
        gathered: list[Tensor] = []

        def gather(own: Tensor, gathered: list[Tensor] = gathered) -> Tensor:
            gathered.append(ranks.gather_statistics(own))
            return gathered[0]

        cross_entropy_(gemm.forward(part, weight), ids, vocab_start, valid, None, gather, backend="torch")
        parts.append(torch.stack([*combined(gathered[0]), gathered[0][:, 0].amax(0)]))
    lse, hits, largest = torch.cat(parts, 1)
    return lse, hits, largest


def _check(x: Tensor, weight: Tensor, target: Tensor, ranks: Ranks) -> None:
    shapes = f"x {tuple(x.shape)} {x.dtype}, weight {tuple(weight.shape)} {weight.dtype}, target {tuple(target.shape)} {target.dtype}"
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or target.shape != (x.shape[0] * ranks.size,):
        raise ValueError(f"{shapes}, {ranks.size} ranks: they are [t, h], [v, h] and [t * ranks].")
    if x.dtype != weight.dtype or target.dtype != torch.int64:
        raise ValueError(f"{shapes}: x and weight have one type, targets are int64.")
    same_device(x=x, weight=weight, target=target)


def _chunk(weight: Tensor, chunk_logits: int | None) -> int:
    """Tokens of all ranks whose logits exist at once."""
    return max(64, (chunk_logits or 1 << (29 if weight.is_cuda else 21)) // weight.shape[0])


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, target: Tensor, vocab_start: int, valid: int, token_weights: Tensor, ranks: Ranks, scale: float,
        z_loss: float, chunk_logits: int | None, backend: str, gemm: TorchGemm, check: bool,
    ) -> Tensor:  # fmt: skip
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        weights = torch.where(target != IGNORE, token_weights.to(wide), 0.0).view(ranks.size, -1)
        wants_dx, wants_dweight = ctx.needs_input_grad[:2]
        loss, dx = torch.zeros((), dtype=wide, device=x.device), torch.empty_like(x) if wants_dx else None
        step = max(1, _chunk(weight, chunk_logits) // ranks.size)
        pieces, targets = x.split(step), target.view(ranks.size, -1).split(step, 1)
        one = len(pieces) == 1
        dweight = torch.zeros(weight.shape, dtype=wide, device=x.device) if wants_dweight and not one else None
        gathered, summed = ranks.start_gather(pieces[0]), None
        for i, (ids, given) in enumerate(zip(targets, weights.split(step, 1), strict=True)):
            ids, given = ids.flatten(), given.flatten()
            tokens = gathered.wait()
            if i + 1 < len(pieces):
                gathered = ranks.start_gather(pieces[i + 1])
            logits = gemm.forward(tokens, weight)
            nll, _ = cross_entropy_(
                logits, ids, vocab_start, valid, given * scale, ranks.gather_statistics, z_loss, backend, check
            )
            loss += torch.where(given != 0, given * nll, 0.0).sum()
            if dx is not None and summed is not None:
                dx[(i - 1) * step : i * step].copy_(summed.wait())
            if wants_dx:
                summed = ranks.start_scatter_sum(gemm.input_gradient(logits, weight))
            if wants_dweight and one:
                dweight = gemm.weight_gradient(logits, tokens, weight)
            elif dweight is not None:
                _add_weight_gradient_(dweight, logits, tokens, weight, gemm)
            del logits
        if dx is not None and summed is not None:
            dx[(len(pieces) - 1) * step :].copy_(summed.wait())
        ctx.save_for_backward(dx, None if dweight is None else dweight.to(weight.dtype))
        return loss * scale

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (grad,) = grads
        scaled = (None if saved is None else (saved * grad).to(saved.dtype) for saved in ctx.saved_tensors)
        return *scaled, *[None] * 11


def _add_weight_gradient_(total: Tensor, logits: Tensor, tokens: Tensor, weight: Tensor, gemm: TorchGemm) -> None:
    """total += logits^T tokens, in total's type; where that differs, by rows, so that the products take an eighth of the logits."""
    if total.dtype == logits.dtype:
        gemm.weight_gradient(logits, tokens, weight, total)
        return
    rows = max(1, logits.numel() // (8 * tokens.shape[1]))
    for some, columns, part in zip(total.split(rows), logits.split(rows, 1), weight.split(rows), strict=True):
        some += gemm.weight_gradient(columns, tokens, part)


@operation(
    "linear_lse(Tensor tokens, Tensor weight, Tensor column, int valid) -> Tensor",
    lambda tokens, weight, column, valid: tokens.new_empty(
        (_splits(tokens, valid), 3, tokens.shape[0]), dtype=torch.float32
    ),
)
def _launch_lse(tokens: Tensor, weight: Tensor, column: Tensor, valid: int) -> Tensor:
    """[splits of the vocabulary, 3, T]: maximum, sum of exponentials, target's logit."""
    (rows, hidden), splits = tokens.shape, _splits(tokens, valid)
    out = torch.empty(splits, 3, rows, dtype=torch.float32, device=tokens.device)
    if rows:
        how = LSE if tokens.element_size() == 2 else LSE | dict(M=32, N=32, K=32, num_stages=1)
        each = triton.cdiv(triton.cdiv(max(1, valid), how["N"]), splits) * how["N"]
        _lse_kernel[(triton.cdiv(rows, how["M"]), splits)](
            tokens, weight, column, out, rows, valid, hidden, each, enable_fp_fusion=True, **how
        )  # fmt: skip
    return out


def _splits(tokens: Tensor, valid: int) -> int:
    """Parts of the vocabulary, so that few tokens fill the device too."""
    programs = -(-max(1, tokens.shape[0]) // LSE["M"])
    wanted = -(-2 * profile_of(tokens.device).multiprocessors // programs) if tokens.is_cuda else 3
    return max(1, min(wanted, block_of(valid) // LSE["N"] + 1))


@jit
def _lse_kernel(
    tokens, weight, column, out, rows, valid, hidden, each,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    row = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    inside = row < rows
    wanted = tl.load(column + row, mask=inside, other=-1)
    maximum, total = tl.full((M,), float("-inf"), tl.float32), tl.zeros((M,), tl.float32)
    hit = tl.zeros((M,), tl.float32)
    for begin in range(split * each, tl.minimum(split * each + each, valid), N):
        entry = begin + tl.arange(0, N)
        logits = tl.zeros((M, N), tl.float32)
        for k in range(0, hidden, K):
            lane = k + tl.arange(0, K)
            left = inside[:, None] & (lane < hidden)[None, :]
            right = (entry < valid)[:, None] & (lane < hidden)[None, :]
            x = tl.load(tokens + row[:, None] * hidden + lane[None, :], mask=left, other=0.0)
            w = tl.load(weight + entry.to(tl.int64)[:, None] * hidden + lane[None, :], mask=right, other=0.0)
            logits = tl.dot(x, tl.trans(w), logits, input_precision="ieee")
        real = (entry < valid)[None, :]
        hit += tl.sum(tl.where((entry[None, :] == wanted[:, None]) & real, logits, 0.0), 1)
        logits = tl.where(real, logits, float("-inf"))
        larger = tl.maximum(maximum, tl.max(logits, 1))
        total = total * tl.exp(maximum - larger) + tl.sum(tl.exp(logits - larger[:, None]), 1)
        maximum = larger
    target = out + split * 3 * rows + row
    tl.store(target, maximum, mask=inside)
    tl.store(target + rows, total, mask=inside)
    tl.store(target + 2 * rows, hit, mask=inside)
