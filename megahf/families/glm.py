"""GLM 4, ERNIE 4.5 and Helium: Llama whose rotary positions turn pairs of (even, odd) channels."""

from __future__ import annotations

from dataclasses import replace

from .activations import activation
from .family import ONE, Field, Line
from .llama import ATTENTION, DENSE, EMBEDDINGS, GATED_RMS, LLAMA, MLP, NORM, QKV_BIAS, THEIRS, WIDTH, sizes
from .rope import rope

SILU = activation("hidden_act", "silu")
FUSED = (
    NORM,
    Line(f"{MLP}linear_fc1.weight", (f"{THEIRS}mlp.gate_up_proj.weight",), ONE),  # gate | up
    Line(f"{MLP}linear_fc2.weight", (f"{THEIRS}mlp.down_proj.weight",), ONE),
)

GLM = replace(
    LLAMA,
    name="glm",
    architecture="GlmForCausalLM",
    fields=(
        *sizes(rms_norm_eps=1.5625e-07, num_key_value_heads=2, head_dim=128),
        WIDTH,
        SILU,
        Field("attention_bias", "add_qkv_bias", True),
    ),
    lines=(*EMBEDDINGS, *ATTENTION, *QKV_BIAS, *FUSED),
    settings=(rope(part=0.5, interleaved=True),),
    fixed=GATED_RMS,
)
ERNIE = replace(
    LLAMA,
    name="ernie4_5",
    architecture="Ernie4_5ForCausalLM",
    fields=(
        *sizes(rms_norm_eps=1e-5, num_key_value_heads=2, head_dim=128, tie_word_embeddings=True),
        WIDTH,
        SILU,
        Field("use_bias", "add_bias_linear", False),
    ),
    settings=(rope(500000.0, interleaved=True),),
)
HELIUM = replace(
    LLAMA,
    name="helium",
    architecture="HeliumForCausalLM",
    fields=(*sizes(rms_norm_eps=1e-8, num_key_value_heads=20, head_dim=128), WIDTH, SILU),
    lines=(*EMBEDDINGS, *ATTENTION, *DENSE),
    settings=(rope(100000.0, interleaved=True),),
    constants={"attention_bias": (False,), "mlp_bias": (False,)},
)
