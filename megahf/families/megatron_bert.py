"""MegatronBert: Megatron's BERT in transformers, with its norms before the matrices; BERT itself is another function.

transformers has one activation for the layers and for the head before the words, where Megatron's head is always the
exact gelu; and it always adds a token type, which is a row of zeros for a model without types.
"""

from __future__ import annotations

from typing import Any

from ..cuts import Config
from .family import GAMMA, ONE, QKV, Family, Field, Line, Settings, Theirs, only, pair

LAYER, THEIRS = "encoder.layers.{l}.", "bert.encoder.layer.{l}."
AT, MLP = f"{LAYER}self_attention.", f"{LAYER}mlp."
SELF, TRANSFORM = f"{THEIRS}attention.self.", "cls.predictions.transform."
TYPES = "bert.embeddings.token_type_embeddings.weight"
PRETRAINING, MASKED = "MegatronBertForPreTraining", "MegatronBertForMaskedLM"


def untied_bias(config: Config) -> tuple[str, ...]:
    """Where the output matrix is not tied, transformers stores its bias twice, and adds one."""
    return () if config.tie_word_embeddings else ("cls.predictions.decoder.bias",)


LINES = (
    Line("embedding.word_embeddings.weight", ("bert.embeddings.word_embeddings.weight",), ONE),
    Line("embedding.position_embeddings.weight", ("bert.embeddings.position_embeddings.weight",), ONE),
    Line("embedding.tokentype_embeddings.weight", (TYPES,), ONE),
    *pair(f"{AT}linear_qkv.layer_norm_", f"{THEIRS}attention.ln.", GAMMA, ONE),
    Line(f"{AT}linear_qkv.weight", tuple(f"{SELF}{x}.weight" for x in ("query", "key", "value")), QKV),
    Line(f"{AT}linear_qkv.bias", tuple(f"{SELF}{x}.bias" for x in ("query", "key", "value")), QKV),
    *pair(f"{AT}linear_proj.", f"{THEIRS}attention.output.dense.", ONE, ONE),
    *pair(f"{MLP}linear_fc1.layer_norm_", f"{THEIRS}ln.", GAMMA, ONE),
    *pair(f"{MLP}linear_fc1.", f"{THEIRS}intermediate.dense.", ONE, ONE),
    *pair(f"{MLP}linear_fc2.", f"{THEIRS}output.dense.", ONE, ONE),
    *pair("encoder.final_layernorm.", "bert.encoder.ln.", GAMMA, ONE),
    *pair("pooler.dense.", "bert.pooler.dense.", ONE, ONE),
    *pair("lm_head.dense.", f"{TRANSFORM}dense.", ONE, ONE),
    *pair("lm_head.layer_norm.", f"{TRANSFORM}LayerNorm.", GAMMA, ONE),
    Line("output_layer.weight", ("cls.predictions.decoder.weight",), ONE),
    Line("output_layer.bias", ("cls.predictions.bias",), ONE, again=untied_bias),
    *pair("binary_head.", "cls.seq_relationship.", ONE, ONE),
)


def read_heads(theirs: Theirs) -> dict[str, Any]:
    """The class says whether there is the head for pairs of sentences."""
    (name,) = theirs.get("architectures") or [None]
    if name not in (PRETRAINING, MASKED):
        raise ValueError(f"it is {name!r}; only {PRETRAINING} and {MASKED} hold all that Megatron's BERT has")
    return {"add_binary_head": name == PRETRAINING}


def write_heads(config: Config) -> dict[str, Any]:
    return {"architectures": [PRETRAINING if config.add_binary_head else MASKED]}


def read_activation(theirs: Theirs) -> dict[str, Any]:
    found = theirs.get("hidden_act", "gelu")
    if found != "gelu":
        raise ValueError(f"it is {found!r}, also of the head before the words; Megatron's head has the exact gelu")
    return {"activation_func": "gelu"}


def write_activation(config: Config) -> dict[str, Any]:
    if config.activation_func != "gelu":
        raise ValueError(
            f"activation_func is {config.activation_func!r} and the head's gelu exact: MegatronBert has one for both"
        )
    return {"hidden_act": "gelu"}


def blank(config: Config) -> dict[str, tuple[int, ...]]:
    """The one token type of a model that has none."""
    return {} if config.num_tokentypes else {TYPES: (1, config.hidden_size)}


MEGATRON_BERT = Family(
    name="megatron-bert",
    architecture=PRETRAINING,
    fields=(
        Field("vocab_size", "vocab_size"),
        Field("num_hidden_layers", "num_layers"),
        Field("hidden_size", "hidden_size"),
        Field("num_attention_heads", "num_attention_heads"),
        Field("intermediate_size", "ffn_hidden_size", 4096),
        Field("max_position_embeddings", "max_position_embeddings", 512),
        Field("type_vocab_size", "num_tokentypes", 2, write=lambda types: types or 1),
        Field("layer_norm_eps", "layernorm_epsilon", 1e-12),
        Field("tie_word_embeddings", "tie_word_embeddings", True),
    ),
    lines=LINES,
    settings=(
        Settings(("architectures",), read_heads, write_heads),
        Settings(("hidden_act",), read_activation, write_activation),
        only("is_decoder", False, False),
        only("add_cross_attention", False, False),
    ),
    fixed={
        "normalization": "LayerNorm",
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "gated_linear_unit": False,
        "position_embedding_type": "learned_absolute",
    },
    harmless=frozenset(("hidden_dropout_prob", "attention_probs_dropout_prob")),
    ignored={r"bert\.embeddings\.position_ids": "numbers of positions"},
    bert=True,
    blank=blank,
)

POST_NORM = (
    "it has its norms after each sum and after the embedding: Megatron's BERT has them before each matrix and after "
    "the last layer, which is another function; transformers calls that megatron-bert"
)
# Architectures of which one may think that they are Megatron's BERT.
OTHERS = dict.fromkeys(("bert", "roberta", "camembert", "xlm-roberta", "electra", "distilbert", "albert"), POST_NORM)
