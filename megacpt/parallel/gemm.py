"""Who multiplies by weights: every product of a linear, in forward and in backward, on every layout, is one of a `Gemm`.

Shapes: T tokens, h features in, f features out, of this tp rank.

A `Gemm` is held by the tensor axis (tensor.py) and gets what a linear multiplies by as an `Operand`: with the linear's name, so that it can
keep what it measures of each (scales of FP8), and with all tensors that the linear has (the matrix, factors of an adapter), of which each
gets a gradient. Products whose tensors are partial sums over tp stay partial: who calls sums them, as those of the plain product.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch.distributed as dist
from megacpt_kernels.gemm import TORCH_GEMM, TorchGemm
from torch import Tensor

from megacpt.compat import symmetric_memory


class Operand(NamedTuple):
    """What a linear multiplies by, this rank's part.

    Attributes:
        name: of the linear, its module's in the model.
        parts: the matrix [f, h]; behind it what else an implementation takes.
    """

    name: str
    parts: tuple[Tensor, ...]


class Gemm(Protocol):
    """The products of a linear.

    Attributes:
        is_plain: whether they are torch's own, so that a kernel that multiplies on the chip may stand for them.
    """

    is_plain: bool

    def forward(self, x: Tensor, w: Operand, bias: Tensor | None = None) -> Tensor:
        """[T, h] -> [T, f]."""
        ...

    def input_gradient(self, dy: Tensor, w: Operand, into: Tensor | None = None) -> Tensor:
        """[T, f] -> [T, h], added to `into` if that is given."""
        ...

    def weight_gradient(
        self, dy: Tensor, x: Tensor, w: Operand, wanted: Sequence[bool], into: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        """[T, f] and [T, h] -> the gradient of each part that is wanted.

        Args:
            into: what the matrix's gradient is added to.
        """
        ...

    def gathered_forward(
        self, x: Tensor, ws: Sequence[Operand], biases: Sequence[Tensor | None], group: dist.ProcessGroup
    ) -> tuple[Tensor, ...]:
        """`forward` of the tokens of all ranks by each operand, in one fused operation over symmetric memory."""
        ...

    def summed_forward(self, x: Tensor, w: Operand, group: dist.ProcessGroup) -> Tensor:
        """This rank's tokens of the ranks' sum of `forward`, in one fused operation over symmetric memory."""
        ...

    def state(self) -> dict[str, Tensor]:
        """By name: what a checkpoint holds of it besides the parameters."""
        ...


class PlainGemm:
    """In the type of its operands, by torch. Keeps nothing."""

    is_plain = True

    def forward(self, x: Tensor, w: Operand, bias: Tensor | None = None) -> Tensor:
        (matrix,) = w.parts
        return TORCH_GEMM.forward(x, matrix, bias)

    def input_gradient(self, dy: Tensor, w: Operand, into: Tensor | None = None) -> Tensor:
        (matrix,) = w.parts
        return TORCH_GEMM.input_gradient(dy, matrix, into)

    def weight_gradient(
        self, dy: Tensor, x: Tensor, w: Operand, wanted: Sequence[bool], into: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        (matrix,) = w.parts
        return (TORCH_GEMM.weight_gradient(dy, x, matrix, into) if wanted[0] else None,)

    def gathered_forward(
        self, x: Tensor, ws: Sequence[Operand], biases: Sequence[Tensor | None], group: dist.ProcessGroup
    ) -> tuple[Tensor, ...]:
        fused, weights = symmetric_memory("fused_all_gather_matmul"), [w.parts[0].t() for w in ws]
        out = fused(x.contiguous(), weights, 0, group.group_name, return_A=False)[1]
        return tuple(y if bias is None else y + bias for y, bias in zip(out, biases, strict=True))

    def summed_forward(self, x: Tensor, w: Operand, group: dist.ProcessGroup) -> Tensor:
        fused = symmetric_memory("fused_matmul_reduce_scatter")
        return fused(x.contiguous(), w.parts[0].t(), "sum", 0, group.group_name)

    def state(self) -> dict[str, Tensor]:
        return {}


PLAIN = PlainGemm()


class OneMatrix(TorchGemm):
    """A `Gemm` for a linear that has one matrix, called as the kernels call theirs: with tensors."""

    def __init__(self, gemm: Gemm, name: str):
        self.gemm, self.name, self.is_plain = gemm, name, gemm.is_plain

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.gemm.forward(x, Operand(self.name, (weight,)), bias)

    def input_gradient(self, dy: Tensor, weight: Tensor, into: Tensor | None = None) -> Tensor:
        return self.gemm.input_gradient(dy, Operand(self.name, (weight,)), into)

    def weight_gradient(self, dy: Tensor, x: Tensor, weight: Tensor, into: Tensor | None = None) -> Tensor:
        (gradient,) = self.gemm.weight_gradient(dy, x, Operand(self.name, (weight,)), (True,), into)
        assert gradient is not None, self.name
        return gradient
