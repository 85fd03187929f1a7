"""Qwen2-MoE (and 1.5's) and Qwen3-MoE: experts in some layers or all, a shared one with a gate, or norms of q and k.

Which layers of a Qwen2-MoE have a window its `layer_types` say; without them versions of transformers differ, and a
model with `use_sliding_window` is refused.
"""

from __future__ import annotations

from typing import Any

from ..cuts import Config
from . import windows
from .activations import activation
from .experts import ROUTED, SHARED_GATE, THEIR_MLP, frequency, shared, with_experts
from .family import Family, Field, Settings, Theirs
from .llama import ATTENTION, DENSE, EMBEDDINGS, FREQUENCIES, GATED_RMS, QKV_BIAS, WIDTH, sizes
from .qwen import QK_NORMS
from .rope import ROPE


def read_layers(theirs: Theirs) -> dict[str, Any]:
    """Every n-th layer has experts, but those named."""
    step, dense = theirs.get("decoder_sparse_step", 1), theirs.get("mlp_only_layers") or []
    flags = [(layer + 1) % step == 0 and layer not in dense for layer in range(theirs["num_hidden_layers"])]
    if not any(flags):
        raise ValueError("no layer has experts")
    return {"moe_layer_freq": frequency(flags)}


def write_layers(config: Config) -> dict[str, Any]:
    flags = with_experts(config)
    return {"decoder_sparse_step": 1, "mlp_only_layers": [layer for layer, flag in enumerate(flags) if not flag]}


def read_experts(experts: int) -> Settings:
    """Their number, which transformers 5 writes under another name for some; `experts` where it is not said."""

    def read(theirs: Theirs) -> dict[str, Any]:
        return {"num_experts": theirs.get("num_experts") or theirs.get("num_local_experts") or experts}

    def write(config: Config) -> dict[str, Any]:
        return {"num_experts": config.num_experts}

    return Settings(("num_experts", "num_local_experts"), read, write)


def unsettled(theirs: Theirs) -> list[bool]:
    raise ValueError("a window, and no layer_types to say where: versions of transformers differ in that")


def read_all(theirs: Theirs) -> dict[str, Any]:
    """A window in every layer, or in none."""
    size = theirs.get("sliding_window", 4096) if theirs.get("use_sliding_window") else None
    return {"window_size": windows.window(size)}


def write_all(config: Config) -> dict[str, Any]:
    size = windows.tokens(config.window_size)
    return {"sliding_window": size, "use_sliding_window": size is not None}


LAYERS = Settings(("decoder_sparse_step", "mlp_only_layers"), read_layers, write_layers)


def fields(groups: int, width: int, topk: int) -> tuple[Field, ...]:
    """Sizes; query groups, an expert's width and how many are chosen where config.json does not say."""
    return (
        *sizes(num_key_value_heads=groups),
        WIDTH,
        activation("hidden_act", "silu"),
        Field("moe_intermediate_size", "moe_ffn_hidden_size", width),
        Field("num_experts_per_tok", "moe_router_topk", topk),
        Field("norm_topk_prob", "moe_router_pre_softmax", False, lambda norm: not norm, lambda before: not before),
    )


LINES = (*EMBEDDINGS, *ATTENTION, *DENSE, *ROUTED)

QWEN2_MOE = Family(
    name="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    fields=(
        *fields(16, 1408, 4),
        Field("qkv_bias", "add_qkv_bias", True),
        Field("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", 5632),
    ),
    lines=(*LINES, *QKV_BIAS, *shared(f"{THEIR_MLP}shared_expert."), SHARED_GATE),
    settings=(
        ROPE,
        LAYERS,
        read_experts(60),
        windows.by_layer(4096, unsettled),
    ),
    fixed={**GATED_RMS, "moe_shared_expert_gate": True},
    harmless=frozenset(("max_window_layers",)),
    ignored=FREQUENCIES,
    base="model.",
)

QWEN3_MOE = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    fields=fields(4, 768, 8),
    lines=(*LINES, *QK_NORMS),
    settings=(
        ROPE,
        LAYERS,
        read_experts(128),
        Settings(("use_sliding_window", "sliding_window"), read_all, write_all),
    ),
    fixed={**GATED_RMS, "qk_layernorm": True},
    constants={"attention_bias": (False,)},
    harmless=frozenset(("max_window_layers",)),
    ignored=FREQUENCIES,
    base="model.",
)
