"""Heads for further tokens (MTP) as DeepSeek-V3 stores them: layers after the last, which transformers leaves out.

Each has the words' embedding and the output layer once more beside it; they must be the model's own, and are written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from ..cuts import Config
from .family import GAMMA, ONE, Line, Settings, Theirs
from .llama import LAYER, THEIRS

HEAD = "mtp.layers.{l}."


def after(layer: int, config: Config) -> int:
    """Heads are numbered on from the layers."""
    return config.num_layers + layer


def again(name: str) -> Callable[[Config], list[str]]:
    """The names under which every head stores a weight of the model once more."""
    return lambda config: [
        f"model.layers.{after(head, config)}.{name}.weight" for head in range(config.mtp_num_layers or 0)
    ]


OWN = (
    Line(f"{HEAD}enorm.weight", (f"{THEIRS}enorm.weight",), GAMMA, after),
    Line(f"{HEAD}hnorm.weight", (f"{THEIRS}hnorm.weight",), GAMMA, after),
    Line(f"{HEAD}eh_proj.weight", (f"{THEIRS}eh_proj.weight",), ONE, after),
    Line(f"{HEAD}final_layernorm.weight", (f"{THEIRS}shared_head.norm.weight",), GAMMA, after),
)
TWICE = {"embedding.word_embeddings.weight": "embed_tokens", "output_layer.weight": "shared_head.head"}


def with_heads(lines: tuple[Line, ...]) -> tuple[Line, ...]:
    """`lines` of a model, and those of its heads, whose inner layers are like its own."""
    inner = [
        replace(line, ours=line.ours.replace(LAYER, f"{HEAD}transformer_layer."), layer=after)
        for line in lines
        if line.ours.startswith(LAYER)
    ]
    model = [replace(line, again=again(TWICE[line.ours])) if line.ours in TWICE else line for line in lines]
    return (*model, *OWN, *inner)


def read(theirs: Theirs) -> dict[str, Any]:
    return {"mtp_num_layers": theirs.get("num_nextn_predict_layers", theirs.get("num_mtp_layers")) or None}


def write(config: Config) -> dict[str, Any]:
    return {"num_nextn_predict_layers": config.mtp_num_layers or 0}


HEADS = Settings(("num_nextn_predict_layers", "num_mtp_layers"), read, write)


def left_out(config: Config, names: Collection[str]) -> list[str]:
    """Takes the heads out of `config` where none is stored: transformers counts them and does not save them."""
    heads = config.mtp_num_layers
    if not heads or any(name.startswith(f"model.layers.{config.num_layers}.") for name in names):
        return []
    config.mtp_num_layers = None
    return [f"num_nextn_predict_layers is {heads}, and no head for further tokens is stored: there are none here"]
