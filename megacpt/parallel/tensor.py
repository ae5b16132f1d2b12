"""Parallel layers with sequence parallelism (Shoeybi et al. 2019, arXiv 1909.08053; Korthikanti et al. 2022, 2205.05198).

Shapes: T tokens of the micro-batch on this cp rank, t = T / tp tokens of this tp rank, h hidden, f features of this tp
rank, v vocabulary rows of this tp rank.

Parameters are DTensors on the tp mesh. The Functions here take them whole, compute on the local tensor and return a
gradient with the parameter's spec: no DTensor dispatch in between. With one rank the collectives vanish.

Backward gathers again instead of saving, while it computes the input's gradient, and sums that over the ranks while it
computes the weights' gradients. With a `Later` the weights' gradients are left there to be computed (zero-bubble
pipelines): `drain` does it.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megacpt_kernels import embedding as rows_of
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from megacpt.family.base import Parameter
from megacpt.parallel.collectives import gather_tokens, scatter_sum_tokens, start_gather, start_scatter_sum
from megacpt.parallel.recompute import KEEP_ALL, Kept


class Weight(nn.Module):
    """A named place for a weight, and its bias where it has one, so that their full names are Hugging Face's. Has no forward: the
    functions below take the parameters.

    Attributes:
        rows: of the local tensors, those that this rank uses: all, or one head of a parameter that has fewer heads than there are ranks.
    """

    def __init__(
        self, weight: Parameter, bias: Parameter | None, vocab_multiple: int, mesh: DeviceMesh, dtype: torch.dtype
    ):
        super().__init__()
        self.rows = slice(None)
        if weight.repeated and weight.is_whole(mesh.size()):
            unit = mesh.get_local_rank() // (mesh.size() // weight.units) * weight.unit
            self.rows = slice(unit, unit + weight.unit)
        self.weight = _empty(weight, vocab_multiple, mesh, dtype)
        self.register_parameter("bias", None if bias is None else _empty(bias, vocab_multiple, mesh, dtype))


def _empty(parameter: Parameter, vocab_multiple: int, mesh: DeviceMesh, dtype: torch.dtype) -> nn.Parameter:
    """On the meta device, placed as the table says."""
    local, size = list(parameter.padded(vocab_multiple)), mesh.size()
    placement: Placement = Replicate()
    if not parameter.is_whole(size):
        placement = Shard(1 if parameter.split == "row" else 0)
        assert local[placement.dim] % size == 0, f"{parameter.name} {local} on {size} tp ranks"
        local[placement.dim] //= size
    empty = torch.empty(local, dtype=dtype, device="meta")
    return nn.Parameter(DTensor.from_local(empty, mesh, [placement], run_check=False))


@dataclass(frozen=True)
class TensorAxis:
    """The ranks that share matrices, and how forward hides its collectives.

    Attributes:
        overlap: none; chunked, a part of the tokens travels while another is multiplied; symmetric_memory, torch's fused
            products over NVLink.
        chunks: parts of `chunked`.
    """

    group: dist.ProcessGroup
    overlap: str = "none"
    chunks: int = 4


class Later:
    """Weights and what computes their gradients. (No list: FSDP would copy it on the way into a module.)"""

    def __init__(self) -> None:
        self.queue: list[tuple[DTensor, Callable[[], DTensor]]] = []


@torch.compiler.disable
def column_parallel(
    x: Tensor,
    weights: list[DTensor],
    axis: TensorAxis,
    rows: list[slice] | None = None,
    later: Later | None = None,
    between: tuple[int, Callable[..., None]] | None = None,
    biases: list[DTensor | None] | None = None,
    kept: Kept = KEEP_ALL,
) -> tuple[Tensor, ...]:
    """Gathers tokens once, multiplies by each weight in turn.

    Args:
        x: [t, h]. weights: each [f, h], this rank's rows.
        rows: of each weight's local tensor, those that this rank uses (key heads that tp replicates); default all.
        between: (n, function): is called with the first n products before the others are computed.
        biases: each [f], this rank's rows, or None. kept: of the block that this is in.
    Returns:
        [T, f] for each weight.
    """
    biases = biases or [None] * len(weights)
    return _Column.apply(axis, x, rows or [slice(None)] * len(weights), later, between, kept, *weights, *biases)


@torch.compiler.disable
def row_parallel(
    x: Tensor,
    weight: DTensor,
    axis: TensorAxis,
    later: Later | None = None,
    before: Callable[[], None] | None = None,
    kept: Kept = KEEP_ALL,
    last: bool = False,
) -> Tensor:
    """Multiplies, sums over ranks, keeps this rank's tokens.

    Args:
        x: [T, f]. weight: [h, f], this rank's columns.
        before: is called before the gradients are computed.
        kept: of the block that this is in. last: no gradient of the block needs the result, so its repetition leaves it out.
    Returns:
        [t, h].
    """
    return _Row.apply(axis, x, weight, later, before, kept, last)


@torch.no_grad()
def drain(later: Later) -> None:
    """Computes the gradients that were left for later and adds them to the weights'."""
    for weight, compute in later.queue:
        grad = compute()
        weight.grad = grad if weight.grad is None else weight.grad + grad
    later.queue.clear()


def embedding(ids: Tensor, weight: DTensor, group: dist.ProcessGroup, backend: str = "auto") -> Tensor:
    """Rows of a table whose vocabulary the ranks share.

    Args:
        ids: int64 [T], the same on all ranks of the group. weight: [v, h].
    Returns:
        [t, h].
    """
    rows = rows_of(ids, replicated(weight), group.rank() * weight._local_tensor.shape[0], backend=backend)
    return _ScatterSum.apply(rows, group)


@torch.compiler.disable
def replicated(weight: DTensor) -> Tensor:
    """The local tensor of a parameter. Where every tp rank holds it all, its gradient is partial: `sum_replicated_gradients`."""
    return _Local.apply(weight)


@functools.cache
def _fused(name: str) -> Callable:
    """An operation of torch's symmetric memory. torch 2.11 registers them with their module, which nothing else imports."""
    importlib.import_module("torch.distributed._symmetric_memory")
    return getattr(torch.ops.symm_mem, name)


def _products(
    x: Tensor, local: list[Tensor], biases: list[Tensor | None], axis: TensorAxis, between
) -> tuple[Tensor, ...]:
    """gather(x) times each matrix, plus its bias."""
    if axis.overlap == "symmetric_memory" and axis.group.size() > 1:
        fused = _fused("fused_all_gather_matmul")
        out = fused(x.contiguous(), [w.t() for w in local], 0, axis.group.group_name, return_A=False)[1]
        return tuple(y if bias is None else y + bias for y, bias in zip(out, biases, strict=True))
    if axis.overlap == "chunked" and axis.group.size() > 1:
        return _chunked_products(x, local, biases, axis)
    tokens, out = gather_tokens(x, axis.group), []
    for i, weight in enumerate(local):
        if between and i == between[0]:
            between[1](*out)
        out.append(F.linear(tokens, weight, biases[i]))
    return tuple(out)


def _chunked_products(
    x: Tensor, local: list[Tensor], biases: list[Tensor | None], axis: TensorAxis
) -> tuple[Tensor, ...]:
    size, parts = axis.group.size(), x.tensor_split(min(axis.chunks, x.shape[0]))
    pending = [start_gather(part, axis.group) for part in parts]
    out = [x.new_empty((size, x.shape[0], weight.shape[0])) for weight in local]
    begin = 0
    for part, gathered in zip(parts, pending, strict=True):
        tokens, end = gathered.wait(), begin + part.shape[0]
        for product, weight, bias in zip(out, local, biases, strict=True):
            product[:, begin:end] = F.linear(tokens, weight, bias).view(size, -1, weight.shape[0])
        begin = end
    return tuple(product.flatten(0, 1) for product in out)


def _summed_product(x: Tensor, weight: Tensor, axis: TensorAxis) -> Tensor:
    """This rank's tokens of the sum over ranks of x times a matrix."""
    if axis.overlap == "symmetric_memory" and axis.group.size() > 1:
        fused = _fused("fused_matmul_reduce_scatter")
        return fused(x.contiguous(), weight.t(), "sum", 0, axis.group.group_name)
    if axis.overlap == "chunked" and axis.group.size() > 1:
        by_rank = x.unflatten(0, (axis.group.size(), -1))
        parts = by_rank.tensor_split(min(axis.chunks, by_rank.shape[1]), dim=1)
        pending = [start_scatter_sum(F.linear(part.flatten(0, 1), weight), axis.group) for part in parts]
        return torch.cat([part.wait() for part in pending])
    return scatter_sum_tokens(F.linear(x, weight), axis.group)


class _Column(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, axis: TensorAxis, x: Tensor, rows: list[slice], later: Later | None, between, kept: Kept, *parameters
    ):
        weights, biases = parameters[: len(rows)], parameters[len(rows) :]
        local = [weight._local_tensor[part] for weight, part in zip(weights, rows, strict=True)]
        shifts = [None if bias is None else bias._local_tensor[part] for bias, part in zip(biases, rows, strict=True)]
        ctx.biases = [None if bias is None else (bias._spec, bias._local_tensor.shape) for bias in biases]
        ctx.group, ctx.rows, ctx.later, ctx.weights = axis.group, rows, later, weights if later is not None else None
        ctx.specs = [(weight._spec, weight._local_tensor.shape) for weight in weights]
        ctx.save_for_backward(x, *local)
        return kept.once(lambda: _products(x, local, shifts, axis, between))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, *local = ctx.saved_tensors
        gathered = start_gather(x, ctx.group) if ctx.later is None else None
        dx = grads[0] @ local[0]
        for grad, weight in zip(grads[1:], local[1:], strict=True):
            dx.addmm_(grad, weight)
        dx = start_scatter_sum(dx, ctx.group)
        shifts = zip(grads, ctx.rows, ctx.biases, strict=True)
        dbiases = [placed and _placed(grad.sum(0), part, placed) for grad, part, placed in shifts]
        if ctx.later is None:
            tokens = gathered.wait()
            dweights = [_weight_gradient(*each, tokens) for each in zip(grads, ctx.rows, ctx.specs, strict=True)]
            return None, dx.wait(), None, None, None, None, *dweights, *dbiases
        shared: list[Tensor] = []  # one gather for all weights, made by the first that asks

        def compute(grad: Tensor, part: slice, spec, last: bool, group=ctx.group) -> DTensor:
            if not shared:
                shared.append(gather_tokens(x, group))
            return _weight_gradient(grad, part, spec, shared.pop() if last else shared[0])

        for i, (weight, *each) in enumerate(zip(ctx.weights, grads, ctx.rows, ctx.specs, strict=True)):
            last = i == len(grads) - 1
            ctx.later.queue.append((weight, lambda each=each, last=last: compute(*each, last)))
        return None, dx.wait(), *[None] * (4 + len(grads)), *dbiases


def _weight_gradient(grad: Tensor, part: slice, spec, tokens: Tensor) -> DTensor:
    return _placed(grad.t() @ tokens, part, spec)


def _placed(gradient: Tensor, part: slice, spec) -> DTensor:
    """The gradient of the rows `part` as that of the parameter."""
    placed, shape = spec
    if gradient.shape != shape:  # rows of other ranks: their gradients come from there
        gradient, used = gradient.new_zeros(shape), gradient
        gradient[part] = used
    return DTensor(gradient, placed, requires_grad=False)


class _Row(torch.autograd.Function):
    @staticmethod
    def forward(ctx, axis: TensorAxis, x: Tensor, weight: DTensor, later: Later | None, before, kept: Kept, last: bool):
        local = weight._local_tensor
        ctx.group, ctx.spec, ctx.later, ctx.before = axis.group, weight._spec, later, before
        ctx.weight = weight if later is not None else None
        ctx.save_for_backward(x, local)
        if last and kept.again:
            return x.new_empty((x.shape[0] // axis.group.size(), local.shape[0]))
        compute = lambda: _summed_product(x, local, axis)
        return compute() if last else kept.once(compute)

    @staticmethod
    def backward(ctx, grad: Tensor):
        if ctx.before:
            ctx.before()
        x, weight = ctx.saved_tensors
        grad, spec = gather_tokens(grad, ctx.group), ctx.spec
        compute = lambda: DTensor(grad.t() @ x, spec, requires_grad=False)
        if ctx.later is None:
            return None, grad @ weight, compute(), *[None] * 4
        ctx.later.queue.append((ctx.weight, compute))
        return None, grad @ weight, *[None] * 5


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup):
        ctx.group = group
        out = scatter_sum_tokens(x, group)
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return gather_tokens(grad, ctx.group), None


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
