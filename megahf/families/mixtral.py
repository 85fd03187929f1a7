"""Mixtral: Mistral's layers with experts; weights of those chosen are a softmax over them."""

from __future__ import annotations

from dataclasses import replace

from .activations import activation
from .experts import NORM, ROUTER, WIDTHS, routed
from .family import Family, Field
from .llama import ATTENTION, EMBEDDINGS, FREQUENCIES, GATED_RMS, THEIRS, sizes
from .rope import rope
from .windows import everywhere

SPARSE = f"{THEIRS}block_sparse_moe."


MIXTRAL = Family(
    name="mixtral",
    architecture="MixtralForCausalLM",
    fields=(
        *sizes(rms_norm_eps=1e-5, num_key_value_heads=8),
        activation("hidden_act", "silu"),
        Field("num_local_experts", "num_experts", 8),
        Field("num_experts_per_tok", "moe_router_topk", 2),
    ),
    lines=(
        *EMBEDDINGS,
        *ATTENTION,
        NORM,
        replace(ROUTER, theirs=(f"{SPARSE}gate.weight",)),
        *routed(SPARSE, "w1", "w3", "w2"),
    ),
    settings=(rope(1e6), everywhere(None), WIDTHS),
    fixed=GATED_RMS,
    harmless=frozenset(("router_jitter_noise",)),
    ignored=FREQUENCIES,
    base="model.",
)
