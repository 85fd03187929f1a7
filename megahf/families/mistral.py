"""Mistral: Llama with a window in every layer; and Ministral, with one in some."""

from __future__ import annotations

from dataclasses import replace

from .activations import activation
from .llama import ATTENTION, DENSE, EMBEDDINGS, LLAMA, WIDTH, sizes
from .rope import ROPE
from .windows import by_layer, everywhere

MISTRAL = replace(
    LLAMA,
    name="mistral",
    architecture="MistralForCausalLM",
    fields=(*sizes(num_key_value_heads=8), WIDTH, activation("hidden_act", "silu")),
    lines=(*EMBEDDINGS, *ATTENTION, *DENSE),
    settings=(ROPE, everywhere(4096)),
)
MINISTRAL = replace(
    MISTRAL,
    name="ministral",
    architecture="MinistralForCausalLM",
    settings=(ROPE, by_layer(4096, lambda theirs: [True] * theirs["num_hidden_layers"], False, needed=True)),
)
