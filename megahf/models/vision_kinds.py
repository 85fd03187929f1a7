"""What Megatron's `vision_model_type` alone decides of an image encoder, a row a type.

Sources: megatron/core/models/vision/{clip_vit_model,radio}.py, multimodal/llava_model.py, and Megatron's
examples/multimodal/{config,layer_specs}.py with nvlm/internvit.py and radio/radio_g.py. No torch and no transformers
in here: conversion reads it without them.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class VisionKind(NamedTuple):
    """An encoder: its module, its embedding and its layers.

    Args:
        tower: `clip` (patches by a convolution, a position table as long as the sequence, class tokens inside it)
            or `radio` (patches by a matrix, a table of positions for the largest image, class tokens without one).
        class_token_len: class tokens before the patches; 0: no such weight.
        kv_channels: channels of a head; None: whatever the language model's args say (Megatron sets none).
        num_attention_heads: where the type fixes it; None: as the weights have it.
        layernorm_epsilon: None: the args' own.
        patch_bias: whether `conv1` or `embedder` has a bias.
        ln_pre, ln_post: a norm before the first layer, after the last one.
        mask_token: RADIO's weight for masked patches, which no forward uses.
        plain_norms: norms in front of attention and MLP are modules of their own (`input_layernorm`,
            `pre_mlp_layernorm`), and what a layer adds is scaled (`ls1`, `ls2`).
        qk_layernorm: RMSNorms of queries and keys, each over the channels of all heads at once.
        max_img: pixels a side of the largest image RADIO's table of positions covers; 0: none.
    """

    tower: str = "clip"
    class_token_len: int = 1
    kv_channels: int | None = 64
    num_attention_heads: int | None = None
    normalization: str = "LayerNorm"
    layernorm_epsilon: float | None = 1e-6
    activation_func: str = "gelu_tanh"
    gated_linear_unit: bool = False
    add_qkv_bias: bool = True
    patch_bias: bool = False
    ln_pre: bool = False
    ln_post: bool = False
    mask_token: bool = False
    plain_norms: bool = False
    qk_layernorm: bool = False
    max_img: int = 0


KINDS = {
    "clip": VisionKind(layernorm_epsilon=None, activation_func="quick_gelu", ln_pre=True),
    "siglip": VisionKind(class_token_len=0, kv_channels=72, patch_bias=True, ln_post=True),
    "internvit": VisionKind(
        kv_channels=None,
        num_attention_heads=25,  # Megatron pads them with heads of zeros to what its ranks share
        normalization="RMSNorm",
        activation_func="gelu",
        add_qkv_bias=False,
        patch_bias=True,
        plain_norms=True,
        qk_layernorm=True,
    ),
    "internvit300M": VisionKind(activation_func="gelu", patch_bias=True, plain_norms=True),
    "radio": VisionKind("radio", class_token_len=8, kv_channels=80, max_img=2048),
    "radio-g": VisionKind(
        "radio",
        class_token_len=5,
        activation_func="silu",
        gated_linear_unit=True,
        patch_bias=True,
        ln_post=True,
        mask_token=True,
        plain_norms=True,
        max_img=1792,
    ),
    "cradio-g": VisionKind("radio", class_token_len=8, max_img=2048),
}
# Encoders that Megatron has and no row above describes.
OTHERS = ("pixtral-vit", "pixtral-vit-large", "qwen-vl", "kimi-vit", "post-c-radio-omni")

# Mean and standard deviation of red, green and blue, where 1 is white, that an encoder was trained with.
Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]
CLIP: Statistics = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
STATISTICS: dict[str, Statistics] = {
    "clip": CLIP,
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "internvit": IMAGENET,
    "internvit300M": IMAGENET,
    "radio": CLIP,
    "radio-g": (IMAGENET[0], (0.2230, 0.2240, 0.2250)),
    "cradio-g": CLIP,
}


def places_of_a_tile(config: Any) -> int:
    """Places that a tile of an image takes among the language model's tokens, its tag included."""
    vision = config.vision_config
    patches = (vision.img_h // vision.patch_dim) * (vision.img_w // vision.patch_dim)
    kept = patches + (0 if config.drop_vision_class_token else vision.class_token_len)
    return (kept // 4 if config.pixel_shuffle else kept) + (len(config.tile_tags[0]) if config.tile_tags else 0)


def vision_kind(vision_model_type: str) -> VisionKind:
    """The row of a type.

    Raises:
        ValueError: there is none, with the reason and the types there are.
    """
    if vision_model_type in KINDS:
        return KINDS[vision_model_type]
    if vision_model_type.startswith("hf://"):
        reason = "an encoder of transformers' own inside Megatron, not one of Megatron-core's"
    elif vision_model_type in OTHERS:
        reason = "an encoder of Megatron's that is not built here"
    else:
        reason = "no encoder of Megatron's"
    raise ValueError(f"vision_model_type {vision_model_type!r} is {reason}: it must be one of {', '.join(KINDS)}")
