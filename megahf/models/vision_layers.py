"""The layers of Megatron-core's image encoders whose norms are modules of their own: InternViT's and RADIO-g's.

Sources: Megatron's examples/multimodal/{layer_scaling,nvlm/internvit,radio/radio_g}.py. Other encoders have the layers
of a GPT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import SelfAttention
from .mlp import MLP
from .norm import build_norm
from .transformer_layer import TransformerLayer

if TYPE_CHECKING:
    from .configuration_mcore import McoreGPTConfig
    from .configuration_mcore_llava import McoreVisionConfig


class HeadsRMSNorm(nn.Module):
    """InternViT-6B's norm of queries or keys: one RMS over the channels of all heads.

    As in Megatron the mean divides by hidden_size, whatever the channels of all heads are.
    """

    def __init__(self, config: McoreVisionConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.num_attention_heads * cast(int, config.kv_channels)))
        self.channels = config.hidden_size
        self.eps = cast(float, config.layernorm_epsilon)

    def forward(self, x: Tensor) -> Tensor:
        """Heads `[b, s, n, 1, d]` to the same shape."""
        flat = x.flatten(2).float()  # [b, s, n d]
        mean = flat.square().sum(dim=-1, keepdim=True) / self.channels
        return ((flat * torch.rsqrt(mean + self.eps)).to(x.dtype) * self.weight).view(x.shape)


class VisionAttention(SelfAttention):
    """Self-attention without the norm in front, which the layer has; with norms over all heads where configured."""

    def __init__(self, config: McoreVisionConfig, layer_idx: int) -> None:
        super().__init__(cast("McoreGPTConfig", config), layer_idx)
        self.linear_qkv_layernorm = nn.Identity()
        self.q_layernorm = HeadsRMSNorm(config) if config.qk_layernorm else None
        self.k_layernorm = HeadsRMSNorm(config) if config.qk_layernorm else None


class ScaledLayer(GradientCheckpointingLayer):
    """x + ls1 attention(norm(x)), then x + ls2 mlp(norm(x)), with a learned scale a channel."""

    def __init__(self, config: McoreVisionConfig, layer_idx: int) -> None:
        super().__init__()
        shared = cast("McoreGPTConfig", config)
        self.input_layernorm = build_norm(shared, config.hidden_size)
        self.self_attention = VisionAttention(config, layer_idx)
        self.pre_mlp_layernorm = build_norm(shared, config.hidden_size)
        self.mlp = MLP(shared, config.ffn_hidden_size, config.add_bias_linear, normed=False)
        self.ls1 = nn.Parameter(torch.ones(config.hidden_size))
        self.ls2 = nn.Parameter(torch.ones(config.hidden_size))
        self.dropout = config.hidden_dropout

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        """`[b, s, h]` to `[b, s, h]`."""
        update, _ = self.self_attention(self.input_layernorm(hidden), **kwargs)
        hidden = hidden + F.dropout(update, self.dropout, self.training) * self.ls1
        update = self.mlp(self.pre_mlp_layernorm(hidden))
        return hidden + F.dropout(update, self.dropout, self.training) * self.ls2


class VisionBlock(nn.Module):
    """The stack of layers; every token sees every other of its tile. No norm after them."""

    def __init__(self, config: McoreVisionConfig) -> None:
        super().__init__()
        kind: Any = ScaledLayer if config.kind.plain_norms else TransformerLayer
        self.layers = nn.ModuleList(kind(config, layer) for layer in range(config.num_layers))

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        """`[b, s, h]` to `[b, s, h]`."""
        for layer in self.layers:
            hidden = layer(hidden, **{**kwargs, "is_causal": False})
        return hidden
