"""Multi-token prediction of hybrids: each head is a stack of layers by a pattern of its own, as in Megatron's main."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .hybrid_stack import HybridStack
from .layout import plan
from .mtp import MultiTokenPrediction
from .norm import build_norm
from .state_space import rows_of

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from .configuration_mcore_hybrid import McoreHybridConfig

PLAN_PREFIXES = ("decoder.layers.*.", "layers.*.mtp_model_layer.layers.*.")


class HeadsConfig:
    """The model's configuration as the layers of a head see it: that of a model of the heads' pattern.

    A view, so that what is set on the model's later (its attention implementation) is set here.
    """

    def __init__(self, config: McoreHybridConfig) -> None:
        self.whole = config
        like, pattern = copy.copy(config), config.mtp_layer_pattern or ""
        like.hybrid_layer_pattern = self.hybrid_layer_pattern = pattern
        like.num_layers = self.num_layers = len(pattern)
        self.layer_types, self.rotary_layers, self.moe_layers = like.layer_types, like.rotary_layers, like.moe_layers

    def __getattr__(self, name: str) -> Any:
        if name == "whole":  # not there yet while a copy is made
            raise AttributeError(name)
        return getattr(self.whole, name)


class HybridHead(nn.Module):
    """One head: `norm(stack(eh_proj(norm(words) | norm(hidden))))`."""

    def __init__(self, config: McoreHybridConfig) -> None:
        super().__init__()
        self.enorm = build_norm(config, config.hidden_size)
        self.hnorm = build_norm(config, config.hidden_size)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)  # of words | hidden
        self.mtp_model_layer = HybridStack(cast("McoreHybridConfig", HeadsConfig(config)))
        self.final_layernorm = build_norm(config, config.hidden_size)

    def forward(self, words: Tensor, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
        """Embedded next tokens and hidden states to hidden states, `[b, s, h]` all, and the routers' losses."""
        both = torch.cat((self.enorm(words), self.hnorm(hidden)), dim=-1)  # [b, s, 2 h]
        hidden, losses = self.mtp_model_layer(self.eh_proj(both), *args, **kwargs)
        return self.final_layernorm(hidden), losses


class HybridMultiTokenPrediction(MultiTokenPrediction):
    """The heads of a hybrid; they run over whole sequences."""

    def __init__(self, config: McoreHybridConfig) -> None:
        super(MultiTokenPrediction, self).__init__()
        self.config = config
        self.heads = config.mtp_num_layers or 0
        self.layers = nn.ModuleList(
            HybridHead(config) for _ in range(1 if config.mtp_use_repeated_layer else self.heads)
        )
        inside = {name.replace(*PLAN_PREFIXES, 1): style for name, style in (config.base_model_tp_plan or {}).items()}
        self._tp_plan = self.plan_like_layers(inside)
        self._fsdp_plan = {"layers.*": "free_full_weight"}

    def step(
        self,
        head: int,
        words: Tensor,
        hidden: Tensor,
        attention_mask: Tensor | dict[str, Tensor] | None,
        position_ids: Tensor | None,
        losses: list[Tensor],
        past_key_values: Cache | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Hidden states `[b, s, h]` of one head (from 0) from embedded `words`, whole sequences without a cache."""
        layer = cast("HybridHead", self.layers[min(head, len(self.layers) - 1)])
        kinds = layer.mtp_model_layer.mask_types
        masks, layout = plan(self.config, kinds, hidden, attention_mask, position_ids, None)
        padding = None if isinstance(attention_mask, dict) else attention_mask
        rows = rows_of(padding, position_ids, hidden, fresh=True)
        hidden, more = layer(words, hidden, masks, rows=rows, position_embeddings=rotation, **layout, **kwargs)
        losses += more
        return hidden
