"""Every kind of hybrid the tests know: Mamba-2, attention, MLP and mixtures of experts in one stack of six layers.

As `kinds.py`: Megatron arguments over its defaults, one row a kind. Patterns are told as 0.16.1 is told, where it has
them; a layout with `|` and a format of main's put them into main's argument.
"""

from __future__ import annotations

from typing import Any

from kinds import EXACT_GELU, SMALL
from kinds_moe import ALL_TO_ALL, NARROW, SHARED, SIGMOID

from megahf.judge.hybrid import MAIN, MEGATRON, own_spec

PURE: dict[str, Any] = {
    "num_layers": 6,
    "spec": MEGATRON,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "position_embedding_type": "none",
    "group_query_attention": True,
    "num_query_groups": 4,
    "ffn_hidden_size": 96,
    "squared_relu": True,
    "mamba_state_dim": 16,
    "mamba_head_dim": 16,
    "mamba_num_groups": 4,
}


def hybrid(pattern: str, **more: Any) -> dict[str, Any]:
    """As 0.16.1 is told."""
    return {**PURE, "is_hybrid_model": True, "hybrid_override_pattern": pattern, **more}


def main(pattern: str, **more: Any) -> dict[str, Any]:
    """As main is told, of what only main has."""
    return {**PURE, "spec": MAIN, "hybrid_layer_pattern": pattern, **more}


BIASES = {**EXACT_GELU, "add_bias_linear": True}
SWIGLU = {"squared_relu": False, "swiglu": True}
EXPERTS = {**ALL_TO_ALL, **NARROW, "num_experts": 8, "moe_router_topk": 2}
NEMOTRON = {**EXPERTS, **SIGMOID, **SHARED, "moe_router_topk_scaling_factor": 2.5, "moe_router_dtype": "fp32"}
ROPE = {"position_embedding_type": "rope", "rotary_percent": 0.5}
LATENT = {
    "multi_latent_attention": True,
    "position_embedding_type": "rope",
    "rope_type": "rope",
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 12,
    "group_query_attention": False,
}

KINDS: dict[str, dict[str, Any]] = {
    # stacks
    "mamba2": PURE,
    "mamba_attention": hybrid("M*MM*M"),
    "mamba_mlp": hybrid("M-MM-M"),
    "mamba_attention_mlp": hybrid("M*MM-M"),
    "nemotron_h": hybrid("M-M*-M"),
    "nemotron3": hybrid("ME*MEM", **NEMOTRON),
    "nemotron3_latent": hybrid("ME*MEM", **NEMOTRON, moe_latent_size=32),
    "hybrid_swiglu": hybrid("M-*M-M", **SWIGLU),
    "hybrid_moe": hybrid("MEM*-E", **SWIGLU, **EXPERTS),
    "hybrid_ratios": {**PURE, "is_hybrid_model": True, "hybrid_attention_ratio": 0.3, "hybrid_mlp_ratio": 0.3},
    "gpt_as_stack": hybrid("*-*-*-", **SWIGLU, **ROPE),
    "mixtral_as_stack": hybrid("*E*E*E", **SWIGLU, **ROPE, **EXPERTS),
    # the mixer
    "heads_given": hybrid("M-M*-M", mamba_num_heads=12),
    "one_group": hybrid("M*MM-M", mamba_num_groups=1),
    "group_a_head": hybrid("M*MM-M", mamba_num_groups=8),
    "second_path": hybrid("M*MM-M", use_mamba_mem_eff_path=False),
    "channel_d": hybrid("M*MM-M", spec=own_spec("channel_stack_spec")),
    "ungated_norm": hybrid("M*MM-M", spec=own_spec("ungated_norm_stack_spec")),
    "ungated_norm_channel_d": hybrid("MM-*M-", spec=own_spec("bare_stack_spec")),
    "conv_of_three": hybrid("M*MM-M", spec=own_spec("short_stack_spec")),
    "expand_three": hybrid("M*MM-M", spec=own_spec("wide_stack_spec")),
    "long": hybrid("M-M*-M", seq_length=150, max_position_embeddings=160),  # more than a chunk of 128 tokens
    # what surrounds it
    "hybrid_rope": hybrid("M*MM*-", **ROPE),
    "hybrid_learned_positions": hybrid("M*MM-M", position_embedding_type="learned_absolute"),
    "hybrid_qk_norm": hybrid("M*MM*-", spec=own_spec("own_stack_spec"), qk_layernorm=True, kv_channels=12),
    "hybrid_qk_norm_of_main": main("M*MM*-", qk_layernorm=True),
    "hybrid_qk_norm_ignored": hybrid("M*MM*-", qk_layernorm=True),  # 0.16.1's spec has none
    "hybrid_zero_centered": hybrid("M*-MM-", layernorm_zero_centered_gamma=True),
    "hybrid_layernorm_zero_centered": hybrid(
        "M*-MM-", **BIASES, normalization="LayerNorm", layernorm_zero_centered_gamma=True
    ),
    "hybrid_biases": hybrid("M*-M-M", **BIASES, normalization="LayerNorm", squared_relu=False),
    "hybrid_qkv_bias": hybrid("M*MM*-", add_qkv_bias=True),
    "hybrid_epsilon": hybrid("M*-MM-", layernorm_epsilon=1e-2),  # of all norms but the gated
    "hybrid_tied": hybrid("M-M*-M", untie_embeddings_and_output_weights=False),
    "hybrid_latent_attention": main("M+-+EM", **NEMOTRON, **LATENT),
}
KINDS = {name: {**SMALL, **kind} for name, kind in KINDS.items()}
