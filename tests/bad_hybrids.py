"""Ways for a checkpoint of a hybrid to be bad, as the rows of bad.py: `M*-M` of TP2, legacy and torch_dist."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bad import Bad, add, every, rewrite, weight, without

RANKS = ("mp_rank_00", "mp_rank_01")
MIXERS = ("decoder.layers.0.mixer", "decoder.layers.3.mixer")
MIXER = MIXERS[0]


def everywhere(alter: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """The same change of the weights of both ranks."""
    return lambda path: [rewrite(path, lambda content: alter(content["model"]), rank) for rank in RANKS]


def shaped(name: str, *shape: int) -> Callable[[Path], Any]:
    return everywhere(lambda held: held.update({name: torch.ones(shape)}))


def spell(old: str, new: str) -> Callable[[dict[str, Any]], Any]:
    def alter(held: dict[str, Any]) -> None:
        for key in [key for key in held if old in key]:
            held[key.replace(old, new)] = held.pop(key)

    return alter


def unfused(path: Path) -> None:
    """Mixers with a norm of their own, and an epsilon that it was not told."""
    everywhere(spell("mixer.in_proj.layer_norm_weight", "norm.weight"))(path)
    every(layernorm_epsilon=1e-6)(path)


def pattern(text: str, **more: Any) -> Callable[[Path], Any]:
    return every(hybrid_override_pattern=text, **more)


ROWS: dict[str, Bad] = {
    "weights of Mamba in a GPT": Bad(
        add("mp_rank_00_000", decoder__layers__0__mixer__A_log=torch.ones(8)),
        ("weights of a model that the args do not describe", "decoder.layers.0.mixer.A_log"),
    ),
    "args of a hybrid for a GPT's weights": Bad(
        every(hybrid_override_pattern="M*M-"), ("missing weights", "mixer.A_log"), reasons=-1
    ),
    "pattern of another length": Bad(
        pattern("M*-"), ("the pattern 'M*-' has 3 layers, the args say 4",), base="hybrid"
    ),
    "pattern of other layers": Bad(
        pattern("MM-M"), ("missing weights", "decoder.layers.1.mixer.in_proj.weight"), base="hybrid", reasons=-1
    ),
    "gated delta nets": Bad(
        pattern("MG-M"), ("has 'G': gated delta nets, which are not supported", "known are M * - E +"), base="hybrid"
    ),
    "sparse attention": Bad(
        pattern("MD-M"), ("has 'D': DeepSeek's sparse attention, which are not supported",), base="hybrid"
    ),
    "no symbol": Bad(pattern("M*xM"), ("has 'x': no symbol of Megatron's",), base="hybrid"),
    "nothing that sees another token": Bad(
        pattern("----"), ("has no layer in which a token sees another",), base="hybrid"
    ),
    "pattern and ratios": Bad(
        every(hybrid_attention_ratio=0.5),
        ("has 1 layers '*', hybrid_attention_ratio 0.5, hybrid_mlp_ratio 0.0 make it 2",), base="hybrid",
    ),
    "ratio beyond all": Bad(
        pattern(None, hybrid_attention_ratio=7), ("hybrid_attention_ratio is 7, not a share from 0 to 1",),
        base="hybrid",
    ),
    "stages that do not fit the ranks": Bad(
        pattern(None, hybrid_layer_pattern="M|*|-M", pipeline_model_parallel_size=2),
        ("tensor x pipeline x expert = 2 x 2 x 1", "ranks are missing"), base="hybrid", reasons=2,
    ),
    "heads that differ": Bad(
        pattern(None, hybrid_layer_pattern="M*-M/M/*"), ("differ from one another",), base="hybrid"
    ),
    "heads that are not stored": Bad(
        pattern(None, hybrid_layer_pattern="M*-M/M", mtp_num_layers=1),
        ("missing weights", "mtp.layers.0.enorm.weight", "mtp.layers.0.mtp_model_layer.layers.0.mixer."),
        base="hybrid",
    ),
    "weight of a mixer missing": Bad(
        everywhere(lambda held: held.pop(f"{MIXER}.dt_bias")), ("missing weights", f"{MIXER}.dt_bias"), base="hybrid"
    ),
    "weight of a mixer missing on one rank": Bad(
        without("mp_rank_01", f"{MIXER}.A_log"), ("missing on tensor-parallel ranks [1] of 2", f"{MIXER}.A_log"),
        base="hybrid",
    ),
    "gated norm in one mixer of two": Bad(
        everywhere(lambda held: held.pop(f"{MIXER}.norm.weight")), ("missing weights", f"{MIXER}.norm.weight"),
        base="hybrid",
    ),
    "first matrix of another state": Bad(
        every(mamba_state_dim=7),
        ("in_proj.weight", "stored [120, 16], the args say [128, 16]", "32 + 32 + 28 + 28 + 8 of them"),
        base="hybrid", reasons=-1,
    ),
    "first matrix of another size": Bad(
        shaped(f"{MIXER}.in_proj.weight", 59, 16),
        ("stored [118, 16], the args say [120, 16]", f"{MIXER}.in_proj.weight"), base="hybrid",
    ),
    "convolution of another size": Bad(
        shaped(f"{MIXER}.conv1d.bias", 41), ("stored [82], the args say [80]", f"{MIXER}.conv1d.bias"), base="hybrid"
    ),
    "matrix without axes": Bad(
        everywhere(lambda held: held.update({f"{at}.out_proj.weight": torch.ones(4) for at in MIXERS})),
        ("a weight of shape [4], which has 2 axes in a mixer", "mixer.out_proj.weight"), base="hybrid",
    ),
    "D of no axis": Bad(
        everywhere(lambda held: held.update({f"{at}.D": torch.ones(()) for at in MIXERS})),
        ("a weight of shape [], which has 1 axes in a mixer", "mixer.D"), base="hybrid",
    ),
    "heads wider than the mixer": Bad(
        every(mamba_head_dim=64), ("mixers of no whole head of 64 channels",), base="hybrid"
    ),
    "groups that ranks cannot share": Bad(
        every(mamba_num_groups=3), ("3 Mamba groups do not divide over 2 tensor-parallel ranks",), base="hybrid"
    ),
    "groups that heads cannot share": Bad(
        every(mamba_num_groups=6), ("8 Mamba heads cannot be shared out over 6 groups",), base="hybrid"
    ),
    "heads that ranks cannot share": Bad(
        every(mamba_num_heads=7), ("7 Mamba heads do not divide over 2 tensor-parallel ranks",), base="hybrid"
    ),
    "a size of mixers that is none": Bad(
        every(mamba_state_dim="large"), ("mamba_state_dim is 'large', not a number of at least 1",), base="hybrid"
    ),
    "norms with an epsilon of their own": Bad(
        unfused, ("the mixers' norms are not fused: Megatron ran them with 1e-5", "1e-06"), base="hybrid"
    ),
    "unequal norms of a mixer": Bad(
        weight("mp_rank_01", f"{MIXER}.in_proj.layer_norm_weight", lambda value: value[0].add_(1)),
        ("stored twice and not equal", f"{MIXER}.in_proj.layer_norm_weight", "mp_rank_01"), base="hybrid",
    ),
    "bias of a mixer's matrix": Bad(
        add("mp_rank_00", decoder__layers__0__mixer__in_proj__bias=torch.ones(60)),
        ("unknown weights", f"{MIXER}.in_proj.bias"), base="hybrid",
    ),
    "a component missing": Bad(
        everywhere(
            lambda held: held.update({f"{MIXER}.in_proj.weight.z": held.pop(f"{MIXER}.in_proj.weight")[:16]})
        ),
        (f"{MIXER}.in_proj.weight",), base="hybrid",
    ),
}  # fmt: skip
