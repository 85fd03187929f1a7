"""StableLM 3B: LayerNorm, SwiGLU, RoPE on a quarter of the channels; biases of queries, keys and values, or none.

StableLM 2 12B, which norms each head and adds attention and MLP in one step, is another function.
"""

from __future__ import annotations

from dataclasses import replace

from .activations import activation
from .family import Field
from .gpt2 import LAYER_NORM
from .llama import ATTENTION, DENSE, EMBEDDINGS, LLAMA, NORM_BIASES, QKV_BIAS, WIDTH, sizes
from .rope import rope

STABLELM = replace(
    LLAMA,
    name="stablelm",
    architecture="StableLmForCausalLM",
    fields=(
        *(
            row
            for row in sizes("layer_norm_eps", layer_norm_eps=1e-5, num_key_value_heads=32)
            if row.theirs != "head_dim"
        ),
        WIDTH,
        activation("hidden_act", "silu"),
        Field("use_qkv_bias", "add_qkv_bias", False),
    ),
    lines=(*EMBEDDINGS, *ATTENTION, *QKV_BIAS, *DENSE, *NORM_BIASES),
    settings=(rope(part=0.25),),
    fixed={**LAYER_NORM, "add_bias_linear": False, "gated_linear_unit": True},
    constants={"qk_layernorm": (False,), "use_parallel_residual": (False,)},
)
