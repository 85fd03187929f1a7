"""LLaMA 2, 3 and 3.1, and SmolLM2: RMSNorm, RoPE, grouped queries, SwiGLU; and its next of kin, Arcee and Seed-OSS."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..cuts import Config
from .activations import activation
from .family import GAMMA, GATED, ONE, QKV, Family, Field, Line, Settings, Theirs
from .rope import ROPE

LAYER, THEIRS = "decoder.layers.{l}.", "model.layers.{l}."
AT, MLP = f"{LAYER}self_attention.", f"{LAYER}mlp."

EMBEDDINGS = (
    Line("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), ONE),
    Line("decoder.final_layernorm.weight", ("model.norm.weight",), GAMMA),
    Line("output_layer.weight", ("lm_head.weight",), ONE),
)
ATTENTION = (
    Line(f"{AT}linear_qkv.layer_norm_weight", (f"{THEIRS}input_layernorm.weight",), GAMMA),
    Line(f"{AT}linear_qkv.weight", tuple(f"{THEIRS}self_attn.{x}_proj.weight" for x in "qkv"), QKV),
    Line(f"{AT}linear_proj.weight", (f"{THEIRS}self_attn.o_proj.weight",), ONE),
)
QKV_BIAS = (Line(f"{AT}linear_qkv.bias", tuple(f"{THEIRS}self_attn.{x}_proj.bias" for x in "qkv"), QKV),)
ATTENTION_BIASES = (*QKV_BIAS, Line(f"{AT}linear_proj.bias", (f"{THEIRS}self_attn.o_proj.bias",), ONE))
NORM = Line(f"{MLP}linear_fc1.layer_norm_weight", (f"{THEIRS}post_attention_layernorm.weight",), GAMMA)
DENSE = (
    NORM,
    Line(f"{MLP}linear_fc1.weight", tuple(f"{THEIRS}mlp.{x}_proj.weight" for x in ("gate", "up")), GATED),
    Line(f"{MLP}linear_fc2.weight", (f"{THEIRS}mlp.down_proj.weight",), ONE),
)
DENSE_BIASES = (
    Line(f"{MLP}linear_fc1.bias", tuple(f"{THEIRS}mlp.{x}_proj.bias" for x in ("gate", "up")), GATED),
    Line(f"{MLP}linear_fc2.bias", (f"{THEIRS}mlp.down_proj.bias",), ONE),
)
UNGATED = (  # up alone
    NORM,
    Line(f"{MLP}linear_fc1.weight", (f"{THEIRS}mlp.up_proj.weight",), ONE),
    Line(f"{MLP}linear_fc2.weight", (f"{THEIRS}mlp.down_proj.weight",), ONE),
    Line(f"{MLP}linear_fc1.bias", (f"{THEIRS}mlp.up_proj.bias",), ONE),
    Line(f"{MLP}linear_fc2.bias", (f"{THEIRS}mlp.down_proj.bias",), ONE),
)
NORM_BIASES = (  # of LayerNorm
    Line("decoder.final_layernorm.bias", ("model.norm.bias",), ONE),
    Line(f"{AT}linear_qkv.layer_norm_bias", (f"{THEIRS}input_layernorm.bias",), ONE),
    Line(f"{MLP}linear_fc1.layer_norm_bias", (f"{THEIRS}post_attention_layernorm.bias",), ONE),
)
FREQUENCIES = {r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": "frequencies, computed anew"}

SIZES = (
    Field("vocab_size", "vocab_size"),
    Field("num_hidden_layers", "num_layers"),
    Field("hidden_size", "hidden_size"),
    Field("num_attention_heads", "num_attention_heads"),
    Field("num_key_value_heads", "num_query_groups", None),
    Field("head_dim", "kv_channels", None),
    Field("max_position_embeddings", "max_position_embeddings"),
    Field("rms_norm_eps", "layernorm_epsilon", 1e-6),
    Field("tie_word_embeddings", "tie_word_embeddings", False),
)
WIDTH = Field("intermediate_size", "ffn_hidden_size")
GATED_RMS = {
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "activation_func": "silu",
    "gated_linear_unit": True,
}


def sizes(epsilon: str = "rms_norm_eps", **defaults: Any) -> tuple[Field, ...]:
    """`SIZES` with other defaults for some of their settings, and another name for the norms' `epsilon`."""
    named = [replace(row, theirs=epsilon) if row.ours == "layernorm_epsilon" else row for row in SIZES]
    return tuple(replace(row, default=defaults.get(row.theirs, row.default)) for row in named)


def read_biases(theirs: Theirs) -> dict[str, Any]:
    attention, mlp = bool(theirs.get("attention_bias", False)), bool(theirs.get("mlp_bias", False))
    if attention != mlp:
        raise ValueError(f"{attention} and {mlp}; Megatron has biases in attention and MLP, or in neither")
    return {"add_bias_linear": attention, "add_qkv_bias": attention}


def write_biases(config: Config) -> dict[str, Any]:
    return dict.fromkeys(("attention_bias", "mlp_bias"), config.add_bias_linear)


BIASES = Settings(("attention_bias", "mlp_bias"), read_biases, write_biases)

LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    fields=(*SIZES, WIDTH, activation("hidden_act", "silu")),
    lines=(*EMBEDDINGS, *ATTENTION, *ATTENTION_BIASES, *DENSE, *DENSE_BIASES),
    settings=(ROPE, BIASES),
    fixed=GATED_RMS,
    harmless=frozenset(("is_llama_config", "rope_interleaved", "transformers.js_config")),  # of SmolLM2, read by nobody
    ignored=FREQUENCIES,
    base="model.",
)
ARCEE = replace(
    LLAMA,
    name="arcee",
    architecture="ArceeForCausalLM",
    fields=(*sizes(rms_norm_eps=1e-5), WIDTH, activation("hidden_act", "relu2")),
    lines=(*EMBEDDINGS, *ATTENTION, *ATTENTION_BIASES, *UNGATED),
    fixed={**GATED_RMS, "gated_linear_unit": False},
)
SEED_OSS = replace(
    LLAMA,
    name="seed_oss",
    architecture="SeedOssForCausalLM",
    fields=(*sizes(num_key_value_heads=8, head_dim=128), WIDTH, activation("hidden_act", "silu"),
            Field("attention_bias", "add_qkv_bias", True)),
    lines=(*EMBEDDINGS, *ATTENTION, *QKV_BIAS, *DENSE),
    settings=(ROPE,),
    constants={"attention_out_bias": (False,), "mlp_bias": (False,)},
    harmless=frozenset(("residual_dropout",)),
)  # fmt: skip
