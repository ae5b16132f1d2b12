"""Operations of Llama training, one a file. Each runs in any float type on any device; usable without the trainer."""

from megacpt_kernels.adamw import adamw_
from megacpt_kernels.attention import Documents, attention, attention_backward, attention_forward
from megacpt_kernels.cross_entropy import cross_entropy_, label_weights
from megacpt_kernels.embedding import embedding
from megacpt_kernels.grad_norm import grad_norm
from megacpt_kernels.linear_cross_entropy import linear_cross_entropy, linear_lse
from megacpt_kernels.rms_norm import add_rms_norm, rms_norm
from megacpt_kernels.rope import rope_qk, rope_qk_
from megacpt_kernels.swiglu import swiglu

__all__ = [
    "Documents",
    "adamw_",
    "add_rms_norm",
    "attention",
    "attention_backward",
    "attention_forward",
    "cross_entropy_",
    "embedding",
    "grad_norm",
    "label_weights",
    "linear_cross_entropy",
    "linear_lse",
    "rms_norm",
    "rope_qk",
    "rope_qk_",
    "swiglu",
]
