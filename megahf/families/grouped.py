"""DeepSeek's mixture of experts, which others took over: dense layers first, shared experts, experts in groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..cuts import Config
from ..rows import is_moe
from .experts import frequency, with_experts
from .family import Settings, Theirs

KEYS = (
    "n_routed_experts", "num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size",
    "n_shared_experts", "first_k_dense_replace", "moe_layer_freq", "n_group", "topk_group", "routed_scaling_factor",
    "norm_topk_prob",
)  # fmt: skip
SOFTMAX = {"moe_router_score_function": "softmax", "moe_router_pre_softmax": True}
SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}


def kept_groups(config: Config) -> tuple[int | None, int | None]:
    """How many groups experts are in, and how many are kept; None both where that is no restriction."""
    groups, kept = config.moe_router_num_groups, config.moe_router_group_topk
    return (groups, kept) if kept and groups and kept < groups else (None, None)


def value(theirs: Theirs, name: str, defaults: Mapping[str, Any]) -> Any:
    """A setting; as transformers' class has it where config.json says nothing."""
    found = theirs.get(name, defaults.get(name))
    if found is None:
        raise ValueError(f"{name} is not there")
    return found


def sigmoids(defaults: Mapping[str, Any]) -> Settings:
    """As DeepSeek-V3: sigmoids, a bias for the choice alone, groups ranked by their best two experts.

    Args:
        defaults: what transformers' class has where config.json says nothing.
    """

    def read(theirs: Theirs) -> dict[str, Any]:
        ours = mixture(theirs, defaults)
        if not ours:
            return {}
        topk = ours["moe_router_topk"]
        if bool(value(theirs, "norm_topk_prob", defaults)) != (topk > 1):
            rule = "does not normalise the weight of one expert" if topk == 1 else "normalises those of several"
            raise ValueError(f"norm_topk_prob is {theirs.get('norm_topk_prob')}; Megatron {rule}")
        check_ranks(ours, 2)
        return {**ours, **SIGMOID}

    def write(config: Config) -> dict[str, Any]:
        return {**mixed(config), "norm_topk_prob": config.moe_router_topk > 1}

    return Settings(KEYS, read, write)


def softmaxes(defaults: Mapping[str, Any]) -> Settings:
    """As DeepSeek-V2: weights of a softmax over all experts, groups ranked by their best expert, if they are at all.

    transformers' class leaves `norm_topk_prob` as it is unread; DeepSeek's own normalised by it.
    """

    def read(theirs: Theirs) -> dict[str, Any]:
        if theirs.get("norm_topk_prob"):
            raise ValueError("norm_topk_prob is true; built is a softmax whose weights are left as they are")
        method = theirs.get("topk_method", "greedy")
        if method not in ("greedy", "group_limited_greedy"):
            raise ValueError(f"topk_method is {method!r}; built are greedy and group_limited_greedy")
        ours = mixture(theirs if method != "greedy" else {**theirs, "n_group": 1, "topk_group": 1}, defaults)
        if not ours:
            return {}
        check_ranks(ours, 1)
        return {**ours, **SOFTMAX}

    def write(config: Config) -> dict[str, Any]:
        method = "group_limited_greedy" if any(kept_groups(config)) else "greedy"
        return {**mixed(config), "topk_method": method, "norm_topk_prob": False}

    return Settings((*KEYS, "topk_method"), read, write)


def check_ranks(ours: Mapping[str, Any], experts: int) -> None:
    """Megatron ranks a group by as many experts as it is to give, theirs by the same number always."""
    kept = ours.get("moe_router_group_topk")
    if kept and ours["moe_router_topk"] // kept != experts:
        raise ValueError(
            f"groups are ranked by their best {experts}, in Megatron by their best {ours['moe_router_topk'] // kept} "
            f"({ours['moe_router_topk']} experts of {kept} groups): another choice"
        )


def mixture(theirs: Theirs, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields; none where every layer is dense."""
    dense, total = value(theirs, "first_k_dense_replace", defaults), value(theirs, "num_hidden_layers", {})
    if theirs.get("moe_layer_freq", 1) != 1:
        raise ValueError(f"moe_layer_freq is {theirs['moe_layer_freq']}; transformers has experts in every layer")
    if dense >= total:
        return {}
    shares, width = value(theirs, "n_shared_experts", defaults), value(theirs, "moe_intermediate_size", defaults)
    if not shares:
        raise ValueError("n_shared_experts is 0; the architecture always has some")
    groups, kept = (theirs.get(name, defaults.get(name)) or 1 for name in ("n_group", "topk_group"))
    experts = theirs.get("num_local_experts") or theirs.get("num_experts")
    return {
        "num_experts": experts or value(theirs, "n_routed_experts", defaults),
        "moe_router_topk": value(theirs, "num_experts_per_tok", defaults),
        "moe_ffn_hidden_size": width,
        "moe_shared_expert_intermediate_size": shares * width,
        "moe_layer_freq": frequency([layer >= dense for layer in range(total)]),
        "moe_router_topk_scaling_factor": float(value(theirs, "routed_scaling_factor", defaults)),
        "moe_router_num_groups": groups if kept < groups else None,
        "moe_router_group_topk": kept if kept < groups else None,
        "moe_router_dtype": "fp32",
    }


def mixed(config: Config) -> dict[str, Any]:
    """DeepSeek's settings of our mixture."""
    if not any(is_moe(config, layer) for layer in range(config.num_layers)):
        return {"first_k_dense_replace": config.num_layers}
    flags, width = with_experts(config), config.moe_ffn_hidden_size
    dense = flags.index(True)
    if not all(flags[dense:]):
        raise ValueError("layers without experts come after layers with them; there the first ones are dense")
    both = config.moe_shared_expert_intermediate_size or 0
    if not both or both % width:
        raise ValueError(f"shared experts are {both} wide; there they are one or more times the {width} of an expert")
    groups, kept = kept_groups(config)
    return {
        "n_routed_experts": config.num_experts,
        "num_experts_per_tok": config.moe_router_topk,
        "moe_intermediate_size": width,
        "n_shared_experts": both // width,
        "first_k_dense_replace": dense,
        "n_group": groups or 1,
        "topk_group": kept or 1,
        "routed_scaling_factor": config.moe_router_topk_scaling_factor or 1.0,
    }
