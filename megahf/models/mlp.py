"""The MLP of Megatron-core: one matmul up (gate and up together), an activation, one matmul down."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class ResidualLinear(nn.Linear):
    """A matrix that writes into the residual stream; it differs from others only in how it is initialised."""


class MLP(nn.Module):
    """`fc2(act(fc1(x)))`, or `fc2(act(gate) * (up + offset))` with fc1's rows packed `gate | up`."""

    def __init__(self, config: McoreGPTConfig) -> None:
        super().__init__()
        self.gated = config.gated_linear_unit
        self.activation = ACTIVATIONS[config.activation_func]
        self.clamp = config.activation_func_clamp_value
        self.offset = config.glu_linear_offset
        rows = (2 if self.gated else 1) * config.ffn_hidden_size
        self.linear_fc1 = nn.Linear(config.hidden_size, rows, bias=config.add_bias_linear)  # gate | up
        self.linear_fc2 = ResidualLinear(config.ffn_hidden_size, config.hidden_size, bias=config.add_bias_linear)

    def forward(self, hidden: Tensor) -> Tensor:
        activate = self.glu if self.gated else self.activation
        return self.linear_fc2(activate(self.linear_fc1(hidden)))  # [b, s, 2 f or f], held by no name, then [b, s, f]

    def glu(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)  # [b, s, f] each
        if self.clamp is not None:
            gate, up = gate.clamp(max=self.clamp), up.clamp(-self.clamp, self.clamp)
        if self.offset:
            up = up + self.offset
        return self.activation(gate).mul_(up)  # in place: a long prefill's peak is here
