"""Parallel layers with sequence parallelism (Shoeybi et al. 2019, arXiv 1909.08053; Korthikanti et al. 2022, 2205.05198).

Shapes: T tokens of the micro-batch on this cp rank, t = T / tp tokens of this tp rank, h hidden, f features of this tp
rank, v vocabulary rows of this tp rank.

Parameters are DTensors on the tp mesh. The Functions here take them whole, compute on the local tensor and return a
gradient with the parameter's spec: no DTensor dispatch in between. With one rank the collectives vanish.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from megacpt.parallel.collectives import gather_tokens, scatter_sum_tokens

COLUMN, ROW, REPLICATED = Shard(0), Shard(1), Replicate()


class Weight(nn.Module):
    """A named place for one parameter, so that its full name is Hugging Face's. Has no forward: the functions below
    take the parameter."""

    def __init__(self, shape: tuple[int, ...], placement: Placement, tensor_mesh: DeviceMesh, dtype: torch.dtype):
        super().__init__()
        local = list(shape)
        if isinstance(placement, Shard):
            assert local[placement.dim] % tensor_mesh.size() == 0, f"{shape} on {tensor_mesh.size()} tp ranks"
            local[placement.dim] //= tensor_mesh.size()
        empty = torch.empty(local, dtype=dtype, device="meta")
        self.weight = nn.Parameter(DTensor.from_local(empty, tensor_mesh, [placement], run_check=False))


def column_parallel(
    x: Tensor, weights: list[DTensor], group: dist.ProcessGroup, rows: list[slice] | None = None
) -> tuple[Tensor, ...]:
    """Gathers tokens once, multiplies by each weight. Backward gathers again instead of saving.

    Args:
        x: [t, h]. weights: each [f, h], this rank's rows.
        rows: of each weight's local tensor, those that this rank uses (key heads that tp replicates); default all.
    Returns:
        [T, f] for each weight.
    """
    return _Column.apply(group, x, rows or [slice(None)] * len(weights), *weights)


def row_parallel(x: Tensor, weight: DTensor, group: dist.ProcessGroup) -> Tensor:
    """Multiplies, sums over ranks, keeps this rank's tokens.

    Args:
        x: [T, f]. weight: [h, f], this rank's columns.
    Returns:
        [t, h].
    """
    return _Row.apply(group, x, weight)


def embedding(ids: Tensor, weight: DTensor, group: dist.ProcessGroup) -> Tensor:
    """Rows of a table whose vocabulary the ranks share.

    Args:
        ids: int64 [T], the same on all ranks of the group. weight: [v, h].
    Returns:
        [t, h].
    """
    return _Embedding.apply(group, ids, weight)


def replicated(weight: DTensor) -> Tensor:
    """The local tensor of a parameter that every tp rank holds. Its gradient is partial: `sum_replicated_gradients`."""
    return _Local.apply(weight)


class _Column(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, x: Tensor, rows: list[slice], *weights: DTensor):
        local = [weight._local_tensor[part] for weight, part in zip(weights, rows, strict=True)]
        ctx.group, ctx.rows = group, rows
        ctx.specs = [(weight._spec, weight._local_tensor.shape) for weight in weights]
        ctx.save_for_backward(x, *local)
        tokens = gather_tokens(x, group)
        return tuple(F.linear(tokens, weight) for weight in local)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, *local = ctx.saved_tensors
        dx = grads[0] @ local[0]
        for grad, weight in zip(grads[1:], local[1:], strict=True):
            dx.addmm_(grad, weight)
        tokens = gather_tokens(x, ctx.group)
        dweights = []
        for grad, part, (spec, shape) in zip(grads, ctx.rows, ctx.specs, strict=True):
            dweight = grad.t() @ tokens
            if dweight.shape != shape:  # rows of other ranks: their gradients come from there
                dweight, used = tokens.new_zeros(shape), dweight
                dweight[part] = used
            dweights.append(DTensor(dweight, spec, requires_grad=False))
        return None, scatter_sum_tokens(dx, ctx.group), None, *dweights


class _Row(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, x: Tensor, weight: DTensor):
        ctx.group, ctx.spec = group, weight._spec
        ctx.save_for_backward(x, weight._local_tensor)
        return scatter_sum_tokens(F.linear(x, weight._local_tensor), group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad = gather_tokens(grad, ctx.group)
        return None, grad @ weight, DTensor(grad.t() @ x, ctx.spec, requires_grad=False)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, ids: Tensor, weight: DTensor):
        table = weight._local_tensor
        local = ids - group.rank() * table.shape[0]
        outside = (local < 0) | (local >= table.shape[0])
        ctx.group, ctx.spec, ctx.rows = group, weight._spec, table.shape[0]
        if group.size() > 1:
            local = local.masked_fill(outside, 0)
        ctx.save_for_backward(local, outside)
        rows = F.embedding(local, table)
        if group.size() > 1:
            rows.masked_fill_(outside.unsqueeze(1), 0)
        return scatter_sum_tokens(rows, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        local, outside = ctx.saved_tensors
        grad = gather_tokens(grad, ctx.group)
        if ctx.group.size() > 1:
            grad = grad.masked_fill(outside.unsqueeze(1), 0)
        wide = grad if grad.dtype in (torch.float32, torch.float64) else grad.float()
        dweight = torch.ops.aten.embedding_dense_backward(wide, local, ctx.rows, -1, False).to(grad.dtype)
        return None, None, DTensor(dweight, ctx.spec, requires_grad=False)


class _Local(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: DTensor):
        ctx.spec = weight._spec
        return weight._local_tensor.view_as(weight._local_tensor)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return DTensor(grad.contiguous(), ctx.spec, requires_grad=False)


def sum_replicated_gradients(parameters: list[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Sums over tp the gradients of parameters that tp replicates: after FSDP's reduction, once a step, in one bucket."""
    if group.size() == 1:
        return
    grads = [p.grad._local_tensor for p in parameters if p.grad is not None and p.placements[-1].is_replicate()]
    if grads:
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat, group=group)
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))
