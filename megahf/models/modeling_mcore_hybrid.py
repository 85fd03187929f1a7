"""Megatron-core's hybrid: Mamba mixers, attention, MLPs and experts stacked by a pattern, each a layer by itself.

All but the mixers is the GPT's. Megatron builds a GPT itself as such a stack: `*-*-`, or `*E*E` with experts.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

from .configuration_mcore_hybrid import McoreHybridConfig
from .conv import CausalConv1d
from .hybrid_stack import HybridStack, MambaLayer
from .layout import FEW, MASKS, is_empty
from .mamba import GatedRMSNorm, MambaMixer
from .mamba1 import Mamba1Mixer
from .mlp import ResidualLinear
from .modeling_mcore import EXPERTS, NORMS, PREFIXES, register_names
from .modeling_mcore_gpt import (
    Embedding,
    McoreGPTForCausalLM,
    McoreGPTForQuestionAnswering,
    McoreGPTForSequenceClassification,
    McoreGPTForTokenClassification,
    McoreGPTModel,
    McoreGPTPreTrainedModel,
)
from .moe import Experts
from .mtp_hybrid import HybridMultiTokenPrediction
from .norm import build_norm
from .rope import RotaryEmbedding
from .state_space import rows_of
from .transformer_layer import TransformerLayer

if TYPE_CHECKING:
    from .modeling_mcore_gpt import TransformerBlock


class HybridBlock(HybridStack):
    """The stack of layers and the norm after them; without attention it also has the cache count its tokens."""

    def __init__(self, config: McoreHybridConfig) -> None:
        super().__init__(config)
        self.counting_layer = config.counting_layer
        self.final_norm = build_norm(config, config.hidden_size)

    def forward(
        self,
        hidden: Tensor,
        masks: dict[str, Tensor | None],
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, list[Tensor]]:
        if self.counting_layer is not None and past_key_values is not None:
            keys = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
            past_key_values.update(keys, keys, self.counting_layer)
        hidden, losses = super().forward(hidden, masks, past_key_values=past_key_values, **kwargs)
        return self.final_norm(hidden), losses


class McoreHybridPreTrainedModel(McoreGPTPreTrainedModel):
    """What the hybrid classes share."""

    config_class = McoreHybridConfig
    auto_map: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_mcore_hybrid.McoreHybridConfig",
        "AutoModel": "modeling_mcore_hybrid.McoreHybridModel",
        "AutoModelForCausalLM": "modeling_mcore_hybrid.McoreHybridForCausalLM",
        "AutoModelForSequenceClassification": "modeling_mcore_hybrid.McoreHybridForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_mcore_hybrid.McoreHybridForTokenClassification",
        "AutoModelForQuestionAnswering": "modeling_mcore_hybrid.McoreHybridForQuestionAnswering",
    }
    _no_split_modules: ClassVar[list[str]] = ["TransformerLayer", "MambaLayer", "HybridHead"]
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        **McoreGPTPreTrainedModel._can_record_outputs,
        "hidden_states": [TransformerLayer, MambaLayer],
    }

    def build_body(self, heads: bool = False) -> McoreHybridModel:
        return McoreHybridModel(self.config, heads)

    @property
    def _is_stateful(self) -> bool:
        """Whether a token once taken in cannot be taken back; transformers refuses assisted generation then."""
        return "M" in self.config.hybrid_layer_pattern

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the GPT's, but a layer writes into the residual stream once and not twice: narrower by sqrt(L)."""
        super()._init_weights(module)
        narrow = self.config.init_method_std / math.sqrt(self.config.num_layers)
        if isinstance(module, (MambaMixer, Mamba1Mixer, CausalConv1d)):
            module.initialise()
        elif isinstance(module, GatedRMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, ResidualLinear):
            init.normal_(module.weight, mean=0.0, std=narrow)
        elif isinstance(module, Experts):
            init.normal_(module.down_proj, mean=0.0, std=narrow)


class McoreHybridModel(McoreHybridPreTrainedModel, McoreGPTModel):
    """Tokens to hidden states.

    Args:
        heads: whether it holds the heads that predict further tokens, if there are any; it does not run them.
    """

    def __init__(self, config: McoreHybridConfig, heads: bool = False) -> None:
        super(McoreGPTModel, self).__init__(config)
        self.embedding = Embedding(config)
        self.rotary_pos_emb = None if config.rotary_type is None else RotaryEmbedding(config)
        self.decoder = cast("TransformerBlock", HybridBlock(config))  # it is called and walked as one
        self.mtp = HybridMultiTokenPrediction(config) if heads and config.mtp_num_layers else None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As the GPT's: mixers leave padding out as attention does, and start each packed document from nothing."""
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is not None and self._is_stateful:
            mask = attention_mask.get("linear_attention") if isinstance(attention_mask, dict) else attention_mask
            kwargs["rows"] = rows_of(mask, position_ids, tokens, is_empty(past_key_values))
        return super().forward(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache=use_cache, **kwargs
        )


class McoreHybridForCausalLM(McoreHybridPreTrainedModel, McoreGPTForCausalLM):
    """Tokens to logits of the next token."""

    def _get_candidate_generator(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        """As the GPT's, but the heads do not draft: a state would have to be taken back with a rejected token."""
        if getattr(generation_config, "use_mtp", None):
            raise ValueError("use_mtp: a hybrid's heads for further tokens go over whole sequences and cannot draft")
        return super()._get_candidate_generator(generation_config, *args, **kwargs)

    @staticmethod
    def create_masks_for_generate(
        attention_mask: Tensor | None, past_key_values: Cache | None, **kwargs: Any
    ) -> Tensor | dict[str, Any] | None:
        """Masks that `generate` prepares for a static cache: none for a prefill, nor its chunks, which go without.

        transformers' own function gives up where there are layers that need no mask.
        """
        config, length = kwargs["config"], kwargs["inputs_embeds"].shape[1]
        if length >= FEW or (length > 1 and is_empty(past_key_values)):
            return attention_mask
        call = {name: kwargs.get(name) for name in ("config", "inputs_embeds", "position_ids")}
        call |= {"attention_mask": attention_mask, "past_key_values": past_key_values}
        masks = {kind: MASKS[kind](**call) for kind in sorted(MASKS.keys() & set(config.layer_types))}
        return {**masks, "linear_attention": None if length == 1 else attention_mask}  # one token is no padding


class McoreHybridForSequenceClassification(McoreHybridPreTrainedModel, McoreGPTForSequenceClassification):
    """Tokens to one score a label, read at each row's last token."""


class McoreHybridForTokenClassification(McoreHybridPreTrainedModel, McoreGPTForTokenClassification):
    """Tokens to one score a label and token."""


class McoreHybridForQuestionAnswering(McoreHybridPreTrainedModel, McoreGPTForQuestionAnswering):
    """Tokens to the scores of an answer's start and end."""


register_names("mcore_hybrid", *PREFIXES, *NORMS, *EXPERTS)
register_names("McoreHybridModel", *NORMS, *EXPERTS)

McoreHybridModel.register_for_auto_class("AutoModel")
McoreHybridForCausalLM.register_for_auto_class("AutoModelForCausalLM")
McoreHybridForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
McoreHybridForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
McoreHybridForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")
