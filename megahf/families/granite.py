"""Granite 3: Llama with factors on embeddings, logits and attention scores, as Megatron has them with muP.

Its factor on what each layer adds (`residual_multiplier`) Megatron has not: all of IBM's own models have it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ..cuts import Config
from .family import Field, Settings, Theirs
from .llama import LLAMA


def read_scale(theirs: Theirs) -> dict[str, Any]:
    channels = theirs.get("head_dim") or theirs["hidden_size"] // theirs["num_attention_heads"]
    scale = float(theirs.get("attention_multiplier", 1.0))
    return {"softmax_scale": None if scale == channels**-0.5 else scale}


def write_scale(config: Config) -> dict[str, Any]:
    return {"attention_multiplier": config.softmax_scale or config.kv_channels**-0.5}


GRANITE = replace(
    LLAMA,
    name="granite",
    architecture="GraniteForCausalLM",
    fields=(
        *LLAMA.fields,
        Field("embedding_multiplier", "mup_embedding_mult", 1.0),
        Field("logits_scaling", "mup_output_mult", 1.0, lambda value: 1 / value, lambda value: 1 / value),
    ),
    settings=(*LLAMA.settings, Settings(("attention_multiplier",), read_scale, write_scale)),
    constants={"residual_multiplier": (1.0,)},
)
