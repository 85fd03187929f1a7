"""The norms of Megatron-core: LayerNorm and RMSNorm, plain or with zero-centred gamma, and the L2 norm of q and k."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernel_choice import takes
from .triton_layer_norm import LARGEST, triton_layer_norm

if TYPE_CHECKING:
    from .configuration_mcore import McoreGPTConfig


class RMSNorm(nn.Module):
    """`x / rms(x) * weight`; with zero-centred gamma `x / rms(x) * (1 + weight)`.

    Leaves in the weight's dtype, so that a float32 residual stream meets matrices of the model's dtype.
    """

    def __init__(self, size: int, eps: float, zero_centered: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size) if zero_centered else torch.ones(size))
        self.eps = eps
        self.zero_centered = zero_centered

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.casts(x) and takes(x, weight):
            return triton_layer_norm(x, weight, None, self.eps, self.zero_centered)
        if self.zero_centered:
            return F.rms_norm(x.float(), weight.shape, 1 + weight.float(), self.eps).to(weight.dtype)
        if x.dtype == weight.dtype:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), self.eps).to(weight.dtype)

    def casts(self, x: Tensor) -> bool:
        """Whether torch would norm in float32 what is not, or is not to be, in float32: passes over memory to save."""
        in_float32 = self.zero_centered or x.dtype == torch.float32
        return in_float32 and not x.dtype == self.weight.dtype == torch.float32 and x.shape[-1] <= LARGEST

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}, zero_centered={self.zero_centered}"


class LayerNorm(RMSNorm):
    """`(x - mean(x)) / std(x) * weight + bias`, with `1 + weight` if gamma is zero-centred."""

    def __init__(self, size: int, eps: float, zero_centered: bool) -> None:
        super().__init__(size, eps, zero_centered)
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        if self.casts(x) and takes(x, self.weight, self.bias):
            return triton_layer_norm(x, self.weight, self.bias, self.eps, self.zero_centered)
        if self.zero_centered:
            out = F.layer_norm(x.float(), self.weight.shape, 1 + self.weight.float(), self.bias.float(), self.eps)
        else:
            out = F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
        return out.to(self.weight.dtype)


class L2Norm(nn.Module):
    """`x / rms(x)`, without weights."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


def build_norm(config: McoreGPTConfig, size: int) -> nn.Module:
    """The model's norm over `size` channels."""
    kind = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}[config.normalization]
    return kind(size, config.layernorm_epsilon, config.layernorm_zero_centered_gamma)


def build_qk_norm(config: McoreGPTConfig) -> nn.Module | None:
    """The norm of each head's queries or keys, or None; the L2 norm wins over the learned one, as in Megatron."""
    if config.qk_l2_norm:
        return L2Norm(config.layernorm_epsilon)
    return build_norm(config, config.kv_channels) if config.qk_layernorm else None
