"""Mamba mixers in a family's rows: their weights, and the settings that Megatron's mixers leave no choice in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ..cuts import Config
from .family import GAMMA, ONE, Line, Settings, Theirs

MIXER = "decoder.layers.{l}.mixer."
EPSILON = 1e-5  # of Megatron's gated norm, whatever `layernorm_epsilon` says
UNLIMITED = (0.0, math.inf)
KINDS = {
    "M": "a Mamba mixer", "*": "attention", "+": "multi-latent attention", "-": "an MLP", "E": "a mixture of experts",
}  # fmt: skip
PLAIN_RMS = {
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "mamba_version": 2,
    "mamba_d_has_hdim": False,
    "mamba_rmsnorm": True,
    "mamba_proj_bias": False,
}
IN_BOTH = ("in_proj.weight", "conv1d.weight", "conv1d.bias", "A_log", "D", "out_proj.weight")
IN_2 = (*IN_BOTH, "dt_bias", "norm.weight")  # packed as in Megatron: z | x | B | C | dt, and x | B | C
IN_1 = (*IN_BOTH, "x_proj.weight", "dt_proj.weight", "dt_proj.bias")  # x | z, and dt | B | C


def unmoved(layer: int, config: Config) -> int:
    return layer


def mixer(
    at: str, norm: str, names: tuple[str, ...] = IN_2, layer: Callable[[int, Config], int] = unmoved
) -> tuple[Line, ...]:
    """A mixer's weights, which have Megatron's own names, `at` a place of theirs, and the norm in front of it."""
    return (
        Line(f"{MIXER}in_proj.layer_norm_weight", (norm,), GAMMA, layer),
        *(Line(f"{MIXER}{name}", (f"{at}{name}",), ONE, layer) for name in names),
    )


def epsilon(key: str, pattern: Callable[[Theirs], str]) -> Settings:
    """Their one epsilon is also the gated norms', which in Megatron is fixed."""

    def read(theirs: Theirs) -> dict[str, Any]:
        value = theirs.get(key, EPSILON)
        if value != EPSILON and "M" in pattern(theirs):
            raise ValueError(f"it is {value}; mixers have a norm whose epsilon is {EPSILON} in Megatron, always")
        return {"layernorm_epsilon": value}

    return Settings((key,), read, lambda config: {key: config.layernorm_epsilon})


def width(heads: str, each: str, expand: str, default: int | str) -> Settings:
    """Heads and their channels, which make a whole multiple of the hidden size."""

    def read(theirs: Theirs) -> dict[str, Any]:
        count, times = theirs.get(heads, 128), theirs.get(expand, 2)
        channels = times * theirs["hidden_size"]
        size = theirs.get(each, default)
        size = channels // count if size == "auto" else size
        if count * size != channels:
            raise ValueError(f"{count} heads of {size} channels are not {times} x hidden_size {theirs['hidden_size']}")
        return {"mamba_num_heads": count, "mamba_head_dim": size, "mamba_expand": times}

    def write(config: Config) -> dict[str, Any]:
        if config.mamba_version == 1:
            raise ValueError("its mixers are Mamba-1's, whose channels are in no heads")
        count, size = config.mamba_num_heads, config.mamba_head_dim
        times, rest = divmod(count * size, config.hidden_size)
        if rest:
            raise ValueError(f"{count} heads of {size} channels are no whole multiple of hidden_size, as {expand} is")
        return {heads: count, each: size, expand: times}

    return Settings((heads, each, expand), read, write)


def groups(key: str, default: int) -> Callable[[Theirs], list[str]]:
    """Whether the mixers' norms are of groups of channels, which transformers took up with 5.23."""

    def remarks(theirs: Theirs) -> list[str]:
        count = theirs.get(key, default)
        told = (
            f"{key} is {count}: Megatron, and transformers since 5.23, norm each group of a mixer's channels by itself"
        )
        return [f"{told}; transformers before that norms them all at once, which is another model"] if count > 1 else []

    return remarks


def unlimited(theirs: Theirs) -> dict[str, Any]:
    """Time steps as they come: Megatron's mixers have no bounds for them."""
    limits = theirs.get("time_step_limit") or UNLIMITED
    low, high = (float(limit["__float__"] if isinstance(limit, dict) else limit) for limit in limits)
    if low > 0 or high < math.inf:
        raise ValueError(f"time steps are held between {low} and {high}; in Megatron's mixers they are not")
    return {}


TIME_STEPS = Settings(("time_step_limit",), unlimited, lambda config: {})  # unlimited where it is not said


def check_layers(config: Config, architecture: str, places: tuple[tuple[str, str], ...]) -> None:
    """ValueError says the first layer that is not what `architecture` has there.

    Args:
        places: the symbols that its layers can be, and these in words; place by place, over and over.
    """
    for layer, symbol in enumerate(config.hybrid_layer_pattern):
        symbols, words = places[layer % len(places)]
        if symbol not in symbols:
            raise ValueError(f"layer {layer} is {KINDS[symbol]} where {architecture} has {words}")
