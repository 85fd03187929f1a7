"""The GPT of Megatron-core: pre-norm decoder layers of self-attention and an MLP, in transformers' clothes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import CandidateGenerator, GenerationConfig, GenerationMixin
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention import Attention
from .chunked_loss import CHUNK, check_loss, chunked_loss
from .configuration_mcore import McoreGPTConfig
from .context_parallel import ContextParallel, active, not_in_torchs, whole_rows_only
from .layout import FEW, is_empty, plan
from .modeling_mcore import EXPERTS, NORMS, PREFIXES, McorePreTrainedModel, register_names
from .mtp import MTPOutput, MultiTokenPrediction, head_losses
from .mtp_generation import MTPCandidateGenerator
from .norm import build_norm
from .rope import RotaryEmbedding
from .router import TopKRouter
from .transformer_layer import TransformerLayer, run_layer


@dataclass
class MoeOutput(MoeModelOutputWithPast):
    """transformers' output of a mixture of experts, and in training the sum of its routers' auxiliary losses."""

    aux_loss: Tensor | None = None


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


class TransformerBlock(nn.Module):
    """The stack of layers and the norm after them."""

    def __init__(self, config: McoreGPTConfig) -> None:
        super().__init__()
        self.layer_types = config.layer_types
        self.mask_types = sorted(set(self.layer_types))
        self.layers = nn.ModuleList(TransformerLayer(config, layer) for layer in range(config.num_layers))
        self.final_layernorm = build_norm(config, config.hidden_size)

    def forward(self, hidden: Tensor, masks: dict[str, Tensor | None], **kwargs: Any) -> tuple[Tensor, list[Tensor]]:
        """`[b, s, h]` to `[b, s, h]`, and the routers' auxiliary losses."""
        losses: list[Tensor] = []
        for layer, kind in zip(self.layers, self.layer_types, strict=True):
            hidden = run_layer(layer, hidden, losses, attention_mask=masks[kind], **kwargs)
        return self.final_layernorm(hidden), losses


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
    _no_split_modules: ClassVar[list[str]] = ["TransformerLayer", "MultiTokenPredictionLayer"]
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^(model\.)?mtp\."]  # only the causal model has them
    _can_record_outputs: ClassVar[dict[str, Any]] = {
        "hidden_states": TransformerLayer,
        "attentions": Attention,
        "router_logits": OutputRecorder(TopKRouter, index=0),
    }

    def build_body(self, heads: bool = False) -> McoreGPTModel:
        """The base model under a class's head; with the heads for further tokens if `heads`."""
        return McoreGPTModel(self.config, heads)

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.embedding.word_embeddings = value


class McoreGPTModel(McoreGPTPreTrainedModel):
    """Tokens to hidden states.

    Args:
        heads: whether it holds the heads that predict further tokens, if there are any; it does not run them.
    """

    def __init__(self, config: McoreGPTConfig, heads: bool = False) -> None:
        super().__init__(config)
        self.embedding = Embedding(config)
        self.rotary_pos_emb = None if config.rotary_type is None else RotaryEmbedding(config)
        self.decoder = TransformerBlock(config)
        self.mtp = MultiTokenPrediction(config) if heads and config.mtp_num_layers else None
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
        words = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds  # [b, s, h]
        if (context := active()) is not None:
            given = {**kwargs, "attention_mask": attention_mask, "past_key_values": past_key_values}
            position_ids = context.enter(self, words, position_ids, given)
            attention_mask, use_cache = None, False
        else:
            not_in_torchs(self)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        positions = self.positions(words, past_key_values) if position_ids is None else position_ids
        hidden = self.embedding(words, positions)
        masks, layout = plan(
            self.config, self.decoder.mask_types, hidden, attention_mask, position_ids, past_key_values
        )
        rotation = None if self.rotary_pos_emb is None else self.rotary_pos_emb(positions, self.dtype)
        call = {**layout, **kwargs, "past_key_values": past_key_values, "use_cache": use_cache}
        if self.training and isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            call["expert_tokens"] = attention_mask[:, -hidden.shape[1] :]
        hidden, losses = self.decoder(hidden, masks, position_embeddings=rotation, **call)
        if not any(self.config.moe_layers):
            return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)
        aux_loss = torch.stack([loss.to(hidden.device) for loss in losses]).sum() if losses else None
        return MoeOutput(last_hidden_state=hidden, past_key_values=past_key_values, aux_loss=aux_loss)

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
        self.model = self.build_body(heads=True)
        self.output_layer: nn.Module = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

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
        skip_logits: bool | None = None,
        output_mtp_logits: bool = False,
        output_last_hidden_state: bool = False,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | MoeCausalLMOutputWithPast:
        """Logits `[b, s, V]`, and the loss if `labels` `[b, s]` are given (-100: not counted).

        A mixture of experts in training adds its auxiliary losses to the loss, as Megatron's gradients do, and
        returns their sum as `aux_loss`; in evaluation it has none. `output_router_logits=True` returns each router's.

        Heads that predict further tokens (`mtp_num_layers`) add to the loss in training, as Megatron's gradients have
        it: `mtp_loss_scaling_factor` times the mean of their own losses, `mtp_loss`. In evaluation they do not run.

        Args:
            logits_to_keep: compute only the last so many positions (0: all), or those of an index `[k]`.
            skip_logits: return the loss without the logits, of which there are `loss_chunk_size` tokens' at once.
                None: in training, if the configuration gives that size.
            output_mtp_logits: also each head's, as `mtp_logits` (see `MTPOutput`); needs whole sequences, no cache.
            output_last_hidden_state: also the model's hidden states `[b, s, h]`, after its final norm.
        """
        heads = self.heads_to_run(labels, output_mtp_logits, past_key_values)
        skip = self.skips_logits(labels, skip_logits)
        if (context := active()) is not None:
            context.check(use_cache, heads is not None)
        outputs = self.model(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache=use_cache, **kwargs
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = None if skip else self.to_logits(outputs.last_hidden_state[:, kept, :])  # [b, k, V]
        loss: Tensor | None = None
        share: Tensor | float = 1.0
        if labels is not None:
            share, targets = share_of_step(labels, **kwargs), kwargs
            if context is not None:
                share, targets = self.context_targets(context, input_ids, labels, kwargs)
            loss = self.language_loss(outputs.last_hidden_state, logits, labels=labels, **targets)
        output = as_output(outputs, logits, loss, share)
        if context is not None:
            output = context.leave(self, output)
        if output_last_hidden_state:
            output = MTPOutput(**output, last_hidden_state=outputs.last_hidden_state)
        if heads is None:
            return output
        tokens, given = (input_ids, inputs_embeds), (attention_mask, position_ids)
        states, aux_losses = heads.run(self.model, *tokens, outputs.last_hidden_state, *given, **kwargs)
        further = [None if skip and not output_mtp_logits else self.to_logits(state) for state in states]  # [b, s, V]
        output = MTPOutput(**output, mtp_logits=tuple(cast("list[Tensor]", further)) if output_mtp_logits else None)
        if labels is not None and self.training:
            output.mtp_loss = head_losses(self.language_loss, states, further, labels, *given, **kwargs)
            mtp_loss = output.mtp_loss.mean() * self.config.mtp_loss_scaling_factor
            aux_loss = sum(aux.to(mtp_loss.device) for aux in aux_losses)
            output.loss = output.loss + (mtp_loss + aux_loss) * share
            output.aux_loss = output.aux_loss + aux_loss if aux_losses else output.aux_loss
        return output

    def context_targets(
        self, context: ContextParallel, input_ids: Tensor | None, labels: Tensor, call: dict[str, Any]
    ) -> tuple[Tensor | float, dict[str, Any]]:
        """As `ContextParallel.targets`; for models some of whose tokens are no targets, whatever `labels` say."""
        return context.targets(labels, call)

    def to_logits(self, hidden: Tensor) -> Tensor:
        """`[b, s, h]` to `[b, s, V]`."""
        logits = self.output_layer(hidden)
        return logits if self.config.mup_output_mult == 1.0 else logits * self.config.mup_output_mult

    def skips_logits(self, labels: Tensor | None, asked: bool | None) -> bool:
        """Whether there is to be a loss and no logits."""
        skip = self.training and self.config.loss_chunk_size is not None if asked is None else asked
        if not skip or (labels is None and asked is None):
            return False
        if labels is None:
            raise ValueError("skip_logits without labels leaves nothing to return: give labels")
        check_loss(self.loss_function)
        return True

    def language_loss(self, hidden: Tensor, logits: Tensor | None, **targets: Any) -> Tensor:
        """The mean cross entropy of `logits` `[b, s, V]`, or where there are none of hidden states `[b, s, h]`.

        Args:
            targets: labels and what else transformers' loss functions take.
        """
        if logits is None:
            targets |= {"multiplier": self.config.mup_output_mult, "chunk": self.config.loss_chunk_size or CHUNK}
            loss = chunked_loss(self.output_layer, hidden, **targets)
        else:
            loss = self.loss_function(logits=logits, vocab_size=self.config.vocab_size, **targets)
        return loss if (context := active()) is None else context.sum(loss)

    def heads_to_run(
        self, labels: Tensor | None, output_mtp_logits: bool, past_key_values: Cache | None
    ) -> MultiTokenPrediction | None:
        """The heads, if they are wanted: for their logits, or for their part of the loss in training."""
        heads = getattr(self.model, "mtp", None)
        if heads is None and output_mtp_logits:
            raise ValueError("output_mtp_logits: the model has no heads for further tokens, mtp_num_layers is None")
        learn = self.training and labels is not None and self.config.mtp_loss_scaling_factor != 0
        if heads is None or not (learn or output_mtp_logits):
            return None
        if not is_empty(past_key_values):
            raise ValueError(
                "heads for further tokens run over whole sequences, but past_key_values holds tokens already: leave it "
                "out, or train without the heads (mtp_loss_scaling_factor 0, or mtp_num_layers None at from_pretrained)"
            )
        return heads

    def _get_candidate_generator(
        self, generation_config: GenerationConfig, logits_processor: Any, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> CandidateGenerator:
        """Who drafts for `generate`'s assisted decoding: the model's own heads with `use_mtp=True`."""
        if getattr(generation_config, "use_mtp", None):
            cache = model_kwargs.get("past_key_values")
            return MTPCandidateGenerator(self, generation_config, logits_processor, cache)
        return super()._get_candidate_generator(
            generation_config, logits_processor=logits_processor, model_kwargs=model_kwargs, **kwargs
        )

    def _get_static_cache_init_shape(self) -> Any:
        """Heads and channels of a cache made ahead of its keys; None, which waits for them, where they are others'.

        A rank or a device has its share of heads, and latents are not shaped as keys and values both.
        """
        devices = set((getattr(self, "hf_device_map", None) or {}).values())
        config = self.config.get_text_config()  # its own, or a part of a multimodal model's
        if config.multi_latent_attention or (self._tp_size or 1) > 1 or len(devices) > 1:
            return None
        return config.num_query_groups, config.kv_channels

    @staticmethod
    def create_masks_for_generate(
        attention_mask: Tensor | None, past_key_values: Cache | None, **kwargs: Any
    ) -> Tensor | dict[str, Tensor] | None:
        """Masks that `generate` prepares for a static cache: none for a prefill, nor its chunks, which go without."""
        length = kwargs["inputs_embeds"].shape[1]
        if length >= FEW or (length > 1 and is_empty(past_key_values)):
            return attention_mask
        return create_masks_for_generate(attention_mask=attention_mask, past_key_values=past_key_values, **kwargs)


def as_output(
    outputs: BaseModelOutputWithPast | MoeOutput, logits: Tensor | None, loss: Tensor | None, share: Tensor | float
) -> CausalLMOutputWithPast | MoeCausalLMOutputWithPast:
    """The causal model's output from its base model's; auxiliary losses join the loss by their `share` of the step."""
    common = {
        "logits": logits,
        "past_key_values": outputs.past_key_values,
        "hidden_states": outputs.hidden_states,
        "attentions": outputs.attentions,
    }
    if not isinstance(outputs, MoeOutput):
        return CausalLMOutputWithPast(loss=loss, **common)
    aux_loss = outputs.aux_loss
    if loss is not None and aux_loss is not None:
        loss = loss + aux_loss * share
    return MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss, router_logits=outputs.router_logits, **common)


def share_of_step(
    labels: Tensor, num_items_in_batch: Tensor | int | None = None, shift_labels: Tensor | None = None, **kwargs: Any
) -> Tensor | float:
    """The part of an optimizer's step that this batch is: 1, or its share of `num_items_in_batch` tokens.

    Trainer gives that number where it accumulates gradients; the language loss is divided by it too.
    """
    if num_items_in_batch is None:
        return 1.0
    targets = labels[..., 1:] if shift_labels is None else shift_labels
    return (targets != -100).sum() / num_items_in_batch


class McoreGPTForSequenceClassification(GenericForSequenceClassification, McoreGPTPreTrainedModel):
    """Tokens to one score a label, read at each row's last token."""

    def __init__(self, config: McoreGPTConfig) -> None:
        # Past the generic class, which asks AutoModel for the body: that knows no class that travels as code.
        super(GenericForSequenceClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = self.build_body()
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()
        self.register_forward_pre_hook(whole_rows_only)


class McoreGPTForTokenClassification(GenericForTokenClassification, McoreGPTPreTrainedModel):
    """Tokens to one score a label and token."""

    def __init__(self, config: McoreGPTConfig) -> None:
        super(GenericForTokenClassification, self).__init__(config)
        self.num_labels = config.num_labels
        self.model = self.build_body()
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()
        self.register_forward_pre_hook(whole_rows_only)


class McoreGPTForQuestionAnswering(GenericForQuestionAnswering, McoreGPTPreTrainedModel):
    """Tokens to the scores of an answer's start and end."""

    get_input_embeddings = McoreGPTPreTrainedModel.get_input_embeddings
    set_input_embeddings = McoreGPTPreTrainedModel.set_input_embeddings

    def __init__(self, config: McoreGPTConfig) -> None:
        super(GenericForQuestionAnswering, self).__init__(config)
        self.model = self.build_body()
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()
        self.register_forward_pre_hook(whole_rows_only)


register_names("mcore_gpt", *PREFIXES, *NORMS, *EXPERTS)
register_names("McoreGPTModel", *NORMS, *EXPERTS)

McoreGPTModel.register_for_auto_class("AutoModel")
McoreGPTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
McoreGPTForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
McoreGPTForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
McoreGPTForQuestionAnswering.register_for_auto_class("AutoModelForQuestionAnswering")
