"""Small models for the tests of `megahf/models`: random weights, large enough that a wrong line shows in the logits."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

from megahf.models.configuration_mcore import McoreGPTConfig
from megahf.models.configuration_mcore_bert import McoreBertConfig
from megahf.models.configuration_mcore_hybrid import McoreHybridConfig
from megahf.models.modeling_mcore_gpt import McoreGPTForCausalLM
from megahf.models.modeling_mcore_hybrid import McoreHybridForCausalLM

M = TypeVar("M", bound=nn.Module)

LLAMA: dict[str, Any] = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "activation_func": "silu",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "tie_word_embeddings": False,
}
MLA: dict[str, Any] = {
    **LLAMA,
    "multi_latent_attention": True,
    "num_query_groups": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 6,
    "qk_layernorm": True,
    "yarn_rotary_scaling_factor": 4.0,
    "yarn_original_max_position_embeddings": 24,
    "yarn_mscale_all_dim": 0.7,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": {"tie_word_embeddings": False},  # tied and random, a model repeats its last token
    "llama": LLAMA,
    "sinks": {**LLAMA, "softmax_type": "learnable"},
    "off by one": {**LLAMA, "softmax_type": "off-by-one"},
    "window": {**LLAMA, "window_size": [5, 0]},
    "window and sinks": {**LLAMA, "window_size": [5, 0], "window_attn_skip_freq": 2, "softmax_type": "learnable"},
    "gate and norms": {**LLAMA, "attention_output_gate": True, "qk_layernorm": True, "no_rope_freq": 2},
    "further tokens": {**LLAMA, "mtp_num_layers": 2},
    "latents": MLA,
    "latents, window and sinks": {
        **MLA,
        "q_lora_rank": None,
        "qk_layernorm": False,
        "v_head_dim": 14,
        "rope_type": "rope",
        "window_size": [5, 0],
        "window_attn_skip_freq": 2,
        "softmax_type": "learnable",
    },
}


SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "num_layers": 2,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "max_position_embeddings": 96,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "pad_token_id": 0,
}
MIXER: dict[str, Any] = {"mamba_state_dim": 8, "mamba_head_dim": 8, "mamba_num_groups": 2, "mamba_chunk_size": 16}
EXPERTS: dict[str, Any] = {"num_experts": 4, "moe_ffn_hidden_size": 24, "moe_shared_expert_intermediate_size": 40}
BALANCE: dict[str, Any] = {
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
    "moe_aux_loss_coeff": [0.02, 0.01],
    "moe_z_loss_coeff": 0.001,
}
MIXTURES: dict[str, dict[str, Any]] = {
    "experts": {**LLAMA, **EXPERTS, "moe_layer_freq": [0, 1], "moe_shared_expert_gate": True, **BALANCE},
    "experts with biases": {**EXPERTS, "tie_word_embeddings": False, "moe_router_bias": True},
    "gated experts with biases": {**LLAMA, **EXPERTS, "add_bias_linear": True},
    "experts on latents": {
        **LLAMA,
        **EXPERTS,
        "moe_latent_size": 16,
        "gated_linear_unit": False,
        "activation_func": "squared_relu",
    },
    "latents and experts": {
        **MLA,
        **EXPERTS,
        **BALANCE,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_num_groups": 2,
        "moe_router_group_topk": 1,
        "mtp_num_layers": 1,
    },
}
HYBRIDS: dict[str, dict[str, Any]] = {
    "mamba": {"hybrid_layer_pattern": "MM"},
    "attention": {"hybrid_layer_pattern": "M*-"},
    "no attention": {"hybrid_layer_pattern": "-M"},
    "everything": {"hybrid_layer_pattern": "M-M*-E", **EXPERTS},
    "gpt": {"hybrid_layer_pattern": "*-*-"},
    "gpt of experts": {"hybrid_layer_pattern": "*E*E", **EXPERTS},
    "latents": {**MLA, "hybrid_layer_pattern": "M+-"},
    "window": {"hybrid_layer_pattern": "*M*", "window_size": [5, 0], "window_attn_skip_freq": 3},
    "no norm, D a channel": {"hybrid_layer_pattern": "M*", "mamba_rmsnorm": False, "mamba_d_has_hdim": True},
    "mamba 1": {"hybrid_layer_pattern": "MM-", "mamba_version": 1},
}

BERTS: dict[str, dict[str, Any]] = {
    "both heads": {},
    "masked words": {"add_binary_head": False, "num_tokentypes": 0},
    "rope and sinks": {**LLAMA, "softmax_type": "learnable"},
}


def tiny_config(**changes: Any) -> McoreGPTConfig:
    """Two layers of width 32, four heads in two groups, no dropout."""
    return McoreGPTConfig(**{**SIZES, **changes})


def tiny_bert_config(**changes: Any) -> McoreBertConfig:
    """A BERT of the same sizes; the layers' gelu is the exact one."""
    return McoreBertConfig(**{**SIZES, "num_query_groups": 4, "activation_func": "gelu", **changes})


def tiny_hybrid_config(variant: str, **changes: Any) -> McoreHybridConfig:
    """A variant of `HYBRIDS`: as Llama, with mixers of eight heads of eight channels in two groups."""
    sizes = {name: size for name, size in SIZES.items() if name != "num_layers"}
    return McoreHybridConfig(**{**sizes, **LLAMA, **MIXER, **HYBRIDS[variant], **changes})


def tiny(**changes: Any) -> McoreGPTForCausalLM:
    """A model of `tiny_config` with weights of `randomise`, in evaluation mode."""
    return randomise(McoreGPTForCausalLM(tiny_config(**changes))).eval()


def tiny_hybrid(variant: str, **changes: Any) -> McoreHybridForCausalLM:
    """A model of `tiny_hybrid_config` with weights of `randomise`, in evaluation mode."""
    return remember(randomise(McoreHybridForCausalLM(tiny_hybrid_config(variant, **changes)))).eval()


@torch.no_grad()
def remember(model: M) -> M:
    """Gives mixers decays and time steps with which a token's part in the state lasts for about ten tokens."""
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", "dt_bias", "dt_proj.bias")):
            parameter.copy_(torch.linspace(-2, 0, parameter.numel()).view_as(parameter))
    return model


@torch.no_grad()
def randomise(model: M, seed: int = 0) -> M:
    """Fills every parameter with normal numbers: matrices keep the size of what they multiply, vectors vary."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        else:
            parameter.copy_(parameter.round() + 0.2 * noise)  # around 1 or 0, as it was initialised
    return model


def tokens(rows: int, length: int, seed: int = 1, vocabulary: int = 61) -> torch.Tensor:
    """Random tokens `[rows, length]`, never 0, which pads."""
    return torch.randint(1, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
