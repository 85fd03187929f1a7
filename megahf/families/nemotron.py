"""Nemotron 3, 4 and Minitron: LayerNorm whose scale is about zero, squared ReLU without a gate, half of RoPE."""

from __future__ import annotations

from dataclasses import replace

from .activations import activation
from .gpt2 import LAYER_NORM
from .llama import ATTENTION, ATTENTION_BIASES, BIASES, EMBEDDINGS, LLAMA, NORM_BIASES, UNGATED, WIDTH, sizes
from .rope import rope
from .translation import FOLDED

NEMOTRON = replace(
    LLAMA,
    name="nemotron",
    architecture="NemotronForCausalLM",
    fields=(*sizes("norm_eps", norm_eps=1e-5), WIDTH, activation("hidden_act", "relu2")),
    lines=(*EMBEDDINGS, *ATTENTION, *ATTENTION_BIASES, *UNGATED, *NORM_BIASES),
    settings=(rope(part=0.5), BIASES),
    fixed={**LAYER_NORM, FOLDED: True},
)
