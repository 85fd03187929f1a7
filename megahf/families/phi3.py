"""Phi 3 of 4k tokens, and Phi 4: Llama with q | k | v and gate | up in one matrix each.

Those of 128k tokens have frequencies of their own (`longrope`), which Megatron has not.
"""

from __future__ import annotations

from dataclasses import replace

from .activations import activation
from .family import FUSED_QKV, GAMMA, ONE, Line
from .glm import FUSED
from .llama import AT, EMBEDDINGS, LLAMA, THEIRS, WIDTH, sizes
from .rope import rope
from .windows import everywhere

LAYERS = (
    Line(f"{AT}linear_qkv.layer_norm_weight", (f"{THEIRS}input_layernorm.weight",), GAMMA),
    Line(f"{AT}linear_qkv.weight", (f"{THEIRS}self_attn.qkv_proj.weight",), FUSED_QKV),
    Line(f"{AT}linear_proj.weight", (f"{THEIRS}self_attn.o_proj.weight",), ONE),
    *FUSED,
)

PHI3 = replace(
    LLAMA,
    name="phi3",
    architecture="Phi3ForCausalLM",
    fields=(*sizes(rms_norm_eps=1e-5), WIDTH, activation("hidden_act", "silu")),
    lines=(*EMBEDDINGS, *LAYERS),
    settings=(rope(part=1.0, kinds=("default",)), everywhere(None)),
    constants={"attention_bias": (False,), "mlp_bias": (False,), "lm_head_bias": (False,)},
    harmless=frozenset(("original_max_position_embeddings", "full_attn_mod", "interpolate_factor")),  # of longrope
)
