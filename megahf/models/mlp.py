"""The MLP of Megatron-core: one matmul up (gate and up together), an activation, one matmul down."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .norm import build_norm

if TYPE_CHECKING:
    from .configuration_mcore import McoreGPTConfig


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def squared_relu(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "silu": F.silu,
    "quick_gelu": quick_gelu,
    "squared_relu": squared_relu,
}


class Activation:
    """`act(x)`, or `act(gate) * (up + offset)` of `x` packed `gate | up`, both clamped first where the model clamps."""

    def __init__(self, config: McoreGPTConfig) -> None:
        self.function = ACTIVATIONS[config.activation_func]
        self.gated = config.gated_linear_unit
        self.clamp = config.activation_func_clamp_value
        self.offset = config.glu_linear_offset

    def __call__(self, x: Tensor) -> Tensor:
        """`[..., 2 f]` if gated, else `[..., f]`, to `[..., f]`."""
        if not self.gated:
            return self.function(x)
        gate, up = x.chunk(2, dim=-1)  # [..., f] each
        if self.clamp is not None:
            gate, up = gate.clamp(max=self.clamp), up.clamp(-self.clamp, self.clamp)
        if self.offset:
            up = up + self.offset
        return self.function(gate).mul_(up)  # in place: a long prefill's peak is here


class ResidualLinear(nn.Linear):
    """A matrix that writes into the residual stream; it differs from others only in how it is initialised."""


class MLP(nn.Module):
    """`fc2(act(fc1(norm(x))))`, with fc1's rows packed `gate | up` where it is gated.

    Args:
        width: of the hidden layer (of each half, if gated).
        normed: whether the norm is in here, as it is in Transformer Engine's layers, or before the module.
        input_size: channels that come in, if not hidden_size, which go out.
    """

    def __init__(
        self, config: McoreGPTConfig, width: int, bias: bool, normed: bool, input_size: int | None = None
    ) -> None:
        super().__init__()
        self.activation = Activation(config)
        rows = (2 if config.gated_linear_unit else 1) * width
        channels = input_size or config.hidden_size
        self.linear_fc1_layernorm = build_norm(config, channels) if normed else nn.Identity()
        self.linear_fc1 = nn.Linear(channels, rows, bias=bias)  # gate | up
        self.linear_fc2 = ResidualLinear(width, config.hidden_size, bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        # [b, s, 2 f or f], held by no name, then [b, s, f]
        return self.linear_fc2(self.activation(self.linear_fc1(self.linear_fc1_layernorm(hidden))))
