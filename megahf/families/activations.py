"""Activation functions by transformers' names."""

from __future__ import annotations

from .family import Field

# Theirs -> ours; where theirs has several names for one function, the first is written.
NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu2": "squared_relu",
    "quick_gelu": "quick_gelu",
}


def activation(theirs: str, default: str) -> Field:
    """The setting `theirs`; `default` where config.json does not say, and written where it is the same function."""
    wanted = {ours: name for name, ours in reversed(NAMES.items())} | {NAMES[default]: default}

    def read(name: str) -> str:
        if name not in NAMES:
            raise ValueError(f"{name!r} is not built; built are {', '.join(NAMES)}")
        return NAMES[name]

    return Field(theirs, "activation_func", default, read, lambda ours: wanted.get(ours, ours))
