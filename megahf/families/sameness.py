"""Which settings of two models make them different functions: those without effect do not count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..cuts import Config
from ..rows import is_hybrid, is_moe
from .grouped import kept_groups
from .rope import unrotated
from .windows import flags, tokens

# Of training, not of the function.
NEUTRAL = frozenset((
    "attention_dropout", "hidden_dropout", "init_method_std", "mtp_loss_scaling_factor",
    "moe_aux_loss_coeff", "moe_z_loss_coeff", "mamba_chunk_size",
))  # fmt: skip

# Of how far numbers are rounded on the way: said, and not refused.
ROUNDED = frozenset(("moe_router_dtype",))

LATENT = "q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim v_head_dim rope_type"
YARN = (
    "yarn_rotary_scaling_factor yarn_original_max_position_embeddings yarn_beta_fast yarn_beta_slow yarn_mscale "
    "yarn_mscale_all_dim yarn_correction_range_round_to_int"
)
MIXER = "mamba_version mamba_state_dim mamba_d_conv mamba_conv_bias mamba_proj_bias"
MIXER_1 = "mamba_expand mamba_dt_rank"
MIXER_2 = "mamba_head_dim mamba_num_groups mamba_num_heads mamba_d_has_hdim mamba_rmsnorm"


def has(symbols: str, config: Config) -> bool:
    """Whether a hybrid has one of these layers; a GPT has them all."""
    return not is_hybrid(config) or any(symbol in config.hybrid_layer_pattern for symbol in symbols)


def rotates(config: Config) -> bool:
    latent = config.multi_latent_attention and has("+*", config)
    return latent or (config.position_embedding_type in ("rope", "yarn") and has("*", config))


def stretched(config: Config) -> bool:
    kind = config.rope_type if config.multi_latent_attention else config.position_embedding_type
    return rotates(config) and kind == "yarn"


def sharpened(config: Config) -> bool:
    """Whether attention by latents is, which it is in Megatron by the stretch also where nothing is stretched."""
    factor, weight = config.yarn_rotary_scaling_factor, config.yarn_mscale_all_dim
    return config.multi_latent_attention and has("+*", config) and factor > 1 and bool(weight)


def attends(config: Config) -> bool:
    return has("*+", config)


def mixes(config: Config) -> bool:
    return is_hybrid(config) and has("M", config)


def any_experts(config: Config) -> bool:
    return any(is_moe(config, layer) for layer in range(config.num_layers))


def any_dense(config: Config) -> bool:
    if is_hybrid(config):
        return has("-", config)
    return not all(is_moe(config, layer) for layer in range(config.num_layers))


# Settings that count only where something holds.
WHERE: tuple[tuple[Callable[[Config], bool], str], ...] = (
    (lambda c: c.multi_latent_attention, LATENT),
    (stretched, YARN),
    (lambda c: stretched(c) or sharpened(c), "yarn_rotary_scaling_factor yarn_mscale_all_dim"),
    (rotates, "rotary_base rotary_interleaved"),
    (lambda c: rotates(c) and not c.multi_latent_attention,
     "rotary_percent rotary_seq_len_interpolation_factor use_rope_scaling no_rope_freq"),
    (lambda c: c.use_rope_scaling, "rope_scaling_factor"),
    (lambda c: c.position_embedding_type == "learned_absolute", "max_position_embeddings"),
    (lambda c: not c.multi_latent_attention and has("*", c), "num_query_groups kv_channels"),
    (lambda c: has("*+", c),
     "num_attention_heads multi_latent_attention qk_layernorm qk_l2_norm attention_output_gate softmax_type "
     "softmax_scale window_size add_qkv_bias"),
    (lambda c: tokens(c.window_size) is not None, "window_attn_skip_freq"),
    (any_dense, "ffn_hidden_size"),
    (lambda c: any_dense(c) or any_experts(c),
     "activation_func gated_linear_unit activation_func_clamp_value glu_linear_offset"),
    (any_experts,
     "num_experts moe_layer_freq moe_ffn_hidden_size moe_shared_expert_intermediate_size moe_shared_expert_gate "
     "moe_latent_size moe_router_topk moe_router_score_function moe_router_num_groups "
     "moe_router_group_topk moe_router_topk_scaling_factor moe_router_enable_expert_bias moe_router_bias "
     "moe_router_load_balancing_type moe_router_dtype moe_input_jitter_eps moe_apply_probs_on_input "
     "moe_expert_capacity_factor"),
    (lambda c: any_experts(c) and c.moe_router_score_function == "softmax", "moe_router_pre_softmax"),
    (lambda c: any_experts(c) and c.moe_expert_capacity_factor is not None, "moe_token_drop_policy"),
    (lambda c: bool(c.mtp_num_layers), "mtp_use_repeated_layer mtp_layer_pattern"),
    (mixes, MIXER),
    (lambda c: mixes(c) and c.mamba_version == 1, MIXER_1),
    (lambda c: mixes(c) and c.mamba_version == 2, MIXER_2),
)  # fmt: skip
BOUND = {name: condition for condition, names in WHERE for name in names.split()}


def counts(name: str, config: Config) -> bool:
    return name not in NEUTRAL and (name not in BOUND or BOUND[name](config))


def positions(config: Config) -> str:
    """Rotations are of attention; without it they are none."""
    kind = config.position_embedding_type
    return kind if attends(config) or kind == "learned_absolute" else "none"


def concentration(name: str, config: Config) -> Any:
    """YaRN's two scales; without one of them it is as with Megatron's own."""
    own = {"yarn_mscale": 1.0, "yarn_mscale_all_dim": 0.0}
    return own[name] if None in (config.yarn_mscale, config.yarn_mscale_all_dim) else getattr(config, name)


# Settings that say one thing in several ways.
ALIKE: dict[str, Callable[[Config], Any]] = {
    "position_embedding_type": positions,
    "moe_layer_freq": lambda c: [is_moe(c, layer) for layer in range(c.num_layers)],
    "window_size": lambda c: tokens(c.window_size) and list(c.window_size),
    "window_attn_skip_freq": flags,
    "no_rope_freq": unrotated,
    "softmax_scale": lambda c: c.softmax_scale or (None if c.multi_latent_attention else c.kv_channels**-0.5),
    "moe_router_num_groups": lambda c: kept_groups(c)[0],
    "moe_router_group_topk": lambda c: kept_groups(c)[1],
    "moe_router_load_balancing_type": lambda c: c.moe_router_load_balancing_type == "sinkhorn" and "sinkhorn",
    "moe_router_topk_scaling_factor": lambda c: c.moe_router_topk_scaling_factor or 1.0,
    "yarn_mscale": lambda c: concentration("yarn_mscale", c),
    "yarn_mscale_all_dim": lambda c: concentration("yarn_mscale_all_dim", c),
    "num_tokentypes": lambda c: max(getattr(c, "num_tokentypes", 0), 1),  # one of zeros is none
}


def plain(name: str, config: Config) -> Any:
    """A setting's value, alike for alike functions."""
    value = ALIKE[name](config) if name in ALIKE else getattr(config, name, None)
    return list(value) if isinstance(value, tuple) else value


Difference = tuple[str, Any, Any]  # name, ours, theirs


def differences(ours: Config, theirs: Config) -> list[Difference]:
    """The settings that make the models different functions."""
    return [found for found in all_differences(ours, theirs) if found[0] not in ROUNDED]


def roundings(ours: Config, theirs: Config) -> list[Difference]:
    """The settings by which one function is rounded differently."""
    return [found for found in all_differences(ours, theirs) if found[0] in ROUNDED]


def all_differences(ours: Config, theirs: Config) -> list[Difference]:
    """The settings, of all that have an effect in either model, in which they differ."""
    names = sorted(vars(ours).keys() | vars(theirs).keys())
    found = []
    for name in names:
        if counts(name, ours) or counts(name, theirs):
            mine, other = plain(name, ours), plain(name, theirs)
            if mine != other:
                found.append((name, mine, other))
    return found
