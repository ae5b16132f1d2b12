"""[precision]: types of the computation and when gradients are reduced."""

from typing import Annotated, Literal

from megacpt.config.base import DType, NoneAsWord, Section


class Precision(Section, heading="[precision]", resume="frozen"):
    """Types of the computation, and how often gradients are reduced. Weights and gradients are kept in at least float32."""

    compute: Annotated[DType | None, NoneAsWord("auto")] = None
    """Type of activations and matrix products. `auto` is bfloat16 on a GPU and float32 on a CPU."""
    reduce: Literal["auto", "step", "micro_batch"] = "auto"
    """When gradients are reduced over the data-parallel ranks: once a `step`, which keeps whole gradients in memory, or after every
    `micro_batch`, which sends more. `auto` is `step` under pipeline parallelism; `check` prints the bytes of both."""
