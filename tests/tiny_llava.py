"""Small LLaVA models for the tests of `megahf/models`: every encoder, projections, language models of all kinds."""

from __future__ import annotations

from typing import Any

import torch
from tiny import HYBRIDS, LLAMA, MIXER, SIZES, randomise, remember, tokens
from torch import Tensor

from megahf.models.configuration_mcore_llava import McoreLlavaConfig, McoreVisionConfig
from megahf.models.modeling_mcore_llava import McoreLlavaForConditionalGeneration

IMAGE = 60  # the image token: a word of the vocabulary, as where a tokenizer has it
VISION: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 24,
    "ffn_hidden_size": 40,
    "num_attention_heads": 3,
    "kv_channels": 8,
    "img_h": 16,
    "img_w": 16,
    "patch_dim": 4,
}
RADIO = {"max_img_h": 32, "max_img_w": 32}
ENCODERS: dict[str, dict[str, Any]] = {
    "clip": {},
    "siglip": {},
    "internvit": {"num_attention_heads": 5, "layernorm_epsilon": 1e-3},
    "internvit300M": {},
    "radio": RADIO,
    "radio-g": RADIO,
    "cradio-g": {**RADIO, "class_token_len": 10},
}
TEXT: dict[str, Any] = {**SIZES, **LLAMA}
HYBRID = {name: size for name, size in TEXT.items() if name != "num_layers"}
HYBRID.update({**MIXER, **HYBRIDS["attention"], "model_type": "mcore_hybrid", "position_embedding_type": "none"})
SHUFFLED: dict[str, Any] = {"drop_vision_class_token": True, "pixel_shuffle": True}
TAGS = [[5, 6], [7, 8], [9, 10]]  # of two tiles and the thumbnail
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("clip", {}),
    "siglip, affine": ("siglip", {"vision_projection_type": "affine", "projection_add_bias_linear": True}),
    "internvit": ("internvit", {**SHUFFLED, "projection_normalization": "RMSNorm"}),
    "internvit300M": ("internvit300M", {**SHUFFLED, "projection_normalization": "LayerNorm"}),
    "radio, gate": ("radio", {"projection_gated_linear_unit": True, "projection_activation_func": "silu"}),
    "radio-g, hybrid": (
        "radio-g",
        {"text_config": HYBRID, "drop_vision_class_token": True, "projection_activation_func": "squared_relu"},
    ),
    "cradio-g, tags": ("cradio-g", {**SHUFFLED, "tile_tags": TAGS}),
    "mamba alone": ("clip", {"text_config": {**HYBRID, **HYBRIDS["mamba"]}, "image_token_id": -200}),
}


def tiny_vision_config(encoder: str, **changes: Any) -> McoreVisionConfig:
    """An encoder of two layers of width 24 for images of four by four patches."""
    return McoreVisionConfig(**{"vision_model_type": encoder, **VISION, **ENCODERS[encoder], **changes})


def tiny_llava_config(variant: str = "clip", **changes: Any) -> McoreLlavaConfig:
    """A variant of `VARIANTS`; a `vision_config` among the changes is taken as it is."""
    encoder, options = VARIANTS[variant]
    common = {"text_config": dict(TEXT), "image_token_id": IMAGE, "projection_ffn_hidden_size": 40}
    common["vision_config"] = tiny_vision_config(encoder)
    return McoreLlavaConfig(**{**common, **options, **changes})


def tiny_llava(variant: str = "clip", **changes: Any) -> McoreLlavaForConditionalGeneration:
    """A model of `tiny_llava_config` with random weights, in evaluation mode."""
    return remember(randomise(McoreLlavaForConditionalGeneration(tiny_llava_config(variant, **changes)))).eval()


def pixels(tiles: int, seed: int = 2) -> Tensor:
    """Random tiles `[tiles, 3, 16, 16]`."""
    return torch.randn(tiles, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def row(config: McoreLlavaConfig, *parts: int) -> Tensor:
    """A row `[1, s]`: a positive number is so many random words, a negative one the places of so many tiles."""
    words = [
        tokens(1, part, seed=part) % 50 + 1
        if part > 0
        else torch.full((1, -part * config.img_seq_len), config.image_token_id)
        for part in parts
    ]
    return torch.cat(words, dim=1)


def batch(config: McoreLlavaConfig) -> dict[str, Tensor]:
    """Three rows padded on the left: an image of two tiles and one of one, an image, text alone."""
    rows = [row(config, 3, -2, 2, -1, 4), row(config, -1, 5), row(config, 7)]
    length = max(each.shape[1] for each in rows)
    ids = torch.cat([torch.nn.functional.pad(each, (length - each.shape[1], 0)) for each in rows])
    mask = torch.stack([torch.arange(length) >= length - each.shape[1] for each in rows]).long()
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels(4), "num_tiles": torch.tensor([2, 1, 1])}
