"""Rotary position tables (RoFormer, arXiv 2104.09864), half-split as Llama and aiXcoder use them.

Owns cos/sin for plain and scaled positions. Does not rotate anything: the ops do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_infer.model_config import ModelConfig
from megatron_infer.rope_scaling import RopeScaling


def rope_tables(config: ModelConfig, num_positions: int) -> tuple[Tensor, Tensor]:
    """cos_PH and sin_PH, fp32 [num_positions, head_dim / 2], computed in fp32 as transformers computes them.

    The tables of YaRN carry its attention factor, so that the scores come out scaled without a further step.
    """
    inv_freq_H, attention_factor = _inverse_frequencies(config)
    angles_PH = torch.arange(num_positions, dtype=torch.float32, device="cpu")[:, None] * inv_freq_H[None, :]
    return angles_PH.cos() * attention_factor, angles_PH.sin() * attention_factor


def _inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    dim = config.head_dim
    exponent_H = torch.arange(0, dim, 2, dtype=torch.int64, device="cpu").to(torch.float32) / dim
    inv_freq_H = 1.0 / (config.rope_theta**exponent_H)
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq_H, 1.0
    if scaling.rope_type == "linear":
        return inv_freq_H / scaling.factor, 1.0
    if scaling.rope_type == "llama3":
        return _llama3(scaling, inv_freq_H), 1.0
    return _yarn(config, scaling, inv_freq_H)


def _llama3(scaling: RopeScaling, inv_freq_H: Tensor) -> Tensor:
    """Llama 3.1 (transformers, `_compute_llama3_parameters`): waves longer than the trained context over
    `low_freq_factor` are stretched by `factor`, those shorter than it over `high_freq_factor` are not, and what lies
    between is blended."""
    trained, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    assert trained is not None and low is not None and high is not None
    wavelength_H = 2 * math.pi / inv_freq_H
    keep_H = (trained / wavelength_H - low) / (high - low)
    blended_H = (1 - keep_H) * inv_freq_H / scaling.factor + keep_H * inv_freq_H
    stretched_H = torch.where(wavelength_H > trained / low, inv_freq_H / scaling.factor, blended_H)
    return torch.where(wavelength_H < trained / high, inv_freq_H, stretched_H)


def _yarn(config: ModelConfig, scaling: RopeScaling, inv_freq_H: Tensor) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071, section 3): fast dimensions keep their frequency, slow ones are divided by `factor`."""
    dim = config.head_dim
    trained = scaling.original_max_position_embeddings
    assert trained is not None

    def dimension_of(rotations: float) -> float:
        """The dimension that turns `rotations` times over the trained context."""
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    slow_H = ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)).clamp(0, 1)
    keep_H = 1 - slow_H
    blended_H = inv_freq_H / scaling.factor * (1 - keep_H) + inv_freq_H * keep_H
    return blended_H, _yarn_attention_factor(scaling)


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    def magnitude(mscale: float = 1.0) -> float:
        return 0.1 * mscale * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)
    return magnitude()
