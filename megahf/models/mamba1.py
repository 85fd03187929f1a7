"""The Mamba-1 mixer, of state-spaces and of early Megatron-core: every channel decays at its own rates."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .conv import CausalConv1d, upcast
from .mamba import initial_time_steps
from .mlp import ResidualLinear
from .norm import build_norm
from .selective_scan import selective_scan, selective_update
from .state_space import Rows, States, walk

if TYPE_CHECKING:
    from transformers.cache_utils import Cache
    from transformers.configuration_utils import PreTrainedConfig


class TimeStepProjection(nn.Linear):
    """A matrix whose bias is added in float32: in bfloat16 a bias of -5 would leave of a time step two digits."""

    def forward(self, x: Tensor) -> Tensor:
        return upcast(F.linear(x, self.weight)) + upcast(self.bias)


class Mamba1Mixer(nn.Module):
    """`out_proj(scan(silu(conv(x)), dt, B, C) * silu(z))`, with `x | z` from one matmul and `dt | B | C` from x."""

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        width, state_dim = config.mamba_expand * config.hidden_size, config.mamba_state_dim
        rank = config.mamba_dt_rank or math.ceil(config.hidden_size / 16)
        self.widths = [rank, state_dim, state_dim]  # dt, B, C
        self.in_proj_layernorm = build_norm(config, config.hidden_size)
        self.in_proj = nn.Linear(config.hidden_size, 2 * width, bias=config.mamba_proj_bias)  # x | z
        self.conv1d = CausalConv1d(width, config.mamba_d_conv, bias=config.mamba_conv_bias)
        self.x_proj = nn.Linear(width, sum(self.widths), bias=False)  # dt | B | C
        self.dt_proj = TimeStepProjection(rank, width)
        self.A_log = nn.Parameter(torch.empty(width, state_dim))
        self.D = nn.Parameter(torch.empty(width))
        self.out_proj = ResidualLinear(width, config.hidden_size, bias=config.mamba_proj_bias)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """state-spaces': the place n of a state decays at the rate n + 1, time steps are spread over their range."""
        rates = torch.arange(1.0, self.A_log.shape[1] + 1, device=self.A_log.device)
        init.copy_(self.A_log, rates.log().expand_as(self.A_log))
        init.ones_(self.D)
        bound = self.dt_proj.in_features**-0.5
        init.uniform_(self.dt_proj.weight, -bound, bound)
        init.copy_(self.dt_proj.bias, initial_time_steps(self.dt_proj.bias))

    def forward(
        self, hidden: Tensor, past_key_values: Cache | None = None, rows: Rows | None = None, **kwargs: Any
    ) -> Tensor:
        """`hidden` `[b, s, h]` to the same; the cache and `rows` as `walk` takes them."""
        return walk(self.mix, hidden, self.layer_idx, past_key_values, rows)

    def mix(self, hidden: Tensor, states: States, rows: Rows) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        conv_state, state = states
        conv, scan = rows.recurrence(self.conv1d, selective_scan)
        x, z = self.in_proj(self.in_proj_layernorm(hidden)).chunk(2, dim=-1)  # [b, s, d]
        x, conv_state = conv(x, conv_state, rows.seq_idx, rows.mask)
        dt, B, C = self.x_proj(x).split(self.widths, dim=-1)
        dt, A = self.dt_proj(dt), -torch.exp(upcast(self.A_log))
        if hidden.shape[1] == 1 and state is not None and rows.mask is None and not torch.is_grad_enabled():
            y = selective_update(state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], self.D, z[:, 0])[:, None]
        else:
            options: dict[str, Any] = {"state": state, "seq_idx": rows.seq_idx, "mask": rows.mask}
            y, state = scan(x, dt, A, B, C, self.D, z, **options)
        return self.out_proj(y), (conv_state, state)
