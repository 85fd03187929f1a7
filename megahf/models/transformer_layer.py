"""One layer of Megatron-core's transformer: attention and an MLP, each added to the residual stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import SelfAttention
from .mla import MLASelfAttention
from .mlp import MLP
from .moe import MoELayer
from .norm import build_norm

if TYPE_CHECKING:
    from .configuration_mcore import McoreGPTConfig


class TransformerLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    As in Transformer Engine's spec the norms are inside, each in front of the matrix it feeds, unless it feeds two.

    Args:
        attends: whether there is the attention; a layer of a hybrid model is one of the two alone.
        transforms: whether there is the MLP.
    """

    def __init__(self, config: McoreGPTConfig, layer_idx: int, attends: bool = True, transforms: bool = True) -> None:
        super().__init__()
        latent = attends and config.multi_latent_attention
        self.input_layernorm = build_norm(config, config.hidden_size) if latent else nn.Identity()
        self.self_attention = (MLASelfAttention if latent else SelfAttention)(config, layer_idx) if attends else None
        self.is_moe = config.moe_layers[layer_idx]
        self.pre_mlp_layernorm = build_norm(config, config.hidden_size) if self.is_moe else nn.Identity()
        self.mlp = build_mlp(config, self.is_moe) if transforms else None
        self.dropout = config.hidden_dropout

    def forward(
        self, hidden: Tensor, expert_tokens: Tensor | None = None, **kwargs: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`[b, s, h]` to `[b, s, h]`; with the router's statistics where `MoELayer` returns them (see `run_layer`).

        Args:
            expert_tokens: `[b, s]`, 0 where there is padding, which auxiliary losses leave out.
        """
        if self.self_attention is not None:
            hidden = self.add(hidden, self.self_attention(self.input_layernorm(hidden), **kwargs)[0])
        if self.mlp is None:
            return hidden
        if not self.is_moe:
            return self.add(hidden, self.mlp(hidden))
        update = self.mlp(self.pre_mlp_layernorm(hidden), expert_tokens)
        if isinstance(update, tuple):
            return self.add(hidden, update[0]), update[1]
        return self.add(hidden, update)

    def add(self, hidden: Tensor, update: Tensor) -> Tensor:
        return hidden + (F.dropout(update, self.dropout) if self.training else update)


def build_mlp(config: McoreGPTConfig, is_moe: bool) -> nn.Module:
    if is_moe:
        return MoELayer(config)
    return MLP(config, config.ffn_hidden_size, config.add_bias_linear, normed=True)


def run_layer(layer: nn.Module, hidden: Tensor, losses: list[Tensor], **kwargs: Any) -> Tensor:
    """`layer(hidden)` `[b, s, h]`; the auxiliary loss of its router, if there is one, is appended to `losses`.

    The loss is made here, outside of the layer, which gradient checkpointing runs without a gradient or twice.
    """
    out = layer(hidden, **kwargs)
    if not isinstance(out, tuple):
        return out
    hidden, statistics = out
    if (layout := kwargs.get("layout")) is not None and layout.context is not None:
        statistics = layout.context.sum(statistics)
    losses.append(cast("MoELayer", layer.mlp).router.auxiliary_loss(statistics))
    return hidden
