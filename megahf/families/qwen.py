"""Qwen 2, 2.5 and 3: Llama with biases of queries, keys and values, or with norms of queries and keys; and windows."""

from __future__ import annotations

from dataclasses import replace

from .activations import activation
from .family import GAMMA, Line, Theirs
from .llama import AT, ATTENTION, DENSE, EMBEDDINGS, GATED_RMS, LLAMA, QKV_BIAS, THEIRS, WIDTH, sizes
from .rope import ROPE
from .windows import by_layer

QK_NORMS = tuple(Line(f"{AT}{x}_layernorm.weight", (f"{THEIRS}self_attn.{x}_norm.weight",), GAMMA) for x in "qk")


def upper_layers(theirs: Theirs) -> list[bool]:
    """`max_window_layers` is the number of the first layers, which go without."""
    full = theirs.get("max_window_layers", 28)
    return [layer >= full for layer in range(theirs["num_hidden_layers"])]


WINDOWS = replace(
    by_layer(4096, upper_layers),
    keys=("sliding_window", "layer_types", "use_sliding_window", "max_window_layers"),
)
QWEN2 = replace(
    LLAMA,
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    fields=(*sizes(num_key_value_heads=32), WIDTH, activation("hidden_act", "silu")),
    lines=(*EMBEDDINGS, *ATTENTION, *QKV_BIAS, *DENSE),
    settings=(ROPE, WINDOWS),
    fixed={**GATED_RMS, "add_qkv_bias": True},
)
QWEN3 = replace(
    QWEN2,
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    fields=(*sizes(num_key_value_heads=32, head_dim=128), WIDTH, activation("hidden_act", "silu")),
    lines=(*EMBEDDINGS, *ATTENTION, *QK_NORMS, *DENSE),
    fixed={**GATED_RMS, "qk_layernorm": True},
    constants={"attention_bias": (False,)},
)
