"""Our models with the weights of transformers': Llama, Mixtral, Qwen3-MoE, NemotronH.

A tensor that both hold alike is shared; what Megatron packs is packed here by hand, not by the project's tables.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from megahf import McoreGPTConfig, McoreGPTForCausalLM, McoreHybridConfig, McoreHybridForCausalLM

SYMBOLS = {"linear_attention": "M", "full_attention": "*", "mlp": "-"}
Weights = dict[str, Tensor]


def gpt(theirs: PreTrainedModel) -> McoreGPTForCausalLM:
    """Of Llama, or of Mixtral or Qwen3-MoE."""
    c, first = theirs.config, theirs.model.layers[0]
    experts: dict[str, Any] = {}
    if hasattr(first.mlp, "experts"):
        count, _, width = first.mlp.experts.down_proj.shape
        experts = {"num_experts": count, "moe_router_topk": c.num_experts_per_tok, "moe_ffn_hidden_size": width}
    config = McoreGPTConfig(
        vocab_size=c.vocab_size, num_layers=c.num_hidden_layers, hidden_size=c.hidden_size,
        ffn_hidden_size=c.intermediate_size, num_attention_heads=c.num_attention_heads,
        num_query_groups=c.num_key_value_heads, kv_channels=first.self_attn.head_dim,
        max_position_embeddings=c.max_position_embeddings, position_embedding_type="rope",
        rotary_base=float(c.rope_parameters["rope_theta"]), normalization="RMSNorm", layernorm_epsilon=c.rms_norm_eps,
        qk_layernorm=hasattr(first.self_attn, "q_norm"), add_bias_linear=False, activation_func="silu",
        gated_linear_unit=True, tie_word_embeddings=c.tie_word_embeddings, eos_token_id=c.eos_token_id,
        bos_token_id=c.bos_token_id, **experts,
    )  # fmt: skip
    weights = {
        "model.embedding.word_embeddings.weight": theirs.model.embed_tokens.weight,
        "model.decoder.final_layernorm.weight": theirs.model.norm.weight,
        "output_layer.weight": theirs.lm_head.weight,
    }
    for number, layer in enumerate(theirs.model.layers):
        weights |= within(f"model.decoder.layers.{number}.", gpt_layer(layer, c.num_key_value_heads))
    return filled(McoreGPTForCausalLM, config, theirs.dtype, weights)


def gpt_layer(layer: nn.Module, groups: int) -> Weights:
    attention, mlp, norm = layer.self_attn, layer.mlp, layer.post_attention_layernorm.weight
    ours = attention_weights(attention, groups, layer.input_layernorm.weight)
    for head in "qk":
        if hasattr(attention, f"{head}_norm"):
            ours[f"self_attention.{head}_layernorm.weight"] = getattr(attention, f"{head}_norm").weight
    if hasattr(mlp, "experts"):
        return ours | {
            "pre_mlp_layernorm.weight": norm,
            "mlp.router.weight": mlp.gate.weight,
            "mlp.experts.gate_up_proj": mlp.experts.gate_up_proj,
            "mlp.experts.down_proj": mlp.experts.down_proj,
        }
    return ours | {
        "mlp.linear_fc1_layernorm.weight": norm,
        "mlp.linear_fc1.weight": torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
        "mlp.linear_fc2.weight": mlp.down_proj.weight,
    }


def attention_weights(attention: nn.Module, groups: int, norm: Tensor) -> Weights:
    """QKV by groups, each with its queries, its key, its value."""
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    parts = [projection.weight.unflatten(0, (groups, -1)) for projection in projections]
    return {
        "self_attention.linear_qkv_layernorm.weight": norm,
        "self_attention.linear_qkv.weight": torch.cat(parts, 1).flatten(0, 1),
        "self_attention.linear_proj.weight": attention.o_proj.weight,
    }


def hybrid(theirs: PreTrainedModel) -> McoreHybridForCausalLM:
    """Of NemotronH without experts."""
    c = theirs.config
    config = McoreHybridConfig(
        hybrid_layer_pattern="".join(SYMBOLS[kind] for kind in c.layer_types), vocab_size=c.vocab_size,
        hidden_size=c.hidden_size, ffn_hidden_size=c.intermediate_size, num_attention_heads=c.num_attention_heads,
        num_query_groups=c.num_key_value_heads, kv_channels=c.head_dim,
        max_position_embeddings=c.max_position_embeddings, position_embedding_type="none", normalization="RMSNorm",
        layernorm_epsilon=c.layer_norm_epsilon, add_bias_linear=False, activation_func="squared_relu",
        tie_word_embeddings=False, mamba_state_dim=c.ssm_state_size, mamba_head_dim=c.mamba_head_dim,
        mamba_num_heads=c.mamba_num_heads, mamba_num_groups=c.n_groups, mamba_d_conv=c.conv_kernel,
    )  # fmt: skip
    weights = {
        "model.embedding.word_embeddings.weight": theirs.model.embeddings.weight,
        "model.decoder.final_norm.weight": theirs.model.norm_f.weight,
        "output_layer.weight": theirs.lm_head.weight,
    }
    for number, layer in enumerate(theirs.model.layers):
        symbol = config.hybrid_layer_pattern[number]
        weights |= within(f"model.decoder.layers.{number}.", hybrid_layer(layer, symbol, c.num_key_value_heads))
    return filled(McoreHybridForCausalLM, config, theirs.dtype, weights)


def hybrid_layer(layer: nn.Module, symbol: str, groups: int) -> Weights:
    norm = layer.norm.weight
    if symbol == "*":
        return attention_weights(layer.mixer, groups, norm)
    if symbol == "M":  # named and packed as Megatron's
        return within("mixer.", {"in_proj_layernorm.weight": norm, **dict(layer.mixer.named_parameters())})
    return {
        "mlp.linear_fc1_layernorm.weight": norm,
        "mlp.linear_fc1.weight": layer.mixer.up_proj.weight,
        "mlp.linear_fc2.weight": layer.mixer.down_proj.weight,
    }


def within(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: weight for name, weight in weights.items()}


def filled(kind: type[PreTrainedModel], config: Any, dtype: torch.dtype, weights: Weights) -> Any:
    with no_init_weights():
        model = kind._from_config(config, dtype=dtype)
    model.load_state_dict(weights, assign=True)
    return model.eval()
