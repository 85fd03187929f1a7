"""Every kind of dense GPT the tests know, as Megatron arguments over its defaults: one row a kind.

Megatron's plain defaults are a GPT-2: learned positions, LayerNorm, gelu, biases, tied embeddings. A kind says what it
changes. Together the rows cover every option that real arguments can carry for dense models.
"""

from __future__ import annotations

from typing import Any

SMALL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 8,
    "seq_length": 24,
    "max_position_embeddings": 64,
    "vocab_size": 101,
    "make_vocab_size_divisible_by": 32,  # 128 rows for TP1, TP2 and TP4 alike: 27 of them padding
    "tokenizer_type": "NullTokenizer",
}
LLAMA: dict[str, Any] = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "position_embedding_type": "rope",
    "group_query_attention": True,
    "num_query_groups": 4,
    "ffn_hidden_size": 96,
}
# llama3's scaling moves slow frequencies alone, which only a long text can show.
LONG = {"seq_length": 128, "max_position_embeddings": 128, "rotary_base": 500000}
WINDOW = {**LLAMA, "window_size": (7, 0)}
EXACT_GELU = {"bias_gelu_fusion": False}  # else gelu is the tanh approximation
YARN = {
    **LLAMA,
    "position_embedding_type": "yarn",
    "rotary_scaling_factor": 4.0,
    "yarn_original_max_position_embeddings": 16,
}

KINDS: dict[str, dict[str, Any]] = {
    # GPT-2 and its kin
    "gpt2": EXACT_GELU,
    "gpt2_tanh": {},
    "gpt2_untied": {**EXACT_GELU, "untie_embeddings_and_output_weights": True},
    "gpt2_no_bias": {"add_bias_linear": False},
    "gpt2_rmsnorm": {"normalization": "RMSNorm", "layernorm_epsilon": 1e-3},
    "gpt2_squared_relu": {"squared_relu": True, "bias_gelu_fusion": False},
    "gpt3_qk_scaling": {"apply_query_key_layer_scaling": True},
    "gpt_no_positions": {"position_embedding_type": "none"},
    "gpt_zero_centered": {"layernorm_zero_centered_gamma": True},
    # Llama and its kin
    "llama": LLAMA,
    "llama_tied": {**LLAMA, "untie_embeddings_and_output_weights": False},
    "llama_mha": {**LLAMA, "group_query_attention": False},
    "llama_mqa": {**LLAMA, "num_query_groups": 1},
    "llama_two_groups": {**LLAMA, "num_query_groups": 2},
    "llama_biases": {**LLAMA, "add_bias_linear": True},
    "llama_layernorm": {**LLAMA, "normalization": "LayerNorm"},
    "llama_zero_centered": {**LLAMA, "layernorm_zero_centered_gamma": True},
    "llama_fp32_residual": {**LLAMA, "fp32_residual_connection": True},
    "llama_clamped": {**LLAMA, "bias_swiglu_fusion": False, "activation_func_clamp_value": 0.5},
    "qwen2": {**LLAMA, "add_qkv_bias": True, "untie_embeddings_and_output_weights": False, "rotary_base": 1000000},
    "qwen3": {**LLAMA, "qk_layernorm": True, "kv_channels": 12, "rotary_base": 1000000},
    "qk_layernorm_biased": {"qk_layernorm": True, "kv_channels": 16},
    "qk_l2_norm": {**LLAMA, "qk_l2_norm": True},
    "output_gate": {**LLAMA, "attention_output_gate": True},
    # positions
    "long_base": {**LLAMA, **LONG},
    "llama31": {**LLAMA, **LONG, "use_rope_scaling": True},
    "llama31_factor_ignored": {**LLAMA, **LONG, "use_rope_scaling": True, "rope_scaling_factor": 32.0},
    "interpolated": {**LLAMA, "rotary_seq_len_interpolation_factor": 4},
    "interleaved": {**LLAMA, "rotary_interleaved": True, "rotary_percent": 0.5},
    "neox": {
        "position_embedding_type": "rope",
        "rotary_percent": 0.25,
        "untie_embeddings_and_output_weights": True,
    },
    "yarn": YARN,
    "yarn_unrounded": {**YARN, "yarn_correction_range_round_to_int": False, "mscale": 0.8, "yarn_beta_fast": 16.0},
    "nope_every_fourth": {**LLAMA, "no_rope_freq": 4},
    "nope_list": {**LLAMA, "no_rope_freq": [1, 0, 0, 1]},
    # windows and sinks
    "window": WINDOW,
    "window_skip_every_second": {**WINDOW, "window_attn_skip_freq": 2},
    "window_skip_list": {**WINDOW, "window_attn_skip_freq": [1, 0, 1, 1]},
    "off_by_one": {**LLAMA, "softmax_type": "off-by-one"},
    "sinks": {**LLAMA, "softmax_type": "learnable"},
    "gpt_oss_dense": {
        **WINDOW,
        "swiglu": False,
        "quick_geglu": True,
        "add_bias_linear": True,
        "bias_gelu_fusion": False,
        "activation_func_clamp_value": 1.0,
        "glu_linear_offset": 1.0,
        "softmax_type": "learnable",
        "window_attn_skip_freq": 2,
    },
    "quick_geglu": {**LLAMA, "swiglu": False, "quick_geglu": True},
    "nemotron": {
        **LLAMA,
        "swiglu": False,
        "squared_relu": True,
        "normalization": "LayerNorm",
        "layernorm_zero_centered_gamma": True,
        "rotary_percent": 0.5,
        "num_query_groups": 2,
    },
}
KINDS = {name: {**SMALL, **kind} for name, kind in KINDS.items()}
