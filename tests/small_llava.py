"""Small LLaVAs in memory: Megatron's arguments of one, the config that they and its weights stand for, its weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

from shares import SMALL
from small import arguments

from megahf import llava
from megahf.arguments import config as config_of
from megahf.llava_arguments import ARGUMENTS


class Kind(NamedTuple):
    """What the arguments of a LLaVA say, and what its weights alone do."""

    args: dict[str, Any]
    encoder: dict[str, Any]
    projection: dict[str, Any] = {}  # noqa: RUF012
    text: dict[str, Any] = {}  # noqa: RUF012


def encoder(heads: int, channels: int, hidden: int) -> dict[str, Any]:
    return {
        "num_layers": 2, "hidden_size": hidden, "ffn_hidden_size": 20, "num_attention_heads": heads,
        "num_query_groups": heads, "kv_channels": channels,
    }  # fmt: skip


def images(kind: str, language: str, patch: int = 4, **more: Any) -> dict[str, Any]:
    """Arguments of a run on images of 4 x 4 patches."""
    sides = {"img_h": 4 * patch, "img_w": 4 * patch, "patch_dim": patch}
    return {"vision_model_type": kind, "language_model_type": language, **sides, **more}


BIASED: dict[str, Any] = {"projection_add_bias_linear": True, "projection_normalization": "LayerNorm"}
LAYERNORM: dict[str, Any] = {"projection_normalization": "LayerNorm"}
SQUARED: dict[str, Any] = {"swiglu": False, "squared_relu": True}
MAMBA: dict[str, Any] = {
    **SQUARED, "is_hybrid_model": True, "num_layers": 4, "hybrid_override_pattern": "M*-M", "mamba_state_dim": 4,
    "mamba_head_dim": 4, "mamba_num_groups": 2, "mamba_num_heads": 8, "position_embedding_type": "none",
}  # fmt: skip
MIXTURE: dict[str, Any] = {"num_experts": 4, "moe_ffn_hidden_size": 12, "moe_layer_freq": [0, 1, 1, 0]}
KINDS: dict[str, Kind] = {
    "clip": Kind(images("clip", "mistral_7b", disable_vision_class_token=True), encoder(2, 64, 8)),
    "clip tied": Kind(
        images("clip", "llama3_8b", untie_embeddings_and_output_weights=False), encoder(2, 64, 8),
        {"projection_normalization": "RMSNorm"},
    ),
    "clip affine": Kind(
        images("clip", "mistral_7b", vision_projection_type="affine"), encoder(2, 64, 8),
        {"vision_projection_type": "affine", "projection_ffn_hidden_size": 64},
    ),
    "siglip": Kind(
        images("siglip", "qwen2.5_7B"), encoder(2, 72, 8), {"projection_normalization": "RMSNorm"},
        {"add_qkv_bias": True},
    ),
    "internvit300M": Kind(
        images("internvit300M", "llama3.1_8b", pixel_shuffle=True, disable_vision_class_token=True),
        encoder(2, 64, 8), BIASED,
    ),
    "internvit": Kind(images("internvit", "yi-34b"), encoder(25, 2, 8), LAYERNORM),
    "radio, a hybrid": Kind(
        images("radio", "nemotron5-hybrid-8b", 64, **MAMBA), encoder(2, 80, 8),
        {"projection_normalization": "RMSNorm"},
    ),
    "radio-g": Kind(images("radio-g", "llama3.2_1b", 64), encoder(2, 64, 8), LAYERNORM),
    "cradio-g, experts": Kind(
        images("cradio-g", "llama3_8b", 64, **MIXTURE), encoder(2, 64, 8), {"projection_normalization": "RMSNorm"},
        {"ffn_hidden_size": 28},
    ),
}  # fmt: skip


def model(kind: Kind) -> tuple[dict[str, Any], Any]:
    """Megatron's arguments, the mark among them, and the whole config."""
    args = {**arguments(**SMALL), **ARGUMENTS, **kind.args, llava.MARK: True}
    for name in [name for name in args if name.startswith("radio_")]:
        del args[name]  # Megatron's of 0.16.1, which has them not
    made = config_of(args, args["vocab_size"])
    set_all(made.vision_config, kind.encoder)
    set_all(made.text_config, kind.text)
    set_all(made, {"projection_ffn_hidden_size": 40, **kind.projection})
    return args, made


def set_all(config: SimpleNamespace, fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        setattr(config, name, value)
