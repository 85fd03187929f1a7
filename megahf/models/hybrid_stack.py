"""A stack of layers by a pattern, each a mixer, an attention, an MLP or a mixture of experts by itself."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_mcore_hybrid import ATTENTION, McoreHybridConfig
from .layout import MASKS
from .mamba import MambaMixer
from .mamba1 import Mamba1Mixer
from .transformer_layer import TransformerLayer, run_layer


class MambaLayer(GradientCheckpointingLayer):
    """x + mixer(norm(x)); the norm is inside, in front of the matrix it feeds."""

    def __init__(self, config: McoreHybridConfig, layer_idx: int) -> None:
        super().__init__()
        self.mixer = (Mamba1Mixer if config.mamba_version == 1 else MambaMixer)(config, layer_idx)
        self.dropout = config.hidden_dropout

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        return hidden + F.dropout(self.mixer(hidden, **kwargs), self.dropout, self.training)


def build_layer(config: McoreHybridConfig, layer_idx: int) -> nn.Module:
    """The layer that a symbol of the pattern stands for."""
    symbol = config.hybrid_layer_pattern[layer_idx]
    if symbol == "M":
        return MambaLayer(config, layer_idx)
    return TransformerLayer(config, layer_idx, attends=symbol in ATTENTION, transforms=symbol not in ATTENTION)


class HybridStack(nn.Module):
    """The layers of a pattern, one after the other."""

    def __init__(self, config: McoreHybridConfig) -> None:
        super().__init__()
        self.layer_types = config.layer_types
        self.mask_types = sorted(set(self.layer_types) & MASKS.keys())
        self.layers = nn.ModuleList(build_layer(config, layer) for layer in range(config.num_layers))

    def forward(self, hidden: Tensor, masks: dict[str, Tensor | None], **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
        """`[b, s, h]` to `[b, s, h]`, and the routers' auxiliary losses; `masks` are one a type of attention."""
        losses: list[Tensor] = []
        for layer, kind in zip(self.layers, self.layer_types, strict=True):
            hidden = run_layer(layer, hidden, losses, attention_mask=masks.get(kind), **kwargs)
        return hidden, losses
