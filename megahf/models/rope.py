"""Rotary position embeddings as Megatron-core computes them: plain, interpolated, Llama 3.1's scaling, YaRN.

Source of the numbers: megatron/core/models/common/embeddings/{rotary,yarn_rotary}_pos_embedding.py and rope_utils.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .configuration_mcore import McoreGPTConfig

LLAMA3_LOW, LLAMA3_HIGH, LLAMA3_CONTEXT = 1.0, 4.0, 8192  # written into Megatron's code, no argument changes them


class RotaryEmbedding(nn.Module):
    """Angles of positions, computed once a forward and shared by all layers."""

    inv_freq: Tensor

    def __init__(self, config: McoreGPTConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("inv_freq", self.frequencies(), persistent=False)  # [channels / 2]
        yarn = config.rotary_type == "yarn"
        plain = not yarn and not config.multi_latent_attention  # Megatron stretches no other
        self.stretch = config.rotary_seq_len_interpolation_factor if plain else None
        self.concentration = yarn_concentration(config) if yarn else 1.0

    def frequencies(self) -> Tensor:
        """Radians a position turns each pair of channels, float32 `[channels / 2]`."""
        config = self.config
        # On the CPU also under a meta device: loading fills parameters, and this is none.
        pairs = torch.arange(0, config.rotary_channels, 2, dtype=torch.float32, device="cpu") / config.rotary_channels
        if config.rotary_type == "yarn":
            return yarn_frequencies(config, pairs)
        plain = 1.0 / (config.rotary_base**pairs)
        scaled = config.use_rope_scaling and not config.multi_latent_attention  # which Megatron does not tell of it
        return llama3_frequencies(plain, config.rope_scaling_factor) if scaled else plain

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        super()._apply(fn, recurse)
        # `model.to(torch.bfloat16)` must move the frequencies, never round them.
        self.inv_freq = self.frequencies().to(self.inv_freq.device)
        return self

    @torch.no_grad()
    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[b, s, 1, 1, channels / 2]` of positions `[b, s]`, in `dtype` as Megatron casts them."""
        positions = position_ids.to(self.inv_freq.device, torch.float32)
        if self.stretch is not None:
            positions = positions * (1 / self.stretch)
        angles = (positions[..., None] * self.inv_freq)[:, :, None, None]  # [b, s, 1, 1, channels / 2]
        return (angles.cos() * self.concentration).to(dtype), (angles.sin() * self.concentration).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turns the pairs of the first channels of `x` `[b, s, g, heads, d]` by the angles `[b, s, 1, 1, channels / 2]`.

    A pair is (i, i + channels / 2), or (2 i, 2 i + 1) if `interleaved`. Channels beyond those that turn pass through.
    """
    channels = 2 * cos.shape[-1]
    turned = x if channels == x.shape[-1] else x[..., :channels]
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    first, second = torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin)
    parts = (torch.stack((first, second), dim=-1).flatten(-2),) if interleaved else (first, second)
    return torch.cat(parts if turned is x else (*parts, x[..., channels:]), dim=-1)


def llama3_frequencies(plain: Tensor, factor: float) -> Tensor:
    """Llama 3.1's rule: slow pairs turn `factor` times slower, fast ones as before, those between in between."""
    length = 2 * math.pi / plain  # positions of a full turn
    smooth = (LLAMA3_CONTEXT / length - LLAMA3_LOW) / (LLAMA3_HIGH - LLAMA3_LOW)
    between = (1 - smooth) * plain / factor + smooth * plain
    slow, fast = length > LLAMA3_CONTEXT / LLAMA3_LOW, length < LLAMA3_CONTEXT / LLAMA3_HIGH
    return torch.where(slow, plain / factor, torch.where(fast, plain, between))


def yarn_frequencies(config: McoreGPTConfig, pairs: Tensor) -> Tensor:
    """YaRN: pairs that turn often keep their speed, pairs that turn rarely are slowed by the scaling factor."""
    fast = 1.0 / (config.rotary_base**pairs)
    slow = 1.0 / (config.yarn_rotary_scaling_factor * config.rotary_base**pairs)
    low, high = yarn_range(config)
    index = torch.arange(len(pairs), dtype=torch.float32, device="cpu")
    kept = 1.0 - torch.clamp((index - low) / (high - low if high != low else 0.001), 0, 1)
    return slow * (1 - kept) + fast * kept


def yarn_range(config: McoreGPTConfig) -> tuple[float, float]:
    """The pairs between which YaRN passes from keeping a pair's speed to slowing it.

    Multi-latent attention always has them as whole numbers, Megatron's default.
    """
    channels = config.rotary_channels

    def pair_that_turns(times: float) -> float:
        ratio = config.yarn_original_max_position_embeddings / (times * 2 * math.pi)
        return channels * math.log(ratio) / (2 * math.log(config.rotary_base))

    low, high = pair_that_turns(config.yarn_beta_fast), pair_that_turns(config.yarn_beta_slow)
    if config.yarn_correction_range_round_to_int or config.multi_latent_attention:
        low, high = math.floor(low), math.ceil(high)
    return max(low, 0), min(high, channels - 1)


def yarn_concentration(config: McoreGPTConfig) -> float:
    """The factor YaRN puts on cosines and sines."""
    scale = config.yarn_rotary_scaling_factor
    if config.yarn_mscale is None or config.yarn_mscale_all_dim is None:
        return yarn_mscale(scale, 1.0)
    return yarn_mscale(scale, config.yarn_mscale) / yarn_mscale(scale, config.yarn_mscale_all_dim)


def yarn_mscale(scale: float, weight: float) -> float:
    """How much sharper attention is to be over a context `scale` times as long."""
    return 0.1 * weight * math.log(scale) + 1.0 if scale > 1 else 1.0
