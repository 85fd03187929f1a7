"""A hybrid's pattern, drawn: which layers each pipeline stage holds, how many of each kind, of what sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from .cuts import Config, mixer_width
from .layouts import layers
from .plan import Plan

KINDS = {"M": "Mamba", "*": "attention", "+": "latent attention", "-": "MLP", "E": "experts"}


def drawing(plan: Plan) -> dict[str, Any]:
    """`stages`: what each chunk holds, in the order they run; `layers`: how many of each kind; `heads`; `mixer`."""
    config, held = plan.config, layers(plan.grid, plan.config.num_layers)
    symbols = config.hybrid_layer_pattern
    return {
        "stages": [
            {"pipeline": rank, "chunk": chunk, "layers": symbols[numbers.start : numbers.stop]}
            for (rank, chunk), numbers in held.items()
        ],
        "layers": counts(symbols),
        "heads": config.mtp_layer_pattern,
        "mixer": mixer(config) if "M" in symbols + (config.mtp_layer_pattern or "") else None,
    }


def counts(symbols: str) -> dict[str, int]:
    """How many layers of each kind there are, the most frequent first."""
    return {KINDS[symbol]: number for symbol, number in Counter(symbols).most_common()}


def mixer(config: Config) -> dict[str, Any]:
    """The sizes of a Mamba mixer."""
    return {
        "version": config.mamba_version,
        "channels": mixer_width(config),
        "heads": config.mamba_num_heads if config.mamba_version == 2 else None,
        "head_channels": config.mamba_head_dim if config.mamba_version == 2 else None,
        "groups": config.mamba_num_groups if config.mamba_version == 2 else None,
        "state": config.mamba_state_dim,
        "convolution": config.mamba_d_conv,
    }


def pattern_lines(drawn: Mapping[str, Any]) -> list[str]:
    """`pattern: pp0 M-M*- | pp1 M-M*`, the kinds of layers, and the mixer, a line each."""
    stages = drawn["stages"]
    named = [f"pp{stage['pipeline']} " if len(stages) > 1 else "" for stage in stages]
    shown = " | ".join(name + (stage["layers"] or "none") for name, stage in zip(named, stages, strict=True))
    heads = f" / {drawn['heads']} in each head for further tokens" if drawn["heads"] else ""
    lines = [f"pattern: {shown}{heads}", ", ".join(f"{number} {kind}" for kind, number in drawn["layers"].items())]
    if (sizes := drawn["mixer"]) is None:
        return lines
    ends = f"state of {sizes['state']}, convolution over {sizes['convolution']}"
    if sizes["version"] == 1:
        return [*lines, f"Mamba-1: {sizes['channels']} channels, {ends}"]
    return [*lines, f"Mamba-2: {sizes['heads']} heads of {sizes['head_channels']}, {sizes['groups']} groups, {ends}"]
