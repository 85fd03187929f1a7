"""StarCoder 2: LayerNorm, biases, RoPE, grouped queries, an MLP without a gate, a window in every layer."""

from __future__ import annotations

from dataclasses import replace

from .activations import activation
from .family import ONE, Field, pair
from .gpt2 import LAYER_NORM
from .llama import ATTENTION, ATTENTION_BIASES, EMBEDDINGS, LLAMA, MLP, NORM, NORM_BIASES, THEIRS, WIDTH, sizes
from .rope import ROPE
from .windows import everywhere

DENSE = (
    NORM,
    *pair(f"{MLP}linear_fc1.", f"{THEIRS}mlp.c_fc.", ONE, ONE),
    *pair(f"{MLP}linear_fc2.", f"{THEIRS}mlp.c_proj.", ONE, ONE),
)

STARCODER2 = replace(
    LLAMA,
    name="starcoder2",
    architecture="Starcoder2ForCausalLM",
    fields=(
        *sizes("norm_epsilon", norm_epsilon=1e-5, num_key_value_heads=2, tie_word_embeddings=True),
        WIDTH,
        activation("hidden_act", "gelu_pytorch_tanh"),
        Field("use_bias", "add_bias_linear", True),
    ),
    lines=(*EMBEDDINGS, *ATTENTION, *ATTENTION_BIASES, *DENSE, *NORM_BIASES),
    settings=(ROPE, everywhere(None)),
    fixed={**LAYER_NORM, "add_qkv_bias": False},  # with the others
    constants={"mlp_type": ("default",), "norm_type": ("layer_norm",)},
    harmless=frozenset(("residual_dropout", "embedding_dropout")),
)
