"""GPT-2: LayerNorm, learned positions, biases, tied; matrices lie turned, `[in, out]`, q | k | v in one.

And StarCoder and SantaCoder, which Megatron trained: packed as there, with one key and value for all heads.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..cuts import Config
from ..tiles import Tiled
from .activations import activation
from .family import FUSED_QKV, GAMMA, ONE, TURNED, Family, Field, Joint, Line, Settings, as_turned, pair, turned
from .llama import AT, MLP

THEIRS = "transformer.h.{l}."


def from_turned(arrays: Sequence[Tiled], config: Config) -> Tiled:
    return FUSED_QKV.read([turned(arrays, config)], config)


def as_turned_qkv(whole: Tiled, config: Config) -> list[Tiled]:
    (fused,) = FUSED_QKV.write(whole, config)
    return as_turned(fused, config)


TURNED_QKV = Joint(from_turned, as_turned_qkv)  # [in, q | k | v]


def lines(matrix: Joint, qkv: Joint, qkv_bias: Joint) -> tuple[Line, ...]:
    """The weights, by how matrices lie."""
    return (
        Line("embedding.word_embeddings.weight", ("transformer.wte.weight",), ONE),
        Line("embedding.position_embeddings.weight", ("transformer.wpe.weight",), ONE),
        Line("output_layer.weight", ("lm_head.weight",), ONE),
        *pair("decoder.final_layernorm.", "transformer.ln_f.", GAMMA, ONE),
        *pair(f"{AT}linear_qkv.layer_norm_", f"{THEIRS}ln_1.", GAMMA, ONE),
        *pair(f"{AT}linear_qkv.", f"{THEIRS}attn.c_attn.", qkv, qkv_bias),
        *pair(f"{AT}linear_proj.", f"{THEIRS}attn.c_proj.", matrix, ONE),
        *pair(f"{MLP}linear_fc1.layer_norm_", f"{THEIRS}ln_2.", GAMMA, ONE),
        *pair(f"{MLP}linear_fc1.", f"{THEIRS}mlp.c_fc.", matrix, ONE),
        *pair(f"{MLP}linear_fc2.", f"{THEIRS}mlp.c_proj.", matrix, ONE),
    )


SIZES = (
    Field("vocab_size", "vocab_size"),
    Field("n_layer", "num_layers"),
    Field("n_embd", "hidden_size"),
    Field("n_head", "num_attention_heads"),
    Field("n_positions", "max_position_embeddings", 1024),
    Field("n_inner", "ffn_hidden_size", None),
    Field("layer_norm_epsilon", "layernorm_epsilon", 1e-5),
    Field("tie_word_embeddings", "tie_word_embeddings", True),
)
LAYER_NORM = {
    "normalization": "LayerNorm",
    "add_bias_linear": True,
    "add_qkv_bias": True,
    "gated_linear_unit": False,
}

# The number of positions once more, which llama.cpp reads and transformers does not.
CONTEXT = Settings(("n_ctx",), lambda theirs: {}, lambda config: {"n_ctx": config.max_position_embeddings})

GPT2 = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    fields=(*SIZES, activation("activation_function", "gelu_new")),
    lines=lines(TURNED, TURNED_QKV, FUSED_QKV),
    settings=(CONTEXT,),
    fixed={**LAYER_NORM, "position_embedding_type": "learned_absolute"},
    constants={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    },
    harmless=frozenset((
        "reorder_and_upcast_attn", "summary_type", "summary_use_proj", "summary_activation",
        "summary_proj_to_labels", "summary_first_dropout", "task_specific_params",
    )),
    ignored={r"transformer\.h\.\d+\.attn\.(masked_)?bias": "the causal mask"},
    base="transformer.",
)  # fmt: skip
GPT_BIGCODE = Family(
    name="gpt_bigcode",
    architecture="GPTBigCodeForCausalLM",
    fields=(
        *SIZES,
        Field("multi_query", "num_query_groups", True, lambda one: 1 if one else None, lambda groups: groups == 1),
        activation("activation_function", "gelu_pytorch_tanh"),
    ),
    lines=lines(ONE, ONE, ONE),  # all queries | key | value, or for each head: q | k | v
    settings=(CONTEXT,),
    fixed=GPT2.fixed,
    constants={"scale_attn_weights": (True,), "add_cross_attention": (False,)},
    harmless=frozenset((
        "num_key_value_heads", "attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "inference_runner",
        "validate_runner_input", "pre_allocate_kv_cache", "max_batch_size", "max_sequence_length",
    )) | GPT2.harmless,
    ignored=GPT2.ignored,
    base="transformer.",
)  # fmt: skip
