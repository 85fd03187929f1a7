"""Every kind of mixture of experts, of multi-latent attention and of multi-token prediction the tests know.

As `kinds.py`: Megatron arguments over its defaults, one row a kind. How experts are held (one by one, grouped) is no
kind but a layer spec of `cases.py`: each kind meets all that Megatron has for it.
"""

from __future__ import annotations

from typing import Any

from kinds import EXACT_GELU, LLAMA, SMALL, WINDOW

ALL_TO_ALL = {"moe_token_dispatcher_type": "alltoall"}
MIXTRAL: dict[str, Any] = {**LLAMA, **ALL_TO_ALL, "num_experts": 8, "moe_router_topk": 2}
NARROW = {"moe_ffn_hidden_size": 48}
ONE_EXPERT = {**MIXTRAL, "moe_router_topk": 1}
SHARED = {"moe_shared_expert_intermediate_size": 40}
QWEN3: dict[str, Any] = {**MIXTRAL, **NARROW, "qk_layernorm": True, "kv_channels": 12, "rotary_base": 1000000}
GROUPS = {"moe_router_topk": 4, "moe_router_num_groups": 4, "moe_router_group_topk": 2}
SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
DEEPSEEK: dict[str, Any] = {
    **NARROW,
    **SHARED,
    **GROUPS,
    **SIGMOID,
    **ALL_TO_ALL,
    "num_experts": 8,
    "moe_layer_freq": [0, 1, 1, 1],
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_router_dtype": "fp32",
}
MLA: dict[str, Any] = {
    "swiglu": True,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "position_embedding_type": "rope",
    "ffn_hidden_size": 96,
    "multi_latent_attention": True,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 12,
    "qk_layernorm": True,
}
# YaRN's original context is 4096 whatever is asked for, and it moves only what turns slowly: a low base shows it.
STRETCHED = {**MLA, "rotary_scaling_factor": 40.0, "rotary_base": 100, "mscale": 1.0, "mscale_all_dim": 0.7}
DEEPSEEK_V3 = {**STRETCHED, **DEEPSEEK}
CAPACITY = {**MIXTRAL, "moe_expert_capacity_factor": 0.75}

KINDS: dict[str, dict[str, Any]] = {
    # softmax routing
    "mixtral": {**MIXTRAL, "moe_token_dispatcher_type": "allgather"},
    "mixtral_pre_softmax": {**MIXTRAL, "moe_router_pre_softmax": True},
    "mixtral_window": {**MIXTRAL, **WINDOW, "window_attn_skip_freq": 2},
    "moe_biases": {**EXACT_GELU, **ALL_TO_ALL, "num_experts": 8, "untie_embeddings_and_output_weights": True},
    "moe_swiglu_biases": {**MIXTRAL, **NARROW, "add_bias_linear": True, "bias_swiglu_fusion": False},
    "moe_every_second_layer": {**MIXTRAL, "moe_layer_freq": 2},
    "moe_list": {**MIXTRAL, **NARROW, "moe_layer_freq": [1, 0, 1, 1]},
    "moe_squared_relu": {**MIXTRAL, **NARROW, "swiglu": False, "squared_relu": True},
    "moe_gelu": {**MIXTRAL, **NARROW, "swiglu": False, "bias_gelu_fusion": False},
    "moe_quick_geglu": {**MIXTRAL, **NARROW, "swiglu": False, "quick_geglu": True},
    "moe_layernorm_tied": {**MIXTRAL, "normalization": "LayerNorm", "untie_embeddings_and_output_weights": False},
    "moe_zero_centered": {**MIXTRAL, **NARROW, "layernorm_zero_centered_gamma": True},
    "qwen2_moe": {
        **MIXTRAL,
        **NARROW,
        **SHARED,
        "add_qkv_bias": True,
        "moe_router_pre_softmax": True,
        "moe_shared_expert_gate": True,
        "moe_layer_freq": 2,
    },
    "shared_expert": {**MIXTRAL, **NARROW, **SHARED},
    "shared_expert_gate": {**MIXTRAL, **SHARED, "moe_shared_expert_gate": True},
    "qwen3_moe": {**QWEN3, "moe_router_topk": 3},
    "qwen3_moe_pre_softmax": {**QWEN3, "moe_router_topk": 3, "moe_router_pre_softmax": True},
    "groups_softmax": {**MIXTRAL, **NARROW, **GROUPS},
    "groups_one_each": {**MIXTRAL, **NARROW, **GROUPS, "moe_router_topk": 2, "moe_router_pre_softmax": True},
    "scaled_softmax": {**MIXTRAL, "moe_router_topk_scaling_factor": 1.5},
    "gpt_oss": {
        **WINDOW,
        **ALL_TO_ALL,
        "num_experts": 8,
        "moe_router_topk": 4,
        "swiglu": False,
        "quick_geglu": True,
        "add_bias_linear": True,
        "bias_gelu_fusion": False,
        "activation_func_clamp_value": 1.0,
        "glu_linear_offset": 1.0,
        "softmax_type": "learnable",
        "window_attn_skip_freq": 2,
    },
    # other routing
    "top_1_pre_softmax": {**ONE_EXPERT, "moe_router_pre_softmax": True},
    "top_1_on_input": {**ONE_EXPERT, "moe_router_score_function": "sigmoid", "moe_apply_probs_on_input": True},
    "top_1_sigmoid": {**ONE_EXPERT, "moe_router_score_function": "sigmoid"},
    "sigmoid": {**MIXTRAL, "moe_router_topk": 3, "moe_router_score_function": "sigmoid"},
    "sigmoid_expert_bias": {**MIXTRAL, **SIGMOID, "moe_router_topk": 3},
    "sinkhorn": {**MIXTRAL, "moe_router_load_balancing_type": "sinkhorn"},
    "sinkhorn_top_1": {**ONE_EXPERT, "moe_router_load_balancing_type": "sinkhorn"},
    "capacity_by_probs": CAPACITY,
    "capacity_by_position": {**CAPACITY, "moe_token_drop_policy": "position"},
    "capacity_padded": {**CAPACITY, "moe_pad_expert_input_to_capacity": True},
    "router_fp64": {**MIXTRAL, "moe_router_dtype": "fp64", "moe_router_pre_softmax": True},
    "latent_experts": {**MIXTRAL, **NARROW, **SHARED, "moe_latent_size": 32},
    # DeepSeek and latent attention
    "deepseek_moe": {**LLAMA, **DEEPSEEK},
    "deepseek_v2": {
        **STRETCHED,
        **NARROW,
        **SHARED,
        **GROUPS,
        **ALL_TO_ALL,
        "q_lora_rank": None,
        "num_experts": 8,
        "moe_layer_freq": [0, 1, 1, 1],
        "moe_router_pre_softmax": True,
        "moe_router_topk_scaling_factor": 16.0,
    },
    "deepseek_v3": DEEPSEEK_V3,
    "mla": STRETCHED,
    "mla_plain_yarn": MLA,
    "mla_rope": {**MLA, "rope_type": "rope"},
    "mla_rope_half": {**MLA, "rope_type": "rope", "rotary_percent": 0.5, "rotary_scaling_factor": 4.0},
    "mla_rope_scaled": {**MLA, "rope_type": "rope", "rotary_scaling_factor": 4.0, "mscale_all_dim": 0.7},
    "mla_no_q_lora": {**STRETCHED, "q_lora_rank": None},
    "mla_no_q_lora_rope": {**MLA, "q_lora_rank": None, "rope_type": "rope"},
    "mla_no_qk_layernorm": {**STRETCHED, "qk_layernorm": False},
    "mla_biases_layernorm": {**STRETCHED, "add_bias_linear": True, "normalization": "LayerNorm"},
    "mla_mixtral": {**STRETCHED, **ALL_TO_ALL, "num_experts": 8},
    # multi-token prediction
    "mtp": {**LLAMA, "mtp_num_layers": 2},
    "mtp_tied": {**LLAMA, "mtp_num_layers": 1, "untie_embeddings_and_output_weights": False},
    "mtp_gpt2": {**EXACT_GELU, "mtp_num_layers": 2, "untie_embeddings_and_output_weights": True},
    "mtp_mixtral": {**MIXTRAL, "mtp_num_layers": 2},
    "mtp_last_dense": {**MIXTRAL, **NARROW, "mtp_num_layers": 1, "moe_layer_freq": [1, 1, 1, 0]},
    "mtp_mla": {**STRETCHED, "mtp_num_layers": 1},
    "deepseek_v3_mtp": {**DEEPSEEK_V3, "mtp_num_layers": 1},
}
KINDS = {name: {**SMALL, **kind} for name, kind in KINDS.items()}
