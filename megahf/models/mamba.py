"""The Mamba-2 mixer of Megatron-core: a short convolution, state-space duality and a gated norm between two matmuls."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .conv import CausalConv1d, upcast
from .kernel_choice import takes
from .mlp import ResidualLinear
from .norm import build_norm
from .ssd import ssd_scan, ssd_update
from .state_space import Rows, States, walk
from .triton_norm import LARGEST, triton_gated_norm

if TYPE_CHECKING:
    from transformers.cache_utils import Cache
    from transformers.configuration_utils import PreTrainedConfig

NORM_EPSILON = 1e-5  # Megatron's gated norm has its own, whatever `layernorm_epsilon` says
A_RANGE = (1.0, 16.0)  # of initial decay rates
DT_RANGE = (1e-3, 1e-1)  # of initial time steps


class GatedRMSNorm(nn.Module):
    """`rms_norm(y * silu(z)) * weight`, each group of channels normed by itself, in float32."""

    def __init__(self, size: int, groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.groups = groups
        self.eps = eps

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        if y.shape[-1] <= LARGEST * self.groups and takes(y, z, self.weight):
            return triton_gated_norm(y, z, self.weight, self.groups, self.eps)
        gated = (upcast(y) * F.silu(upcast(z))).unflatten(-1, (self.groups, -1))  # [b, s, g, d / g]
        scale = torch.rsqrt(gated.square().mean(dim=-1, keepdim=True) + self.eps)
        return ((gated * scale).flatten(-2) * upcast(self.weight)).to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, groups={self.groups}, eps={self.eps}"


class MambaMixer(nn.Module):
    """`out_proj(norm(ssd(silu(conv(x | B | C)), dt), z))`, with `z | x | B | C | dt` from one matmul.

    Heads of `mamba_head_dim` channels, in groups that share B and C as attention's heads share keys and values.
    """

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim, self.state_dim = config.mamba_head_dim, config.mamba_state_dim
        self.groups = config.mamba_num_groups
        self.heads = config.mamba_num_heads or heads_of(config)
        self.chunk_size = config.mamba_chunk_size
        if self.heads % self.groups:
            raise ValueError(f"mamba_num_heads {self.heads} is not a multiple of mamba_num_groups {self.groups}")
        width, shared = self.heads * self.head_dim, self.groups * self.state_dim
        self.widths = [width, width + 2 * shared, self.heads]  # z, x | B | C, dt
        self.convolved = [width, shared, shared]  # x, B, C

        self.in_proj_layernorm = build_norm(config, config.hidden_size)
        # z | x | B | C | dt
        self.in_proj = nn.Linear(config.hidden_size, sum(self.widths), bias=config.mamba_proj_bias)
        self.conv1d = CausalConv1d(width + 2 * shared, config.mamba_d_conv, bias=config.mamba_conv_bias)  # x | B | C
        self.A_log = nn.Parameter(torch.empty(self.heads))
        self.D = nn.Parameter(torch.empty(width if config.mamba_d_has_hdim else self.heads))
        self.dt_bias = nn.Parameter(torch.empty(self.heads))
        self.norm = GatedRMSNorm(width, self.groups, NORM_EPSILON) if config.mamba_rms_norm else None
        self.out_proj = ResidualLinear(width, config.hidden_size, bias=config.mamba_proj_bias)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Megatron's: decay rates and time steps spread over their ranges, all of every input let through."""
        init.copy_(self.A_log, torch.empty(self.heads, device=self.A_log.device).uniform_(*A_RANGE).log_())
        init.ones_(self.D)
        init.copy_(self.dt_bias, initial_time_steps(self.dt_bias))

    def forward(
        self, hidden: Tensor, past_key_values: Cache | None = None, rows: Rows | None = None, **kwargs: Any
    ) -> Tensor:
        """`hidden` `[b, s, h]` to the same; the cache and `rows` as `walk` takes them."""
        return walk(self.mix, hidden, self.layer_idx, past_key_values, rows)

    def mix(self, hidden: Tensor, states: States, rows: Rows) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        conv_state, state = states
        conv, scan = rows.recurrence(self.conv1d, ssd_scan)
        z, xBC, dt = self.in_proj(self.in_proj_layernorm(hidden)).split(self.widths, dim=-1)
        xBC, conv_state = conv(xBC, conv_state, rows.seq_idx, rows.mask)
        x, B, C = xBC.split(self.convolved, dim=-1)
        heads, groups = (self.heads, self.head_dim), (self.groups, self.state_dim)
        x, B, C = x.unflatten(-1, heads), B.unflatten(-1, groups), C.unflatten(-1, groups)
        A = -torch.exp(upcast(self.A_log))
        D = self.D if len(self.D) == self.heads else self.D.view(heads)
        gate = z.unflatten(-1, heads) if self.norm is None else None
        if hidden.shape[1] == 1 and state is not None and rows.mask is None and not torch.is_grad_enabled():
            gate = None if gate is None else gate[:, 0]
            y = ssd_update(state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, gate, dt_bias=self.dt_bias)[:, None]
        else:
            options = {"state": state, "seq_idx": rows.seq_idx, "mask": rows.mask, "chunk_size": self.chunk_size}
            y, state = scan(x, dt, A, B, C, D, gate, dt_bias=self.dt_bias, **options)
        y = y.flatten(2)  # [b, s, h p]
        return self.out_proj(y if self.norm is None else self.norm(y, z)), (conv_state, state)


def heads_of(config: PreTrainedConfig) -> int:
    """How many heads `mamba_expand` times the hidden size holds."""
    width = config.mamba_expand * config.hidden_size
    if width % config.mamba_head_dim:
        raise ValueError(
            f"{config.mamba_expand} x hidden_size {config.hidden_size} is not a multiple of mamba_head_dim "
            f"{config.mamba_head_dim}; give mamba_num_heads"
        )
    return width // config.mamba_head_dim


def initial_time_steps(bias: Tensor) -> Tensor:
    """Biases of `bias`'s shape whose softplus is spread over `DT_RANGE`, evenly in the logarithm."""
    low, high = map(math.log, DT_RANGE)
    steps = torch.empty(bias.shape, device=bias.device).uniform_(low, high).exp_()
    return steps + torch.log(-torch.expm1(-steps))  # softplus undone
