"""The three matrix products of a linear, by torch's own: what multiplies where nothing else is given.

Shapes: T tokens, h features in, f features out.
"""

import torch.nn.functional as F
from torch import Tensor


class TorchGemm:
    """Whoever multiplies otherwise (in FP8, say) gives an object with these methods in its place.

    Attributes:
        is_plain: whether a kernel that multiplies on the chip may stand for the products.
    """

    is_plain = True

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """[T, h] times [f, h], plus [f] -> [T, f]."""
        return F.linear(x, weight, bias)

    def input_gradient(self, dy: Tensor, weight: Tensor, into: Tensor | None = None) -> Tensor:
        """[T, f] times [f, h] -> [T, h], added to `into` if that is given."""
        return dy @ weight if into is None else into.addmm_(dy, weight)

    def weight_gradient(self, dy: Tensor, x: Tensor, weight: Tensor, into: Tensor | None = None) -> Tensor:
        """[T, f] and [T, h] -> [f, h], added to `into` if that is given."""
        return dy.t() @ x if into is None else into.addmm_(dy.t(), x)


TORCH_GEMM = TorchGemm()
