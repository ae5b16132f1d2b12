"""Phi-3 and Phi-4 (arXiv 2404.14219, 2412.08905): Llama whose file holds queries, keys and values in one tensor, gate and up in another.

Within its window it is Llama, as Mistral is. In its files, `yarn` and `su` are names of longrope, whose frequencies depend on the length of
the input.
"""

from megacpt.family.base import Family
from megacpt.family.llama import decoder

PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    decoder,
    defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    only={"resid_pdrop": 0, "embd_pdrop": 0},
    windowed=True,
    fused={"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")},
    rope_types=("default",),
)
