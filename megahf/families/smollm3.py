"""SmolLM 3: Llama in which some layers go without positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..cuts import Config
from .activations import activation
from .family import Settings, Theirs
from .llama import LLAMA, WIDTH, sizes
from .rope import rope, unrotated
from .windows import by_layer


def rotated(theirs: Theirs) -> list[int]:
    """1 for each layer with positions; by default all but every fourth."""
    flags, every = theirs.get("no_rope_layers"), theirs.get("no_rope_layer_interval", 4)
    layers = range(theirs["num_hidden_layers"])
    return [int((layer + 1) % every != 0) for layer in layers] if flags is None else [int(flags[n]) for n in layers]


def read(theirs: Theirs) -> dict[str, Any]:
    flags = rotated(theirs)
    return {"no_rope_freq": None if all(flags) else [1 - flag for flag in flags]}


def write(config: Config) -> dict[str, Any]:
    return {"no_rope_layers": [int(not skip) for skip in unrotated(config)]}


SMOLLM3 = replace(
    LLAMA,
    name="smollm3",
    architecture="SmolLM3ForCausalLM",
    fields=(*sizes(num_key_value_heads=4, tie_word_embeddings=True), WIDTH, activation("hidden_act", "silu")),
    settings=(
        *LLAMA.settings[1:],
        rope(2000000.0),
        Settings(("no_rope_layers", "no_rope_layer_interval"), read, write),
        by_layer(None, lambda theirs: [not flag for flag in rotated(theirs)]),
    ),
    harmless=frozenset(("max_window_layers",)),
)
