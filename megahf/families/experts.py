"""Mixtures of experts: the lines and the words that several architectures have in common."""

from __future__ import annotations

from typing import Any

from ..cuts import Config
from ..rows import is_moe
from .family import EXPERTS, GAMMA, GATED, GATED_EXPERTS, ONE, Line, Settings, Theirs
from .llama import LAYER, THEIRS

MLP, THEIR_MLP = f"{LAYER}mlp.", f"{THEIRS}mlp."

NORM = Line(f"{LAYER}pre_mlp_layernorm.weight", (f"{THEIRS}post_attention_layernorm.weight",), GAMMA)
ROUTER = Line(f"{MLP}router.weight", (f"{THEIR_MLP}gate.weight",), ONE)
CORRECTION = Line(f"{MLP}router.expert_bias", (f"{THEIR_MLP}gate.e_score_correction_bias",), ONE)
SHARED_GATE = Line(f"{MLP}shared_experts.gate_weight", (f"{THEIR_MLP}shared_expert_gate.weight",), ONE)


def routed(under: str, gate: str, up: str, down: str) -> tuple[Line, ...]:
    """The experts, whose matrices lie one by one as `{under}experts.{e}.{gate}.weight`."""
    at, theirs = f"{MLP}experts.", f"{under}experts.{{e}}."
    return (
        Line(f"{at}linear_fc1.weight", tuple(f"{theirs}{name}.weight" for name in (gate, up)), GATED_EXPERTS),
        Line(f"{at}linear_fc2.weight", (f"{theirs}{down}.weight",), EXPERTS),
    )


def shared(under: str) -> tuple[Line, ...]:
    """The MLP of all shared experts together."""
    at = f"{MLP}shared_experts."
    return (
        Line(f"{at}linear_fc1.weight", tuple(f"{under}{name}_proj.weight" for name in ("gate", "up")), GATED),
        Line(f"{at}linear_fc2.weight", (f"{under}down_proj.weight",), ONE),
    )


ROUTED = (NORM, ROUTER, *routed(THEIR_MLP, "gate_proj", "up_proj", "down_proj"))


def frequency(flags: list[bool]) -> int | list[int]:
    """`moe_layer_freq` of layers that have experts where `flags` say so."""
    return 1 if all(flags) else [int(flag) for flag in flags]


def with_experts(config: Config) -> list[bool]:
    """Whether each layer has experts."""
    flags = [is_moe(config, layer) for layer in range(config.num_layers)]
    if not any(flags):
        raise ValueError("no layer has experts")
    return flags


def read_width(theirs: Theirs) -> dict[str, Any]:
    return dict.fromkeys(("ffn_hidden_size", "moe_ffn_hidden_size"), theirs["intermediate_size"])


def write_width(config: Config) -> dict[str, Any]:
    if not all(with_experts(config)):
        raise ValueError("there are layers without experts, and the architecture has them in every layer")
    return {"intermediate_size": config.moe_ffn_hidden_size}


WIDTHS = Settings(("intermediate_size",), read_width, write_width)  # of experts, where every layer has them
