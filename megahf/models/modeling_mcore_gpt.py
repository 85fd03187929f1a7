"""The GPT of Megatron-core: pre-norm decoder layers of self-attention and an MLP, in transformers' clothes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention import SelfAttention
from .configuration_mcore import McoreGPTConfig
from .layout import is_empty, plan
from .mlp import MLP
from .modeling_mcore import NORMS, PREFIXES, McorePreTrainedModel, register_names
from .norm import build_norm
from .rope import RotaryEmbedding


class Embedding(nn.Module):
    """Word vectors, plus vectors of learned positions where the model has them."""

    def __init__(self, config: McoreGPTConfig) -> None:
        super().__init__()
        learned = config.position_embedding_type == "learned_absolute"
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size) if learned else None
        self.multiplier = config.mup_embedding_mult
        self.in_float32 = config.fp32_residual_connection
        self.dropout = config.hidden_dropout

    def forward(self, words: Tensor, position_ids: Tensor) -> Tensor:
        """Word vectors `[b, s, h]` and positions `[b, s]` to the first hidden states `[b, s, h]`."""
        hidden = words if self.position_embeddings is None else words + self.position_embeddings(position_ids)
        if self.multiplier != 1.0:
            hidden = hidden * self.multiplier
        return F.dropout(hidden.float() if self.in_float32 else hidden, self.dropout, self.training)


class TransformerLayer(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: McoreGPTConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = build_norm(config, config.hidden_size)
        self.self_attention = SelfAttention(config, layer_idx)
        self.pre_mlp_layernorm = build_norm(config, config.hidden_size)
        self.mlp = MLP(config)
        self.dropout = config.hidden_dropout

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        hidden = self.add(hidden, self.self_attention(self.input_layernorm(hidden), **kwargs)[0])
        return self.add(hidden, self.mlp(self.pre_mlp_layernorm(hidden)))

    def add(self, hidden: Tensor, update: Tensor) -> Tensor:
        return hidden + (F.dropout(update, self.dropout) if self.training else update)


class TransformerBlock(nn.Module):
    """The stack of layers and the norm after them."""

    def __init__(self, config: McoreGPTConfig) -> None:
        super().__init__()
        self.layer_types = config.layer_types
        self.mask_types = sorted(set(self.layer_types))
        self.layers = nn.ModuleList(TransformerLayer(config, layer) for layer in range(config.num_layers))
        self.final_layernorm = build_norm(config, config.hidden_size)

    def forward(self, hidden: Tensor, masks: dict[str, Tensor | None], **kwargs: Any) -> Tensor:
        for layer, kind in zip(self.layers, self.layer_types, strict=True):
            hidden = layer(hidden, attention_mask=masks[kind], **kwargs)
        return self.final_layernorm(hidden)


class McoreGPTPreTrainedModel(McorePreTrainedModel):
    """What the GPT classes share."""

    config_class = McoreGPTConfig
    auto_map: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_mcore.McoreGPTConfig",
        "AutoModel": "modeling_mcore_gpt.McoreGPTModel",
        "AutoModelForCausalLM": "modeling_mcore_gpt.McoreGPTForCausalLM",
        "AutoModelForSequenceClassification": "modeling_mcore_gpt.McoreGPTForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_mcore_gpt.McoreGPTForTokenClassification",
        "AutoModelForQuestionAnswering": "modeling_mcore_gpt.McoreGPTForQuestionAnswering",
    }
    _no_split_modules: ClassVar[list[str]] = ["TransformerLayer"]
    _can_record_outputs: ClassVar[dict[str, Any]] = {"hidden_states": TransformerLayer, "attentions": SelfAttention}

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.embedding.word_embeddings = value


class McoreGPTModel(McoreGPTPreTrainedModel):
    """Tokens to hidden states."""

    def __init__(self, config: McoreGPTConfig) -> None:
        super().__init__(config)
        self.embedding = Embedding(config)
        rotary = config.position_embedding_type in ("rope", "yarn")
        self.rotary_pos_emb = RotaryEmbedding(config) if rotary else None
        self.decoder = TransformerBlock(config)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
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
        """Hidden states `[b, s, h]` of tokens `[b, s]` (or of their word vectors `inputs_embeds` `[b, s, h]`).

        Args:
            attention_mask: `[b, past + s]`, 1 a token and 0 padding; or a mask `[b, 1, s, keys]`.
            position_ids: `[b, s]`; counted from the cache if None. Where they start over at 0, packed documents do.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        words = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds  # [b, s, h]
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        positions = self.positions(words, past_key_values) if position_ids is None else position_ids
        hidden = self.embedding(words, positions)
        masks, layout = plan(
            self.config, self.decoder.mask_types, hidden, attention_mask, position_ids, past_key_values
        )
        rotation = None if self.rotary_pos_emb is None else self.rotary_pos_emb(positions, self.dtype)
        call = {**layout, **kwargs, "past_key_values": past_key_values, "use_cache": use_cache}
        hidden = self.decoder(hidden, masks, position_embeddings=rotation, **call)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)

    def positions(self, words: Tensor, past_key_values: Cache | None) -> Tensor:
        """Positions `[1, s]` counted on from the cache."""
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        length = words.shape[1]
        limit = self.config.max_position_embeddings
        if (
            self.config.position_embedding_type == "learned_absolute"
            and isinstance(seen, int)
            and seen + length > limit
        ):
            raise ValueError(f"{seen + length} tokens, but the model has learned {limit} positions")
        return (torch.arange(length, device=words.device) + seen)[None]


class McoreGPTForCausalLM(McoreGPTPreTrainedModel, GenerationMixin):
    """Tokens to logits of the next token."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"output_layer.weight": "model.embedding.word_embeddings.weight"}
    _tp_plan: ClassVar[dict[str, str]] = {"output_layer": "colwise_gather_output"}
    _fsdp_plan: ClassVar[dict[str, str]] = {"output_layer": "keep_full_weight"}

    def __init__(self, config: McoreGPTConfig) -> None:
        super().__init__(config)
        self.model = McoreGPTModel(config)
        self.output_layer: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.output_layer

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.output_layer = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits `[b, s, V]`, and the loss if `labels` `[b, s]` are given (-100: not counted).

        Args:
            logits_to_keep: compute only the last so many positions (0: all), or those of an index `[k]`.
        """
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache=use_cache, **kwargs
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.output_layer(outputs.last_hidden_state[:, kept, :])  # [b, k, V]
        if self.config.mup_output_mult != 1.0:
            logits = logits * self.config.mup_output_mult
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _get_static_cache_init_shape(self) -> Any:
        """Shape of a cache made ahead of its keys; None, which waits for them, where ranks share out the heads.

        transformers knows which matrix makes a rank's keys by names that are not Megatron's.
        """
        return super()._get_static_cache_init_shape() if (self._tp_size or 1) == 1 else None

    @staticmethod
    def create_masks_for_generate(
        attention_mask: Tensor | None, past_key_values: Cache | None, **kwargs: Any
    ) -> Tensor | dict[str, Tensor] | None:
        """Masks that `generate` prepares for a static cache: none for a prefill, which goes without."""
        if kwargs["inputs_embeds"].shape[1] > 1 and is_empty(past_key_values):
            return attention_mask
        return create_masks_for_generate(attention_mask=attention_mask, past_key_values=past_key_values, **kwargs)


class McoreGPTForSequenceClassification(GenericForSequenceClassification, McoreGPTPreTrainedModel):
    """Tokens to one score a label, read at each row's last token."""

    def __init__(self, config: McoreGPTConfig) -> None:
        # Past the generic class, which asks AutoModel for the body: that knows no class that travels as code.
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = McoreGPTModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class McoreGPTForTokenClassification(GenericForTokenClassification, McoreGPTPreTrainedModel):
    """Tokens to one score a label and token."""

    def __init__(self, config: McoreGPTConfig) -> None:
        super(GenericForTokenClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = McoreGPTModel(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


class McoreGPTForQuestionAnswering(GenericForQuestionAnswering, McoreGPTPreTrainedModel):
    """Tokens to the scores of an answer's start and end."""

    get_input_embeddings = McoreGPTPreTrainedModel.get_input_embeddings
    set_input_embeddings = McoreGPTPreTrainedModel.set_input_embeddings

    def __init__(self, config: McoreGPTConfig) -> None:
        super(GenericForQuestionAnswering, self).__init__(config)
        self.model = McoreGPTModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()


register_names("mcore_gpt", *PREFIXES, *NORMS)
register_names("McoreGPTModel", *NORMS)

McoreGPTModel.register_for_auto_class("AutoModel")
McoreGPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
McoreGPTForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
McoreGPTForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
McoreGPTForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")
