"""[kernels]: which implementation does the work."""

from typing import Literal

from megacpt.config.base import Section


class Kernels(Section, heading="[kernels]", resume="free"):
    """Which implementation does the work. A library that is named and missing is an error."""

    attention: Literal["auto", "flash-attn-3", "flash-attn-4", "flash-attn", "varlen", "triton", "cudnn", "sdpa"] = (
        "auto"
    )
    """Library that computes document attention. `auto` takes the best one that is installed and knows the GPU."""
    operations: Literal["auto", "triton", "torch"] = "auto"
    """Implementation of embedding, norms, rotary embedding, SwiGLU, cross-entropy and the gradient norm. `auto` takes Triton's on a GPU and
    torch's elsewhere."""
    optimizer: Literal["auto", "triton", "torch", "apex"] = "auto"
    """Implementation of AdamW's update. `auto` takes Triton's on a GPU and torch's elsewhere; `apex` is NVIDIA's fused Adam, which is found
    by its module amp_C."""
    compile: bool = False
    """Compile each block with torch.compile. Collectives and attention stay outside its graphs."""
    deterministic: bool = False
    """On a GPU, use only kernels that give the same bits each time. A resume is then bit-identical, at some cost in speed."""
