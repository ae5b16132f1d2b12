"""Head and loss in one: logits exist only for a chunk of tokens, on this rank's part of the vocabulary.

Shapes: t local tokens, T = t * tp, h hidden, v vocabulary rows of this tp rank, c tokens of a chunk.

The loss is a sum times a scale that is known beforehand (1 / the step's global count of labels), so each chunk's
gradient is taken right after its forward and the logits are never kept or computed twice.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megacpt_kernels import cross_entropy_
from torch import Tensor
from torch.distributed.tensor import DTensor

from megacpt.parallel.collectives import gather_tokens, scatter_sum_tokens


def linear_cross_entropy(
    x: Tensor,
    weight: DTensor,
    target: Tensor,
    vocab_size: int,
    group: dist.ProcessGroup,
    scale: float,
    backend: str = "auto",
) -> Tensor:
    """scale * sum of the negative log-likelihoods of this rank's T tokens. At least fp32.

    Args:
        x: [t, h], the final norm's output. weight: [v, h], this rank's rows of the head.
        target: int64 [T], -100 without label. vocab_size: the true size; padding rows get no probability.
    """
    return _LinearCrossEntropy.apply(x, weight, target, vocab_size, group, scale, backend)


@torch.no_grad()
def token_losses(
    x: Tensor, weight: DTensor, target: Tensor, vocab_size: int, group: dist.ProcessGroup, backend: str = "auto"
) -> Tensor:
    """Negative log-likelihood of each token [T], 0 without label. At least fp32. No gradient."""
    tokens, local = gather_tokens(x, group), weight._local_tensor
    start, valid = _columns(local, vocab_size, group)
    losses = [
        cross_entropy_(F.linear(part, local), ids, start, valid, None, _gather(group), backend=backend)[0]
        for part, ids in zip(tokens.split(_chunk(local)), target.split(_chunk(local)), strict=True)
    ]
    return torch.cat(losses)


def _gather(group: dist.ProcessGroup):
    """[3, t] -> [tp, 3, t]: the statistics of a chunk from all ranks in one collective."""
    return lambda statistics: gather_tokens(statistics[None], group)


def _columns(weight: Tensor, vocab_size: int, group: dist.ProcessGroup) -> tuple[int, int]:
    """(first id, number of real rows) of this rank's part of the vocabulary."""
    start = group.rank() * weight.shape[0]
    return start, max(0, min(weight.shape[0], vocab_size - start))


def _chunk(weight: Tensor) -> int:
    """Tokens whose logits exist at once: 2^27 logits on a GPU, what stays in cache on a CPU."""
    return max(64, (1 << (27 if weight.is_cuda else 21)) // weight.shape[0])


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weight: DTensor, target: Tensor, vocab_size: int, group, scale: float, backend: str
    ) -> Tensor:
        local = weight._local_tensor
        tokens = gather_tokens(x, group)
        start, valid = _columns(local, vocab_size, group)
        chunk = _chunk(local)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=wide, device=x.device)
        dx = torch.empty_like(tokens)
        one = len(tokens) <= chunk
        dweight = None if one else torch.zeros(local.shape, dtype=wide, device=x.device)
        for part, ids, dpart in zip(tokens.split(chunk), target.split(chunk), dx.split(chunk), strict=True):
            logits = F.linear(part, local)
            nll, _ = cross_entropy_(logits, ids, start, valid, scale, _gather(group), backend=backend)
            loss += nll.sum()
            torch.mm(logits, local, out=dpart)
            if one:
                dweight = logits.t() @ part
            elif dweight.dtype == logits.dtype:
                dweight.addmm_(logits.t(), part)
            else:
                dweight += logits.t() @ part
        ctx.group, ctx.spec = group, weight._spec
        ctx.save_for_backward(scatter_sum_tokens(dx, group), dweight.to(local.dtype))
        return loss * scale

    @staticmethod
    def backward(ctx, grad: Tensor):
        dx, dweight = ctx.saved_tensors
        return (
            (dx * grad).to(dx.dtype),
            DTensor(dweight * grad.to(dweight.dtype), ctx.spec, requires_grad=False),
            *[None] * 5,
        )
