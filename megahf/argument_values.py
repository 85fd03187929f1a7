"""What one argument's value means for a config field, and the arguments of a field's value: each with its inverse.

A reader gets the stored value and all arguments; a writer gets the field's value and the whole config. The rules follow
`core_transformer_config_from_args` (megatron/training/argument_utils.py), `TransformerConfig.__post_init__` and
`validate_args` of Megatron-LM, 2026.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .errors import refuse
from .grid_arguments import size
from .patterns import pattern, written
from .unbuilt import before_014

Args = Mapping[str, Any]
Config = Any  # anything with McoreGPTConfig's fields
Read = Callable[[Any, Args], Any]
Write = Callable[[Any, Config], dict[str, Any]]


def ffn_hidden_size(value: int | None, args: Args) -> int:
    """What Megatron fills in when the option is not given: 4h, or two thirds of it in steps of 64 with SwiGLU."""
    if value is not None:
        return value
    four = 4 * args["hidden_size"]
    return int((four * 2 / 3) / 64) * 64 if args.get("swiglu") else four


def num_query_groups(value: int | None, args: Args) -> int:
    """`num_query_groups` is 1 by default and counts only with `--group-query-attention`."""
    return value if args.get("group_query_attention") and value else args["num_attention_heads"]


def write_num_query_groups(value: int, config: Config) -> dict[str, Any]:
    grouped = value != config.num_attention_heads
    return {"group_query_attention": grouped, "num_query_groups": value if grouped else 1}


def position_embedding_type(value: str, args: Args) -> str:
    return "rope" if args.get("use_rotary_position_embeddings") else value


def activation_func(_: Any, args: Args) -> str:
    """The function that ran: the fused bias + gelu kernel, on by default with biases, is the tanh approximation."""
    if args.get("swiglu"):
        return "silu"
    if args.get("squared_relu"):
        return "squared_relu"
    if args.get("quick_geglu"):
        return "quick_gelu"
    fused = args.get("bias_gelu_fusion", True) and args.get("add_bias_linear", True)
    return "gelu_tanh" if fused else "gelu"


def gated_linear_unit(swiglu: Any, args: Args) -> bool:
    return bool(swiglu) or activation_func(None, args) == "quick_gelu"


def write_activation_func(value: str, config: Config) -> dict[str, Any]:
    """Kernels that fuse the bias are for what they compute; Megatron refuses others, and clamps and offsets in them."""
    made = {"swiglu": value == "silu", "squared_relu": value == "squared_relu", "quick_geglu": value == "quick_gelu"}
    if value != "silu":
        return {**made, "bias_gelu_fusion": value == "gelu_tanh"}
    plain = config.activation_func_clamp_value is None and not config.glu_linear_offset
    return {**made, "bias_swiglu_fusion": plain and not (config.num_experts and config.add_bias_linear)}


def window_size(value: Any, _: Args) -> list[int] | None:
    pair = written(value) if isinstance(value, str) else value
    if pair is None or tuple(pair) in ((-1, -1), (-1, 0)):
        return None
    left, right = (int(side) for side in pair)
    if right != 0:
        raise refuse(f"--window-size {left} {right} looks ahead; only (left, 0) is causal", "args")
    return [left, right]


def write_window_size(value: Any, _: Config) -> dict[str, Any]:
    pair = window_size(value, {})
    return {"window_size": None if pair is None else tuple(pair)}


def softmax_scale(value: float | None, args: Args) -> float | None:
    """muP divides by the head size, not by its root (`TransformerConfig.__post_init__`)."""
    if value is not None or not args.get("use_mup"):
        return value
    base = 1.0 if args.get("mup_base_head_dim") is None else args["mup_base_head_dim"] ** 0.5
    return float(base / kv_channels(args.get("kv_channels"), args) ** args.get("mup_attn_scale_power", 1.0))


def write_softmax_scale(value: float | None, config: Config) -> dict[str, Any]:
    """By muP of width 1, which scales no learning rate and no initial weight: there is no other argument for it.

    With it attention is scaled by `base ** 0.5 / kv_channels ** power`.
    """
    if value is None and config.mup_embedding_mult == 1 and config.mup_output_mult == 1:
        return {"use_mup": False}
    made = {"use_mup": True, "mup_base_hidden_size": config.hidden_size}
    if value in (None, 1.0 / config.kv_channels):
        return {**made, "mup_base_head_dim": None, "mup_attn_scale_power": 0.5 if value is None else 1.0}
    return {**made, "mup_base_head_dim": float(value) ** 2, "mup_attn_scale_power": 0.0}


def explicit_scale(value: float | None, config: Config) -> float:
    return float(1.0 / config.kv_channels**0.5) if value is None else value


def kv_channels(value: int | None, args: Args) -> int:
    return value or args["hidden_size"] // args["num_attention_heads"]


def mup_output_mult(value: float, args: Args) -> float:
    """Set to 1 / width multiplier unless given (`TransformerConfig.__post_init__`)."""
    if not args.get("use_mup"):
        return 1.0
    width = args["hidden_size"] / (args.get("mup_base_hidden_size") or args["hidden_size"])
    return 1.0 / width if value == 1.0 else value


def number(value: Any, _: Args) -> Any:
    return None if value is None else float(value)


def write_number(name: str) -> Write:
    """As an integer where it is one: for these Megatron's command line takes no other."""
    return lambda value, _: {name: int(value) if value is not None and value == int(value) else value}


def unless(name: str, default: Any) -> Write:
    """None for the value that None stands for: options that are not needed are not given."""
    return lambda value, _: {name: None if value == default else value}


def yarn(default: Any) -> Callable[[Any, Args], Any]:
    """The defaults that `_apply_yarn_config_from_args` puts where an option is not given."""
    return lambda value, args: default if value is None else value


def yarn_or_latent(default: Any, latent: str) -> Callable[[Any, Args], Any]:
    """As `yarn`; multi-latent attention reads `latent`, for which there is no option, so that its default runs."""

    def read(value: Any, args: Args) -> Any:
        if args.get("multi_latent_attention"):
            value = args.get(latent)
        return default if value is None else value

    return read


def write_yarn_or_latent(name: str, default: Any) -> Write:
    return lambda value, config: {} if config.multi_latent_attention else unless(name, default)(value, config)


def yarn_original(value: int | None, args: Args) -> int:
    """Multi-latent attention of Megatron before 0.14 stretched from `max_position_embeddings`."""
    if before_014(args):
        return int(args["max_position_embeddings"])
    return int(yarn_or_latent(4096, "original_max_position_embeddings")(value, args))


def mscale(default: float) -> Callable[[Any, Args], float]:
    """The first Megatrons with multi-latent attention had no option for it, and 0.707 in their config."""

    def read(value: float | None, args: Args) -> float:
        if value is None:
            return 0.707 if before_014(args) and "mscale" not in args else default
        return float(value)

    return read


def moe_ffn_hidden_size(value: int | None, args: Args) -> int:
    return value or ffn_hidden_size(args.get("ffn_hidden_size"), args)


def write_moe_ffn_hidden_size(value: int, config: Config) -> dict[str, Any]:
    return {"moe_ffn_hidden_size": value if config.num_experts or value != config.ffn_hidden_size else None}


def moe_layer_freq(value: Any, args: Args) -> Any:
    """A number, or one flag a layer; 1 for models without experts."""
    flags = pattern(value, args) if args.get("num_experts") else 1
    if isinstance(flags, int) and flags < 1:
        raise ValueError("a frequency is 1 or more")
    layers = args.get("num_layers") or args.get("encoder_num_layers")
    if isinstance(flags, list) and len(flags) != layers:
        raise ValueError(f"{len(flags)} flags for {layers} layers")
    return flags


def layers_with_experts(value: Any, config: Config) -> Any:
    return value if config.num_experts else 1


def router_groups(value: int | None, args: Args) -> int | None:
    """Megatron before 0.12 limited devices, not groups: a group is an expert-parallel rank."""
    return size(args, "expert_model_parallel_size") if args.get("moe_router_topk_limited_devices") else value


def biased_router(args: Args) -> bool:
    return bool(args.get("num_experts") and args.get("add_bias_linear", True))


def capacity(value: float | None, args: Args) -> float | None:
    """Megatron's trainer takes negative numbers for none."""
    return None if value is None or value < 0 else float(value)


def load_balancing(value: Any, args: Args) -> Any:
    """One type or several; lists of one are what the command line makes of one."""
    return value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value


# A writer for each field that no argument is named after: another one's writer, or what Megatron derives, says it.
def nothing(_: Any, config: Config) -> dict[str, Any]:
    return {}


# Fields that say one thing in two ways: the one way.
ALIKE: dict[str, Callable[[Any, Config], Any]] = {
    "softmax_scale": explicit_scale,
    "window_size": lambda value, config: window_size(value, {}),
    "moe_layer_freq": layers_with_experts,
    "moe_ffn_hidden_size": lambda value, config: value if config.num_experts else None,
    "moe_router_load_balancing_type": lambda value, config: load_balancing(value, {}),
    "moe_aux_loss_coeff": lambda value, config: load_balancing(value, {}),
}
