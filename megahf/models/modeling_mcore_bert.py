"""The BERT of Megatron-core: pre-norm layers that look both ways, and heads for masked words and pairs of sentences.

Unlike transformers' BERT the norms stand in front of the matrices, as in a GPT; transformers calls it MegatronBert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    ModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .attention import Attention
from .configuration_mcore_bert import McoreBertConfig
from .context_parallel import whole_rows_only
from .modeling_mcore import NORMS, McorePreTrainedModel, register_names
from .modeling_mcore_gpt import Embedding, TransformerBlock
from .norm import build_norm
from .rope import RotaryEmbedding
from .transformer_layer import TransformerLayer

PREFIXES = tuple((f"^{part}\\.", f"^model\\.{part}\\.") for part in ("embedding", "encoder", "pooler"))


@dataclass
class McoreBertForPreTrainingOutput(ModelOutput):
    """Scores of words and of pairs of sentences, under the names that transformers has for them.

    Attributes:
        prediction_logits: `[b, s, V]`.
        seq_relationship_logits: the binary head's, `[b, 2]`; None without it.
    """

    loss: Tensor | None = None
    prediction_logits: Tensor | None = None
    seq_relationship_logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class BertEmbedding(Embedding):
    """Vectors of words, of learned positions and of token types, as far as the model has them."""

    def __init__(self, config: McoreBertConfig) -> None:
        super().__init__(config)
        types = config.num_tokentypes
        self.tokentype_embeddings = nn.Embedding(types, config.hidden_size) if types else None

    def forward(self, words: Tensor, position_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Word vectors `[b, s, h]`, positions `[b, s]` and token types `[b, s]` to the first hidden states."""
        hidden = words if self.position_embeddings is None else words + self.position_embeddings(position_ids)
        if self.tokentype_embeddings is not None:
            hidden = hidden + self.tokentype_embeddings(token_type_ids)
        return F.dropout(hidden.float() if self.in_float32 else hidden, self.dropout, self.training)


class Pooler(nn.Module):
    """`tanh(dense(x))` of a row's first token."""

    def __init__(self, config: McoreBertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[b, s, h]` to `[b, h]`."""
        return torch.tanh(self.dense(hidden[:, 0]))


class BertLMHead(nn.Module):
    """`norm(gelu(dense(x)))`, in front of the output layer. The gelu is the exact one, whatever the layers' is."""

    def __init__(self, config: McoreBertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = build_norm(config, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[b, s, h]` to `[b, s, h]`."""
        return self.layer_norm(F.gelu(self.dense(hidden)))


class McoreBertPreTrainedModel(McorePreTrainedModel):
    """What the BERT classes share."""

    config_class = McoreBertConfig
    auto_map: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_mcore_bert.McoreBertConfig",
        "AutoModel": "modeling_mcore_bert.McoreBertModel",
        "AutoModelForPreTraining": "modeling_mcore_bert.McoreBertForPreTraining",
        "AutoModelForMaskedLM": "modeling_mcore_bert.McoreBertForMaskedLM",
        "AutoModelForSequenceClassification": "modeling_mcore_bert.McoreBertForSequenceClassification",
        "AutoModelForTokenClassification": "modeling_mcore_bert.McoreBertForTokenClassification",
    }
    _no_split_modules: ClassVar[list[str]] = ["TransformerLayer"]
    _can_record_outputs: ClassVar[dict[str, Any]] = {"hidden_states": TransformerLayer, "attentions": Attention}
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = []

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return False

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.embedding.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.embedding.word_embeddings = value


class McoreBertModel(McoreBertPreTrainedModel):
    """Tokens to hidden states.

    Args:
        pooling: whether there is the pooler; by default where the model has a binary head, which it feeds.
    """

    def __init__(self, config: McoreBertConfig, pooling: bool | None = None) -> None:
        super().__init__(config)
        self.embedding = BertEmbedding(config)
        self.rotary_pos_emb = None if config.rotary_type is None else RotaryEmbedding(config)
        self.encoder = TransformerBlock(config)
        self.pooler = Pooler(config) if (config.add_binary_head if pooling is None else pooling) else None
        self.post_init()
        self.register_forward_pre_hook(whole_rows_only)

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Hidden states `[b, s, h]` of tokens `[b, s]` (or of their word vectors), and `pooler_output` `[b, h]`.

        Args:
            attention_mask: `[b, s]`, 1 a token and 0 padding; or a mask `[b, 1, s, s]`.
            token_type_ids: `[b, s]`, the sentence of each token; 0 if None.
            position_ids: `[b, s]`; counted from each row's start if None, padding included, as in Megatron.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds is needed")
        words = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds  # [b, s, h]
        positions = self.positions(words) if position_ids is None else position_ids
        hidden = self.embedding(words, positions, self.types(words, token_type_ids))
        mask = create_bidirectional_mask(config=self.config, inputs_embeds=hidden, attention_mask=attention_mask)
        rotation = None if self.rotary_pos_emb is None else self.rotary_pos_emb(positions, self.dtype)
        call = {**kwargs, "position_embeddings": rotation, "is_causal": False}
        hidden, _ = self.encoder(hidden, {"full_attention": mask}, **call)
        pooled = None if self.pooler is None else self.pooler(hidden)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled)

    def positions(self, words: Tensor) -> Tensor:
        """Positions `[1, s]`."""
        length, limit = words.shape[1], self.config.max_position_embeddings
        if self.config.position_embedding_type == "learned_absolute" and length > limit:
            raise ValueError(f"{length} tokens, but the model has learned {limit} positions")
        return torch.arange(length, device=words.device)[None]

    def types(self, words: Tensor, token_type_ids: Tensor | None) -> Tensor | None:
        """Token types `[b, s]`; None for a model that has none, to which a tokenizer may give zeros."""
        if self.config.num_tokentypes:
            return words.new_zeros(words.shape[:2], dtype=torch.long) if token_type_ids is None else token_type_ids
        if token_type_ids is not None and not torch.compiler.is_compiling() and token_type_ids.any():
            raise ValueError("token_type_ids are given, but the model has no token types: num_tokentypes is 0")
        return None


class McoreBertForPreTraining(McoreBertPreTrainedModel):
    """Megatron's BertModel: tokens to the scores of masked words, and of whether the second sentence follows."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"output_layer.weight": "model.embedding.word_embeddings.weight"}
    _tp_plan: ClassVar[dict[str, str]] = {"output_layer": "colwise_gather_output"}
    _fsdp_plan: ClassVar[dict[str, str]] = {"output_layer": "keep_full_weight"}

    def __init__(self, config: McoreBertConfig, binary: bool | None = None) -> None:
        super().__init__(config)
        binary = config.add_binary_head if binary is None else binary
        self.model = McoreBertModel(config, pooling=binary)
        self.lm_head = BertLMHead(config)
        self.output_layer: nn.Module = nn.Linear(config.hidden_size, config.vocab_size)
        self.binary_head = nn.Linear(config.hidden_size, 2) if binary else None
        self.loss_type = "ForMaskedLM"
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        **kwargs: Any,
    ) -> McoreBertForPreTrainingOutput:
        """Scores, and the loss of what labels are given: the sum of both, as Megatron's.

        Args:
            labels: `[b, s]`, -100 where a word is not masked.
            next_sentence_label: `[b]`, 1 where the second sentence does not follow, as Megatron's `is_random`; -100
                or -1 where it is not known.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        outputs = self.model(*inputs, **kwargs)
        logits = self.output_layer(self.lm_head(outputs.last_hidden_state))  # [b, s, V]
        pairs = None if self.binary_head is None else self.binary_head(outputs.pooler_output)  # [b, 2]
        losses = []
        if labels is not None:
            losses.append(self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs))
        if next_sentence_label is not None and pairs is not None:
            known = next_sentence_label.view(-1)
            losses.append(F.cross_entropy(pairs.float(), known.masked_fill(known < 0, -100)))
        return McoreBertForPreTrainingOutput(
            loss=torch.stack(losses).sum() if losses else None,
            prediction_logits=logits,
            seq_relationship_logits=pairs,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class McoreBertForMaskedLM(McoreBertForPreTraining):
    """Tokens to the scores of masked words; the binary head and its pooler are left out."""

    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^(model\.)?pooler\.", r"^binary_head\."]

    def __init__(self, config: McoreBertConfig) -> None:
        super().__init__(config, binary=False)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Logits `[b, s, V]`, and the loss if `labels` `[b, s]` are given (-100 where a word is not masked)."""
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, labels)
        outputs = super().forward(*inputs, **kwargs)
        return MaskedLMOutput(
            loss=outputs.loss,
            logits=outputs.prediction_logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class McoreBertClassifier(McoreBertPreTrainedModel):
    """A score a label, of whole sequences from the pooler or of each token."""

    pooled: ClassVar[bool]

    def __init__(self, config: McoreBertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = McoreBertModel(config, pooling=self.pooled)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.classification_head = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | TokenClassifierOutput:
        """Logits `[b, labels]`, or `[b, s, labels]` of tokens, and the loss if `labels` `[b]` or `[b, s]` are given.

        Of sequences by transformers' `problem_type`; of tokens -100 is not counted.
        """
        outputs = self.model(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, **kwargs)
        logits = self.classification_head(
            self.dropout(outputs.pooler_output if self.pooled else outputs.last_hidden_state)
        )
        loss, result = None, SequenceClassifierOutput if self.pooled else TokenClassifierOutput
        if labels is not None:
            named = {"pooled_logits" if self.pooled else "logits": logits, "labels": labels, "config": self.config}
            loss = self.loss_function(**named, **kwargs)
        return result(loss, logits, outputs.hidden_states, outputs.attentions)


class McoreBertForSequenceClassification(McoreBertClassifier):
    """Tokens to one score a label, from the pooler."""

    pooled = True


class McoreBertForTokenClassification(McoreBertClassifier):
    """Tokens to one score a label and token."""

    pooled = False
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^(model\.)?pooler\."]


register_names("mcore_bert", *PREFIXES, *NORMS)
register_names("McoreBertModel", *NORMS)

McoreBertModel.register_for_auto_class("AutoModel")
McoreBertForPreTraining.register_for_auto_class("AutoModelForPreTraining")
McoreBertForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
McoreBertForSequenceClassification.register_for_auto_class("AutoModelForSequenceClassification")
McoreBertForTokenClassification.register_for_auto_class("AutoModelForTokenClassification")
