"""Parallel layers with sequence parallelism (Shoeybi et al. 2019, arXiv 1909.08053; Korthikanti et al. 2022, 2205.05198).

Shapes: T tokens of the micro-batch on this cp rank, t = T / tp tokens of this tp rank, h hidden, f features of this tp
rank, v vocabulary rows of this tp rank.

Parameters are DTensors on the tp mesh. The Functions here take them whole, compute on the local tensor and return a
gradient with the parameter's spec: no DTensor dispatch in between. With one rank the collectives vanish.

Backward gathers again instead of saving, while it computes the input's gradient, and sums that over the ranks while it
computes the weights' gradients. With a `DeferredWeightGrads` the weights' gradients are left there to be computed (zero-bubble
pipelines): `compute_deferred` does it. What needs no gradient gets none, and nothing is kept or gathered for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from megacpt_kernels import embedding as rows_of
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from megacpt.family.base import Parameter
from megacpt.parallel.collectives import gather_tokens, scatter_sum_tokens, start_gather, start_scatter_sum
from megacpt.parallel.gemm import PLAIN, Gemm, Operand
from megacpt.parallel.recompute import KEEP_ALL, Kept
from megacpt.parallel.sharded import Placing, is_replicated, local_part, placing_of

P = ParamSpec("P")
R = TypeVar("R")


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.compiler.disable`, whose annotation loses what the function takes and returns."""
    return cast(Callable[P, R], torch.compiler.disable(function))


class NamedParameter(nn.Module):
    """A named place for a weight, and its bias where it has one, so that their full names are Hugging Face's. Has no forward: the
    functions below take it, or its parameters.

    Attributes:
        name: of the place in the model.
        rows: of the local tensors, those that this rank uses: all, or one head of a parameter that has fewer heads than there are ranks.
    """

    weight: DTensor
    bias: DTensor | None

    def __init__(
        self,
        weight: Parameter,
        bias: Parameter | None,
        vocab_multiple: int,
        mesh: DeviceMesh,
        dtype_of: Callable[[str], torch.dtype],
    ):
        super().__init__()
        self.name, self.rows = weight.name.removesuffix(".weight"), slice(None)
        if weight.repeated and weight.is_whole(mesh.size()):
            unit = mesh.get_local_rank() // (mesh.size() // weight.units) * weight.unit
            self.rows = slice(unit, unit + weight.unit)
        empty = partial(_empty, vocab_multiple=vocab_multiple, mesh=mesh, dtype_of=dtype_of)
        self.register_parameter("weight", empty(weight))
        self.register_parameter("bias", None if bias is None else empty(bias))

    def parts(self) -> list[tuple[DTensor, slice]]:
        """What a `Gemm` multiplies by, and the rows of each local tensor that this rank uses."""
        return [(self.weight, self.rows)]


def _empty(
    parameter: Parameter, vocab_multiple: int, mesh: DeviceMesh, dtype_of: Callable[[str], torch.dtype]
) -> nn.Parameter:
    """On the meta device, placed as the table says."""
    local, size = list(parameter.padded(vocab_multiple)), mesh.size()
    placement: Placement = Replicate()
    if not parameter.is_whole(size):
        placement = Shard(1 if parameter.split == "row" else 0)
        assert local[placement.dim] % size == 0, f"{parameter.name} {local} on {size} tp ranks"
        local[placement.dim] //= size
    empty = torch.empty(local, dtype=dtype_of(parameter.name), device="meta")
    return nn.Parameter(DTensor.from_local(empty, mesh, [placement], run_check=False))


@dataclass(frozen=True)
class TensorAxis:
    """The ranks that share matrices, who multiplies, and how forward hides its collectives.

    Attributes:
        gemm: every product of this rank's is one of it.
        overlap: none; chunked, a part of the tokens travels while another is multiplied; symmetric_memory, torch's fused
            products over NVLink.
        chunks: parts of `chunked`.
    """

    group: dist.ProcessGroup
    overlap: str = "none"
    chunks: int = 4
    gemm: Gemm = PLAIN


class DeferredWeightGrads:
    """Parameters of a linear and what computes their gradients, None for one that needs none. (No list: FSDP would copy it on the way
    into a module.)"""

    def __init__(self) -> None:
        self.queue: list[tuple[list[DTensor], Callable[[], list[DTensor | None]]]] = []


@outside_graphs
def column_parallel(
    x: Tensor,
    places: Sequence[NamedParameter],
    axis: TensorAxis,
    later: DeferredWeightGrads | None = None,
    on_first_products: tuple[int, Callable[..., None]] | None = None,
    kept: Kept = KEEP_ALL,
) -> tuple[Tensor, ...]:
    """Gathers tokens once, multiplies by each weight in turn.

    Args:
        x: [t, h]. places: of weights [f, h], this rank's rows, and biases [f].
        on_first_products: (n, function): is called with the first n products before the others are computed.
        kept: of the block that this is in.
    Returns:
        [T, f] for each weight.
    """
    linears, biases = _Linears(places), [place.bias for place in places]
    return _Column.apply(axis, x, linears, later, on_first_products, kept, *linears.parameters(places), *biases)


@outside_graphs
def row_parallel(
    x: Tensor,
    place: NamedParameter,
    axis: TensorAxis,
    later: DeferredWeightGrads | None = None,
    before: Callable[[], None] | None = None,
    kept: Kept = KEEP_ALL,
    last: bool = False,
) -> Tensor:
    """Multiplies, sums over ranks, keeps this rank's tokens.

    Args:
        x: [T, f]. place: of a weight [h, f], this rank's columns.
        before: is called before the gradients are computed, if x has one.
        kept: of the block that this is in. last: no gradient of the block needs the result, so its repetition leaves it out.
    Returns:
        [t, h].
    """
    linears = _Linears([place])
    return _Row.apply(axis, x, linears, later, before, kept, last, *linears.parameters([place]))


@torch.no_grad()
def compute_deferred(later: DeferredWeightGrads) -> None:
    """Computes the gradients that were left for later and adds them to the weights'."""
    for parameters, compute in later.queue:
        for parameter, grad in zip(parameters, compute(), strict=True):
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad
    later.queue.clear()


class _Linears:
    """The linears of one call as they stand, tensor after tensor, in the arguments of its Function."""

    def __init__(self, places: Sequence[NamedParameter]):
        parts = [place.parts() for place in places]
        self.names, self.counts = [place.name for place in places], [len(some) for some in parts]
        self.rows = [rows for some in parts for _, rows in some]

    def parameters(self, places: Sequence[NamedParameter]) -> list[DTensor]:
        return [parameter for place in places for parameter, _ in place.parts()]

    def operands(self, tensors: Sequence[Tensor]) -> list[Operand]:
        """Of what this rank uses of each tensor."""
        return [Operand(name, tuple(some)) for name, some in zip(self.names, self.split(tensors), strict=True)]

    def split(self, values: Sequence) -> list[list]:
        """One value a tensor -> a list for each linear."""
        rest = iter(values)
        return [list(islice(rest, count)) for count in self.counts]


def embedding(ids: Tensor, weight: DTensor, group: dist.ProcessGroup, backend: str = "auto") -> Tensor:
    """Rows of a table whose vocabulary the ranks share.

    Args:
        ids: int64 [T], the same on all ranks of the group. weight: [v, h].
    Returns:
        [t, h].
    """
    rows = rows_of(ids, local_with_grad(weight), group.rank() * local_part(weight).shape[0], backend=backend)
    return _ScatterSum.apply(rows, group)


@outside_graphs
def local_with_grad(weight: DTensor) -> Tensor:
    """The local tensor of a parameter. Where every tp rank holds it all, its gradient is partial: `sum_replicated_gradients`."""
    return _Local.apply(weight)


def _products(
    x: Tensor, operands: list[Operand], biases: list[Tensor | None], axis: TensorAxis, on_first_products
) -> tuple[Tensor, ...]:
    """gather(x) times each matrix, plus its bias."""
    if axis.overlap == "symmetric_memory" and axis.group.size() > 1:
        return axis.gemm.gathered_forward(x, operands, biases, axis.group)
    if axis.overlap == "chunked" and axis.group.size() > 1:
        return _chunked_products(x, operands, biases, axis)
    tokens, out = gather_tokens(x, axis.group), []
    for i, (operand, bias) in enumerate(zip(operands, biases, strict=True)):
        if on_first_products and i == on_first_products[0]:
            on_first_products[1](*out)
        out.append(axis.gemm.forward(tokens, operand, bias))
    return tuple(out)


def _chunked_products(
    x: Tensor, operands: list[Operand], biases: list[Tensor | None], axis: TensorAxis
) -> tuple[Tensor, ...]:
    size, parts = axis.group.size(), x.tensor_split(min(axis.chunks, x.shape[0]))
    pending = [start_gather(part, axis.group) for part in parts]
    widths = [operand.parts[0].shape[0] for operand in operands]
    out = [x.new_empty((size, x.shape[0], width)) for width in widths]
    begin = 0
    for part, gathered in zip(parts, pending, strict=True):
        tokens, end = gathered.wait(), begin + part.shape[0]
        for product, operand, bias, width in zip(out, operands, biases, widths, strict=True):
            product[:, begin:end] = axis.gemm.forward(tokens, operand, bias).view(size, -1, width)
        begin = end
    return tuple(product.flatten(0, 1) for product in out)


def _summed_product(x: Tensor, operand: Operand, axis: TensorAxis) -> Tensor:
    """This rank's tokens of the sum over ranks of x times a matrix."""
    if axis.overlap == "symmetric_memory" and axis.group.size() > 1:
        return axis.gemm.summed_forward(x, operand, axis.group)
    if axis.overlap == "chunked" and axis.group.size() > 1:
        by_rank = x.unflatten(0, (axis.group.size(), -1))
        parts = by_rank.tensor_split(min(axis.chunks, by_rank.shape[1]), dim=1)
        pending = [start_scatter_sum(axis.gemm.forward(part.flatten(0, 1), operand), axis.group) for part in parts]
        return torch.cat([part.wait() for part in pending])
    return scatter_sum_tokens(axis.gemm.forward(x, operand), axis.group)


class _Column(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        axis: TensorAxis,
        x: Tensor,
        linears: _Linears,
        later: DeferredWeightGrads | None,
        on_first_products,
        kept: Kept,
        *tensors,
    ):
        count = sum(linears.counts)
        weights, biases = tensors[:count], tensors[count:]
        rows_of = zip(biases, linears.split(linears.rows), strict=True)
        local = [local_part(weight)[rows] for weight, rows in zip(weights, linears.rows, strict=True)]
        shifts = [None if bias is None else local_part(bias)[rows[0]] for bias, rows in rows_of]
        ctx.wanted = linears.split(ctx.needs_input_grad[6 : 6 + count])
        ctx.bias_places = [
            placing_of(bias) if wanted else None
            for bias, wanted in zip(biases, ctx.needs_input_grad[6 + count :], strict=True)
        ]
        ctx.places = [placing_of(weight) for weight in weights]
        ctx.axis, ctx.linears, ctx.later = axis, linears, later
        ctx.weights = weights if later is not None else None
        ctx.save_for_backward(x if _any(ctx.wanted) else None, *local)
        return kept.once(lambda: _products(x, linears.operands(local), shifts, axis, on_first_products))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        x, *local = ctx.saved_tensors
        linears, gemm, group = ctx.linears, ctx.axis.gemm, ctx.axis.group
        operands, wants_weights = linears.operands(local), _any(ctx.wanted)
        later: DeferredWeightGrads | None = ctx.later
        gathered = start_gather(x, group) if wants_weights and later is None else None
        summed = None
        if ctx.needs_input_grad[1]:
            dx = gemm.input_gradient(grads[0], operands[0])
            for grad, operand in zip(grads[1:], operands[1:], strict=True):
                dx = gemm.input_gradient(grad, operand, dx)
            summed = start_scatter_sum(dx, group)
            del dx
        rows, places = linears.split(linears.rows), linears.split(ctx.places)
        dbiases = [
            place and _placed(grad.sum(0), some[0], place)
            for grad, some, place in zip(grads, rows, ctx.bias_places, strict=True)
        ]
        each = list(zip(grads, operands, ctx.wanted, rows, places, strict=True))
        dweights: list[DTensor | None] = [None] * len(local)
        if gathered is not None:
            tokens = gathered.wait()
            dweights = [grad for one in each for grad in _weight_gradients(gemm, tokens, *one)]
        elif wants_weights and later is not None:
            shared: list[Tensor] = []  # one gather for all weights, made by the first that asks
            waiting = [(own, one) for own, one in zip(linears.split(ctx.weights), each, strict=True) if any(one[2])]

            def compute(one: tuple, last: bool) -> list[DTensor | None]:
                if not shared:
                    shared.append(gather_tokens(x, group))
                return _weight_gradients(gemm, shared.pop() if last else shared[0], *one)

            for i, (own, one) in enumerate(waiting, 1):
                later.queue.append((own, partial(compute, one, i == len(waiting))))
        return None, summed and summed.wait(), None, None, None, None, *dweights, *dbiases


def _any(wanted: Sequence[Sequence[bool]]) -> bool:
    return any(any(some) for some in wanted)


def _weight_gradients(
    gemm: Gemm, x: Tensor, dy: Tensor, operand: Operand, wanted: list[bool], rows: list[slice], places: list[Placing]
) -> list[DTensor | None]:
    """Of each part of a linear, as that of the parameter."""
    gradients = gemm.weight_gradient(dy, x, operand, wanted) if any(wanted) else [None] * len(rows)
    return [
        None if gradient is None else _placed(gradient, some, place)
        for gradient, some, place in zip(gradients, rows, places, strict=True)
    ]


def _placed(gradient: Tensor, part: slice, place: Placing) -> DTensor:
    """The gradient of the rows `part` as that of the parameter."""
    if gradient.shape != place.local_shape:  # rows of other ranks: their gradients come from there
        gradient, used = gradient.new_zeros(place.local_shape), gradient
        gradient[part] = used
    return place.wrap(gradient)


class _Row(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        axis: TensorAxis,
        x: Tensor,
        linears: _Linears,
        later: DeferredWeightGrads | None,
        before,
        kept: Kept,
        last: bool,
        *weights,
    ):
        local = [local_part(weight)[rows] for weight, rows in zip(weights, linears.rows, strict=True)]
        ctx.places = [placing_of(weight) for weight in weights]
        ctx.axis, ctx.linears, ctx.later, ctx.before = axis, linears, later, before
        ctx.weights, ctx.wanted = weights if later is not None else None, ctx.needs_input_grad[7:]
        ctx.save_for_backward(x if any(ctx.wanted) else None, *local)
        if last and kept.again:
            return x.new_empty((x.shape[0] // axis.group.size(), local[0].shape[0]))

        def compute() -> Tensor:
            return _summed_product(x, linears.operands(local)[0], axis)

        return compute() if last else kept.once(compute)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (grad,) = grads
        wants_dx = ctx.needs_input_grad[1]
        if ctx.before and wants_dx:
            ctx.before()
        x, *local = ctx.saved_tensors
        linears, gemm = ctx.linears, ctx.axis.gemm
        (operand,), grad = linears.operands(local), gather_tokens(grad, ctx.axis.group)

        def compute() -> list[DTensor | None]:
            return _weight_gradients(gemm, x, grad, operand, ctx.wanted, linears.rows, ctx.places)

        dweights: list[DTensor | None] = [None] * len(local)
        dx = gemm.input_gradient(grad, operand) if wants_dx else None
        if any(ctx.wanted) and ctx.later is None:
            dweights = compute()
        elif any(ctx.wanted):
            ctx.later.queue.append((list(ctx.weights), compute))
        return None, dx, *[None] * 5, *dweights


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup):
        ctx.group = group
        out = scatter_sum_tokens(x, group)
        return out.view_as(out)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (grad,) = grads
        return gather_tokens(grad, ctx.group), None


class _Local(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: DTensor):
        ctx.place, local = placing_of(weight), local_part(weight)
        return local.view_as(local)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (grad,) = grads
        return ctx.place.wrap(grad.contiguous())


def sum_replicated_gradients(parameters: list[nn.Parameter], group: dist.ProcessGroup) -> None:
    """Sums over tp the gradients of parameters that tp replicates: after FSDP's reduction, once a step, in one bucket."""
    if group.size() == 1:
        return
    grads = [local_part(p.grad) for p in parameters if p.grad is not None and is_replicated(p)]
    if grads:
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat, group=group)
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))
