"""Every tolerance of the suite. Relative means ||a - b|| / ||b|| per tensor (docs/numerics.md)."""

import torch

PARITY = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Against transformers: logits, losses, gradients."""

LAYOUT = 1e-12
"""Any layout against one process, float64."""

KERNEL = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 4e-3}
"""Outputs and input gradients against float64 on the same inputs."""

WEIGHT_GRAD = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 4e-3}
ATTENTION_OUT = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 4e-3}
ATTENTION = {torch.float32: 5e-6, torch.float64: 1e-13, torch.bfloat16: 8e-3}
ADAMW = {torch.float32: 5e-7, torch.float64: 1e-13}
"""Weights after five updates, against torch.optim.AdamW."""

MEMORY_FORMULA = 0.02
"""Peak memory of a step by formula, relative to the counted one."""


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b|| in float64."""
    a, b = a.detach().double(), b.detach().double()
    return ((a - b).norm() / b.norm().clamp(min=1e-300)).item()
