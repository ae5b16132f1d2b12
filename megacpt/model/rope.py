"""Inverse frequencies and tables of the rotary embedding, in fp32 as in transformers (modeling_rope_utils): default,
linear (Chen et al. 2023, arXiv 2306.15595), llama3 (Llama 3.1's reference code), YaRN (Peng et al. 2023, 2309.00071)."""

import math

import torch
from torch import Tensor

from megacpt.family.rope import Linear, Llama3, RopeConfig, Yarn


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """(fp32 [head_dim / 2], factor on cos and sin)."""
    powers = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    match rope.scaling:
        case Linear(factor):
            return 1.0 / powers / factor, 1.0
        case Llama3() as scaling:
            return _llama3(1.0 / powers, scaling), 1.0
        case Yarn() as scaling:
            return _yarn(powers, scaling, rope.theta), _yarn_attention_factor(scaling)
    return 1.0 / powers, 1.0


def _llama3(plain: Tensor, scaling: Llama3) -> Tensor:
    factor, low, high = scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor
    original = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / plain
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * plain / factor + smooth * plain
    scaled = torch.where(wavelength > original / low, plain / factor, blended)
    return torch.where(wavelength < original / high, plain, scaled)


def _yarn(powers: Tensor, scaling: Yarn, theta: float) -> Tensor:
    factor, head_dim = scaling.factor, 2 * len(powers)

    def dimension(rotations: float) -> float:
        """The (fractional) dimension that turns this often over the original length: eq. 17 solved for it."""
        original = scaling.original_max_position_embeddings
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    keep = 1 - ramp.clamp(0, 1)
    return 1.0 / (factor * powers) * (1 - keep) + 1.0 / powers * keep


def _yarn_attention_factor(scaling: Yarn) -> float:
    if scaling.attention_factor is not None:
        return float(scaling.attention_factor)

    def scale(m: float) -> float:
        return 0.1 * m * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return scale(scaling.mscale) / scale(scaling.mscale_all_dim)
    return scale(1.0)


class RopeTables:
    """cos and sin of every position, fp32 [positions, head_dim / 2], on the device; grown when a longer row comes."""

    def __init__(self, rope: RopeConfig, head_dim: int, device: torch.device):
        self.rope, self.head_dim, self.device = rope, head_dim, device
        self.cos = self.sin = torch.empty(0, head_dim // 2, device=device)

    def up_to(self, longest: int) -> tuple[Tensor, Tensor]:
        """The tables, with rows for positions below `longest` at least."""
        if longest > len(self.cos):
            frequencies, scale = inverse_frequencies(self.rope, self.head_dim)
            angles = torch.outer(torch.arange(longest, dtype=torch.float32), frequencies)
            self.cos, self.sin = (angles.cos() * scale).to(self.device), (angles.sin() * scale).to(self.device)
        return self.cos, self.sin
