"""What the fields of a configuration are held to, in words for whoever wrote it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration_mcore import McoreGPTConfig

SCORE_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")
LOAD_BALANCING = ("none", "aux_loss", "seq_aux_loss", "global_aux_loss", "sinkhorn")
ROUTER_DTYPES = ("fp32", "fp64")
DROP_POLICIES = ("probs", "position")


def check_layer_pattern(name: str, frequency: int | list[int] | None, layers: int) -> None:
    if isinstance(frequency, list) and len(frequency) != layers:
        raise ValueError(f"{name} has {len(frequency)} entries, the model {layers} layers: one entry a layer is needed")
    if isinstance(frequency, int) and frequency < 1:
        raise ValueError(f"{name} is {frequency}: a frequency is 1 or more")


def at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}: at least 1 is needed")


def above_zero(name: str, value: float) -> None:
    if value <= 0:
        raise ValueError(f"{name} is {value}: it must be above 0")


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: it must be one of {', '.join(choices)}")


def check_experts(config: Any) -> None:
    """A mixture of experts whose sizes fit and whose words have a meaning."""
    if config.num_experts is None:
        return
    for name in ("num_experts", "moe_ffn_hidden_size", "moe_router_topk"):
        at_least_one(name, getattr(config, name))
    for name in ("moe_shared_expert_intermediate_size", "moe_latent_size"):
        if getattr(config, name) is not None:
            at_least_one(name, getattr(config, name))
    if config.moe_router_topk > config.num_experts:
        raise ValueError(
            f"a token cannot go to {config.moe_router_topk} (moe_router_topk) of {config.num_experts} experts"
        )
    if config.moe_apply_probs_on_input and config.moe_router_topk != 1:
        raise ValueError(
            f"moe_apply_probs_on_input weighs an expert's input, which with moe_router_topk {config.moe_router_topk} "
            f"is that of several: moe_router_topk must be 1"
        )
    if config.moe_shared_expert_gate and not config.moe_shared_expert_intermediate_size:
        raise ValueError(
            "moe_shared_expert_gate is true, but there are no shared experts to be gated: it must be false"
        )
    check_choice(config)
    check_groups(config)
    check_balance(config)


def check_choice(config: McoreGPTConfig) -> None:
    """How scores are made, and what happens to tokens beyond an expert's capacity."""
    one_of("moe_router_score_function", config.moe_router_score_function, SCORE_FUNCTIONS)
    one_of("moe_token_drop_policy", config.moe_token_drop_policy, DROP_POLICIES)
    if config.moe_router_dtype is not None:
        one_of("moe_router_dtype", config.moe_router_dtype, ROUTER_DTYPES)
    if config.moe_router_enable_expert_bias and config.moe_router_score_function == "softmax":
        raise ValueError(
            "moe_router_enable_expert_bias is for scores that are made one by one: moe_router_score_function must be "
            "sigmoid or sqrtsoftplus with it, as in Megatron"
        )
    for name in ("moe_expert_capacity_factor", "moe_router_topk_scaling_factor"):
        if getattr(config, name) is not None:
            above_zero(name, getattr(config, name))


def check_groups(config: McoreGPTConfig) -> None:
    """Experts in groups that are equal, and of which those kept have enough of them."""
    kept, groups, experts = config.moe_router_group_topk, config.moe_router_num_groups, config.num_experts or 0
    if not kept:
        return
    if not groups or experts % groups or kept > groups:
        raise ValueError(
            f"moe_router_group_topk {kept} chooses among moe_router_num_groups {groups}: these must be at least as "
            f"many, and share out {experts} experts evenly"
        )
    most = kept * experts // groups
    if not kept <= config.moe_router_topk <= most:
        raise ValueError(
            f"moe_router_topk {config.moe_router_topk} must be from {kept}, one expert a group that is kept, to "
            f"{most}, all experts of {kept} groups"
        )


def check_balance(config: McoreGPTConfig) -> None:
    """Load balancing types with a coefficient each; Sinkhorn stands alone."""
    kinds, values = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        one_of("moe_router_load_balancing_type", kind, LOAD_BALANCING)
    lengths = [len(x) if isinstance(x, list) else None for x in (kinds, values)]
    if lengths[0] != lengths[1]:
        raise ValueError(
            f"moe_aux_loss_coeff {values} does not fit moe_router_load_balancing_type {kinds}: one coefficient a type "
            f"is needed, both lists of one length or neither a list"
        )
    if "sinkhorn" not in kinds:
        return
    if kinds != "sinkhorn" or values or config.moe_expert_capacity_factor is not None:
        raise ValueError(
            "moe_router_load_balancing_type sinkhorn goes with no other type, no moe_aux_loss_coeff and no "
            "moe_expert_capacity_factor, as in Megatron"
        )


def check_heads(config: McoreGPTConfig) -> None:
    """Heads for further tokens (MTP), and a kind for each one's layer."""
    heads, scale = config.mtp_num_layers, config.mtp_loss_scaling_factor
    if heads is None:
        return
    at_least_one("mtp_num_layers", heads)
    if scale < 0:
        raise ValueError(f"mtp_loss_scaling_factor is {scale}: it must be 0 (heads do not learn) or above")
    listed = config.no_rope_freq or isinstance(config.window_attn_skip_freq, list)
    if listed and heads > config.num_layers:
        raise ValueError(
            f"the layers of {heads} heads (mtp_num_layers) are of the kinds of the model's first, by no_rope_freq and "
            f"window_attn_skip_freq, but num_layers is {config.num_layers}: there must be as many layers as heads"
        )
