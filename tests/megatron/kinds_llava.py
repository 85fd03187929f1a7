"""Every kind of LLaVA the tests know: an image encoder, a projection and a language model, a row a kind.

As `kinds.py`: arguments over Megatron's defaults, here those of examples/multimodal as well, and the widths that its
tables have by type and small models have not (`multimodal.SIZES`). Channels of a head are those of the real encoders.
"""

from __future__ import annotations

from typing import Any

from kinds import SMALL
from kinds_hybrid import NEMOTRON
from kinds_moe import ALL_TO_ALL, NARROW

LANGUAGE: dict[str, Any] = {
    **SMALL,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "position_embedding_type": "rope",
    "group_query_attention": True,
    "num_query_groups": 2,
    "tokenizer_type": "MultimodalTokenizer",
    "tokenizer_prompt_format": "mistral",
    "language_ffn_hidden_size": 96,  # what the arguments say, 128, is none of the weights'
    "projection_ffn_hidden_size": 80,
    "decoder_seq_length": 88,
    "image_token_id": -200,
    "tile_tags": None,
}


def llava(language: str, vision: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**LANGUAGE, "language_model_type": language, **vision, **more}


def encoder(kind: str, heads: int, channels: int, hidden: int, patch: int = 14, side: int = 4) -> dict[str, Any]:
    """Two layers, images of `side` x `side` patches."""
    return {
        "vision_model_type": kind,
        "vision_num_layers": 2,
        "vision_heads": heads,
        "vision_kv_channels": channels,
        "vision_hidden_size": hidden,
        "vision_ffn_hidden_size": 72,
        "patch_dim": patch,
        "img_h": side * patch,
        "img_w": side * patch,
    }


CLIP = encoder("clip", 2, 64, 128)
SIGLIP = encoder("siglip", 2, 72, 144)
INTERN = encoder("internvit300M", 2, 64, 128)
INTERN_6B = encoder("internvit", 25, 4, 100)
RADIO = encoder("radio", 2, 80, 160, patch=32)
RADIO_G = encoder("radio-g", 2, 64, 128, patch=32)
CRADIO_G = encoder("cradio-g", 2, 64, 128, patch=32)

DROPPED = {"disable_vision_class_token": True}
SHUFFLED = {**DROPPED, "pixel_shuffle": True}
TILES = {"use_tiling": True, "max_num_tiles": 4, "use_thumbnail": True}
# What a tokenizer makes tokens of, all other words aside; so `<tile_2>` is 10, 11, 12, 16, 13.
PIECES = {
    **{"<": 10, "tile": 11, "_": 12, ">": 13, "1": 15, "2": 16, "3": 17, "4": 18, "_global": 21, "_thumbnail": 22},
    "<image>": 97,
}
TAGS = [[10, 11, 12, 15 + tile, 13] for tile in range(4)] + [[10, 11, 21, 22, 13]]  # the last is the thumbnail's
TAGGED = {**SHUFFLED, **TILES, "use_tile_tags": True, "image_tag_type": "nvlm", "tile_tags": TAGS, "image_token_id": 97}
MIXTURE = {**ALL_TO_ALL, **NARROW, "num_experts": 4, "moe_router_topk": 2}
MAMBA: dict[str, Any] = {
    "swiglu": False,
    "squared_relu": True,
    "position_embedding_type": "none",
    "is_hybrid_model": True,
    "num_layers": 6,
    "hybrid_override_pattern": "M-M*-M",
    "mamba_state_dim": 16,
    "mamba_head_dim": 16,
    "mamba_num_groups": 2,
    "tokenizer_prompt_format": "nemotron5",
}
SCALED = {"rotary_base": 500000, "use_rope_scaling": True, "rope_scaling_factor": 32.0}  # 0.16.1's script runs 8
NEMOTRON6: dict[str, Any] = {  # as main is told
    **MAMBA,
    **NEMOTRON,
    "hybrid_override_pattern": None,
    "hybrid_layer_pattern": "ME*MEM",
    "is_hybrid_model": False,
}
EIGHTHS = {"num_attention_heads": 8, "num_query_groups": 8, "vocab_size": 121, "make_vocab_size_divisible_by": 16}
LAYERNORM_1P = {"normalization": "LayerNorm", "layernorm_zero_centered_gamma": True, "rotary_percent": 0.5}

KINDS: dict[str, dict[str, Any]] = {
    "clip_mistral": llava("mistral_7b", CLIP, **DROPPED),  # no norm in the projection
    "clip_kept": llava("llama3_8b", CLIP, layernorm_epsilon=1e-3, **SCALED),  # also CLIP's, and the projection's
    "clip_type_over_args": llava("llama3.1_8b", CLIP, swiglu=False),  # a biased projection; the type says SwiGLU
    "clip_affine": llava("mistral_7b", CLIP, vision_projection_type="affine"),
    "clip_tied": llava("mistral_7b", CLIP, **DROPPED, untie_embeddings_and_output_weights=False, qk_layernorm=True),
    "siglip_qwen": llava("qwen2.5_7B", SIGLIP, rotary_base=1000000),
    "siglip_mixture": llava("mistral_7b", SIGLIP, **MIXTURE),
    "siglip_nemotron5": llava("nemotron5-8b", SIGLIP, **LAYERNORM_1P),
    "intern_shuffled": llava("llama3.1_8b", INTERN, **SHUFFLED, **TILES),
    "intern_hybrid": llava("nemotron5-hybrid-8b", INTERN, **MAMBA, **DROPPED),
    "intern_6b_tagged": llava("yi-34b", INTERN_6B, **TAGGED, tokenizer_prompt_format="qwen2p5"),
    "intern_6b_kept": llava("qwen2.0_72B", INTERN_6B, **EIGHTHS),
    "radio_llama": llava("llama3.1_8b", RADIO, **SHUFFLED, **TILES),
    "radio_wide": llava("llama3_8b", {**RADIO, "img_h": 96, "img_w": 128}),
    "radio_hybrid": llava(
        "nemotron5-hybrid-8b", RADIO, **MAMBA, **SHUFFLED, **TILES, untie_embeddings_and_output_weights=False
    ),
    "radio_nemotron6": llava("nemotron6-moe", RADIO, **NEMOTRON6, **SHUFFLED),
    "radio_g": llava("llama3.2_1b", RADIO_G, **DROPPED),
    "radio_g_mixture": llava("llama3_8b", RADIO_G, **MIXTURE, moe_layer_freq=[0, 1, 1, 1]),
    "cradio_g": llava("qwen2.5_7B", CRADIO_G),
    "cradio_g_hybrid": llava("nemotron5-hybrid-8b", CRADIO_G, **MAMBA, **SHUFFLED),
}
