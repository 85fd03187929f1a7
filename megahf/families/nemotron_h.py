"""Nemotron-H and Nemotron 3: a mixer, attention without positions, an MLP or experts a layer, as in Megatron's pattern.

transformers raises time steps below `time_step_min` to it while it reads a prompt, and not when it generates; Megatron,
which trained these models, does not, nor does other software that runs them. The setting is not heeded, which is
said, and written so small that transformers raises nothing. The weights of a head for further tokens, which
transformers leaves out too, are left out.
"""

from __future__ import annotations

from typing import Any

from ..cuts import Config
from .activations import activation
from .family import EXPERTS, GAMMA, ONE, QKV, Family, Field, Line, Settings, Theirs
from .grouped import SIGMOID, check_ranks, kept_groups
from .mixers import PLAIN_RMS, TIME_STEPS, check_layers, epsilon, mixer

NAME, LAYER, BLOCK = "NemotronHForCausalLM", "decoder.layers.{l}.", "backbone.layers.{l}."
AT, MLP, MIXER = f"{LAYER}self_attention.", f"{LAYER}mlp.", f"{BLOCK}mixer."
NORM = (f"{BLOCK}norm.weight",)
NOT_HEEDED = {"time_step_min": 1e-30}  # not 0: when it makes new weights, transformers takes the logarithm
SYMBOLS = {
    "linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*", "mlp": "-", "moe": "E",
}  # fmt: skip
# Our names; theirs, the one that is written last; and what transformers has where none is there.
SIZES: dict[str, tuple[tuple[str, ...], Any]] = {
    "kv_channels": (("attention_head_dim", "head_dim"), 128),
    "mamba_num_groups": (("mamba_n_groups", "n_groups"), 8),
    "mamba_d_conv": (("mamba_d_conv", "conv_kernel"), 4),
    "mamba_expand": (("mamba_expand", "expand"), 2),
    "mamba_conv_bias": (("mamba_conv_bias", "use_conv_bias"), True),
    "mamba_chunk_size": (("mamba_chunk_size", "chunk_size"), 128),
}


def pattern(theirs: Theirs) -> str:
    """A symbol a layer; `?` for what is none."""
    kinds = theirs.get("layers_block_type")
    if kinds is None:
        return str(theirs.get("hybrid_override_pattern") or "")
    return "".join(SYMBOLS.get(kind, "?") for kind in kinds)


def read_layers(theirs: Theirs) -> dict[str, Any]:
    symbols = pattern(theirs)
    if not symbols:
        raise ValueError("neither layers_block_type nor hybrid_override_pattern says what the layers are")
    if strange := set(symbols) - set("M*-E"):
        named = theirs.get("layers_block_type") or sorted(strange)
        raise ValueError(f"a kind of layer that is not known is among {', '.join(map(str, named))}")
    return {"num_layers": len(symbols)}


def write_layers(config: Config) -> dict[str, Any]:
    check_layers(config, NAME, (("M*-E", "a mixer, attention, an MLP or experts"),))
    return {"hybrid_override_pattern": config.hybrid_layer_pattern, "num_hidden_layers": config.num_layers}


def read_sizes(theirs: Theirs) -> dict[str, Any]:
    return {
        ours: next((theirs[name] for name in names if name in theirs), default)
        for ours, (names, default) in SIZES.items()
    }


def write_sizes(config: Config) -> dict[str, Any]:
    return {names[-1]: getattr(config, ours) for ours, (names, _) in SIZES.items()}


def read_experts(theirs: Theirs) -> dict[str, Any]:
    """DeepSeek-V3's router, experts without a gate, on latents if there is a size for them, and one shared expert."""
    if "E" not in pattern(theirs):
        return {}
    chosen, groups, kept = theirs.get("num_experts_per_tok", 2), theirs.get("n_group", 1), theirs.get("topk_group", 1)
    if theirs.get("norm_topk_prob", True) != (chosen > 1):
        raise ValueError(
            f"norm_topk_prob is {theirs.get('norm_topk_prob', True)} with num_experts_per_tok {chosen}; Megatron makes "
            f"the weights of a token's experts sum to one where there are several, and not where there is one"
        )
    ours = {
        "num_experts": theirs.get("n_routed_experts", 8),
        "moe_ffn_hidden_size": theirs.get("moe_intermediate_size", 7688),
        "moe_shared_expert_intermediate_size": theirs.get("moe_shared_expert_intermediate_size", 7688),
        "moe_latent_size": theirs.get("moe_latent_size"),
        "moe_router_topk": chosen,
        "moe_router_num_groups": groups if kept < groups else None,
        "moe_router_group_topk": kept if kept < groups else None,
        "moe_router_topk_scaling_factor": float(theirs.get("routed_scaling_factor", 1.0)),
        "moe_router_dtype": "fp32",
        **SIGMOID,
    }
    check_ranks(ours, 2)
    return ours


def write_experts(config: Config) -> dict[str, Any]:
    if "E" not in config.hybrid_layer_pattern:
        return {}
    if not config.moe_shared_expert_intermediate_size:
        raise ValueError(f"the mixtures have no shared expert, in {NAME} they always have one")
    groups, kept = kept_groups(config)
    return {
        "n_routed_experts": config.num_experts,
        "n_shared_experts": 1,
        "moe_intermediate_size": config.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": config.moe_shared_expert_intermediate_size,
        "moe_latent_size": config.moe_latent_size,
        "num_experts_per_tok": config.moe_router_topk,
        "norm_topk_prob": config.moe_router_topk > 1,
        "n_group": groups or 1,
        "topk_group": kept or 1,
        "routed_scaling_factor": config.moe_router_topk_scaling_factor or 1.0,
    }


def remarks(theirs: Theirs) -> list[str]:
    said, least, heads = [], theirs.get("time_step_min", 0.001), theirs.get("num_nextn_predict_layers")
    if least > NOT_HEEDED["time_step_min"]:
        said.append(
            f"time_step_min is {least}: transformers raises smaller time steps to it while it reads a prompt; here, as "
            f"where the model was trained, they stay as they are, so that logits are not quite transformers'"
        )
    if heads:
        said.append(f"num_nextn_predict_layers is {heads}: heads for further tokens are left out")
    return said


MIXTURE = (
    "n_routed_experts", "n_shared_experts", "moe_intermediate_size", "moe_shared_expert_intermediate_size",
    "moe_latent_size", "num_experts_per_tok", "norm_topk_prob", "n_group", "topk_group", "routed_scaling_factor",
)  # fmt: skip
UNUSED = (
    "rms_norm_eps", "norm_eps", "time_step_max", "time_step_floor", "time_step_rank", "mamba_dt_min", "mamba_dt_max",
    "mamba_dt_init_floor", "rescale_prenorm_residual", "use_mamba_kernels", "mamba_ssm_cache_dtype",
    "moe_shared_expert_overlap", "num_logits_to_keep", "rope_theta", "partial_rotary_factor", "mtp_layers_block_type",
    "mtp_hybrid_override_pattern",
)  # fmt: skip
ATTENTION = (
    Line(f"{AT}linear_qkv.layer_norm_weight", NORM, GAMMA),
    Line(f"{AT}linear_qkv.weight", tuple(f"{MIXER}{x}_proj.weight" for x in "qkv"), QKV),
    Line(f"{AT}linear_proj.weight", (f"{MIXER}o_proj.weight",), ONE),
)
DENSE = (
    Line(f"{MLP}linear_fc1.layer_norm_weight", NORM, GAMMA),
    Line(f"{MLP}linear_fc1.weight", (f"{MIXER}up_proj.weight",), ONE),
    Line(f"{MLP}linear_fc2.weight", (f"{MIXER}down_proj.weight",), ONE),
)
ROUTED = (
    Line(f"{LAYER}pre_mlp_layernorm.weight", NORM, GAMMA),
    Line(f"{MLP}router.weight", (f"{MIXER}gate.weight",), ONE),
    Line(f"{MLP}router.expert_bias", (f"{MIXER}gate.e_score_correction_bias",), ONE),
    Line(f"{MLP}fc1_latent_proj.weight", (f"{MIXER}fc1_latent_proj.weight",), ONE),
    Line(f"{MLP}fc2_latent_proj.weight", (f"{MIXER}fc2_latent_proj.weight",), ONE),
    Line(f"{MLP}experts.linear_fc1.weight", (f"{MIXER}experts.{{e}}.up_proj.weight",), EXPERTS),
    Line(f"{MLP}experts.linear_fc2.weight", (f"{MIXER}experts.{{e}}.down_proj.weight",), EXPERTS),
    Line(f"{MLP}shared_experts.linear_fc1.weight", (f"{MIXER}shared_experts.up_proj.weight",), ONE),
    Line(f"{MLP}shared_experts.linear_fc2.weight", (f"{MIXER}shared_experts.down_proj.weight",), ONE),
)

NEMOTRON_H = Family(
    name="nemotron_h",
    architecture=NAME,
    fields=(
        Field("vocab_size", "vocab_size"),
        Field("hidden_size", "hidden_size"),
        Field("num_attention_heads", "num_attention_heads", 32),
        Field("num_key_value_heads", "num_query_groups", 8),
        Field("max_position_embeddings", "max_position_embeddings", 4096),
        Field("intermediate_size", "ffn_hidden_size", 21504),
        activation("mlp_hidden_act", "relu2"),
        Field("ssm_state_size", "mamba_state_dim", 128),
        Field("mamba_num_heads", "mamba_num_heads", 128),
        Field("mamba_head_dim", "mamba_head_dim", 64),
    ),
    lines=(
        Line("embedding.word_embeddings.weight", ("backbone.embeddings.weight",), ONE),
        Line("decoder.final_norm.weight", ("backbone.norm_f.weight",), GAMMA),
        Line("output_layer.weight", ("lm_head.weight",), ONE),
        *mixer(MIXER, *NORM),
        *ATTENTION,
        *DENSE,
        *ROUTED,
    ),
    settings=(
        Settings(("layers_block_type", "hybrid_override_pattern", "num_hidden_layers"), read_layers, write_layers),
        Settings(tuple(name for names, _ in SIZES.values() for name in names), read_sizes, write_sizes),
        Settings(MIXTURE, read_experts, write_experts),
        Settings(("time_step_min", "num_nextn_predict_layers"), lambda theirs: {}, lambda config: NOT_HEEDED),
        epsilon("layer_norm_epsilon", pattern),
        TIME_STEPS,
    ),
    fixed={
        **PLAIN_RMS,
        "gated_linear_unit": False,
        "position_embedding_type": "none",
        "tie_word_embeddings": False,
    },
    constants={
        "tie_word_embeddings": (False,),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "use_bias": (False,),
        "mamba_proj_bias": (False,),
        "mamba_hidden_act": ("silu",),
        "residual_in_fp32": (False,),
        "sliding_window": (None,),
    },
    harmless=frozenset(UNUSED),
    remarks=remarks,
    pattern=pattern,
    once={r"^backbone\.embedding\.": "backbone.embeddings."},
    base="backbone.",
    ignored={r"mtp\..*": "heads for further tokens, which transformers leaves out, too"},
)
