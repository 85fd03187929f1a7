"""Every kind of BERT the tests know, as Megatron arguments over its defaults, and the mark that says it is one."""

from __future__ import annotations

from typing import Any

from kinds import EXACT_GELU, SMALL

from megahf.bert import MARK

BERT: dict[str, Any] = {**SMALL, **EXACT_GELU, MARK: True, "tokenizer_type": "BertWordPieceLowerCase"}

KINDS: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "bert_without_binary_head": {**BERT, "bert_binary_head": False},
    "bert_tanh": {**BERT, "bias_gelu_fusion": True},
    "bert_untied": {**BERT, "untie_embeddings_and_output_weights": True},
    "bert_rope": {**BERT, "position_embedding_type": "rope", "rotary_percent": 0.5},
    "bert_modern": {  # what else the config passes on to its layers
        **BERT,
        "bert_binary_head": False,
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "group_query_attention": True,
        "num_query_groups": 4,
        "ffn_hidden_size": 96,
        "attention_output_gate": True,
        "softmax_type": "learnable",
    },
}
