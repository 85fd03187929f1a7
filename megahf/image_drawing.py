"""A LLaVA's image encoder and projection in words, a line each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def image_lines(config: Mapping[str, Any]) -> list[str]:
    """The lines before those of the language model; `config` is as config.json has it."""
    return [encoder(config["vision_config"]), places(config), projection(config)]


def encoder(vision: Mapping[str, Any]) -> str:
    gated = "gated " if vision["gated_linear_unit"] else ""
    return ", ".join([
        f"images: {vision['vision_model_type']} of {vision['num_layers']} layers",
        f"hidden {vision['hidden_size']}",
        f"{vision['num_attention_heads']} heads of {vision['kv_channels']}",
        f"MLP {vision['ffn_hidden_size']} {gated}{vision['activation_func']}",
        vision["normalization"],
    ])  # fmt: skip


def places(config: Mapping[str, Any]) -> str:
    """What the encoder sees, and what the language model sees of it."""
    vision = config["vision_config"]
    sides = [vision[side] // vision["patch_dim"] for side in ("img_h", "img_w")]
    parts = [
        f"{vision['img_h']} x {vision['img_w']} pixels in {sides[0]} x {sides[1]} patches",
        f"up to {config['max_num_tiles']} tiles of an image" if config["use_tiling"] else "",
        "and one of it whole" if config["use_tiling"] and config["use_thumbnail"] else "",
    ]
    if tokens := vision["class_token_len"]:
        fate = "left out" if config["drop_vision_class_token"] else "kept"
        parts.append(f"{tokens} class token{'s' if tokens > 1 else ''} {fate}")
    parts += ["four patches become one"] if config["pixel_shuffle"] else []
    parts += [f"tags of {len(config['tile_tags'][0])} tokens in front of tiles"] if config["tile_tags"] else []
    return ", ".join(filter(None, parts))


def projection(config: Mapping[str, Any]) -> str:
    hidden, biases = config["text_config"]["hidden_size"], "biases" if config["projection_add_bias_linear"] else ""
    if config["vision_projection_type"] == "affine":
        return ", ".join(filter(None, [f"projection: a matrix to {hidden}", biases]))
    gated = "gated " if config["projection_gated_linear_unit"] else ""
    norm = config["projection_normalization"] or "no norm"
    width = f"MLP {config['projection_ffn_hidden_size']} {gated}{config['projection_activation_func']}"
    return ", ".join(filter(None, [f"projection: {width} to {hidden}", norm, biases]))
