"""What Megatron knows of a LLaVA by the types that its arguments name, where no argument says it.

The tables of examples/multimodal/config.py in Megatron-LM, 2026: `get_language_model_config`, `get_vision_model_config`
and `get_vision_projection_config`. The widths are those of the published models; the weights have the true ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

FROM_ARGS = "args"  # for a type that leaves it as the arguments have it


class LanguageType(NamedTuple):
    """A language model and the projection in front of it.

    Args:
        activation: of the language model; silu is gated, squared_relu is not.
        ffn, projection_ffn: widths of the MLPs.
        qkv_bias: whether it has one whatever the arguments say.
        plain_gamma: whether norms about zero are turned off.
        norm: of the projection: None, LayerNorm or FROM_ARGS.
        bias: of the projection's matrices; its norm then has an epsilon of 1e-5, and else that of the arguments.
        mixers: sizes of a hybrid's mixers.
        experts: whether a hybrid has them.
    """

    activation: str = "silu"
    ffn: int | None = 14336
    projection_ffn: int = 14336
    projection_activation: str = "gelu"
    norm: str | None = FROM_ARGS
    bias: bool = False
    qkv_bias: bool = False
    plain_gamma: bool = True
    mixers: dict[str, int] = {}  # noqa: RUF012
    experts: bool = False


LANGUAGES = {
    "llama3_8b": LanguageType(),
    "llama3.1_8b": LanguageType(projection_ffn=4096, norm="LayerNorm", bias=True),
    "llama3.2_1b": LanguageType(ffn=8192, projection_ffn=2048, norm="LayerNorm"),
    "llama_nemotron_8b": LanguageType(norm="LayerNorm", bias=True),
    "mistral_7b": LanguageType(norm=None),
    "yi-34b": LanguageType(ffn=20480, projection_ffn=20480, norm="LayerNorm"),
    "qwen2.0_72B": LanguageType(ffn=29568, projection_ffn=29568, norm="LayerNorm", qkv_bias=True),
    "qwen2.5_72B": LanguageType(ffn=29568, projection_ffn=29568, norm="LayerNorm", qkv_bias=True),
    "qwen2.5_7B": LanguageType(ffn=18944, projection_ffn=3584, qkv_bias=True),
    "nemotron5-8b": LanguageType("squared_relu", 21504, 21504, "squared_relu", plain_gamma=False),
    "nemotron5-hybrid-8b": LanguageType("squared_relu", 21504, 21504, "squared_relu"),
    "nemotron5-hybrid-12b": LanguageType(
        "squared_relu", 20480, 20480, "squared_relu",
        mixers={"mamba_state_dim": 128, "mamba_num_heads": 128, "mamba_head_dim": 80},
    ),
    "nemotron5-hybrid-56b": LanguageType(
        "squared_relu", 32768, 32768, "squared_relu", mixers={"mamba_state_dim": 256}
    ),
    "nemotron6-moe": LanguageType(FROM_ARGS, None, 20480, FROM_ARGS, plain_gamma=False, experts=True),
}  # fmt: skip
HYBRIDS = ("nemotron5-hybrid", "nemotron6-moe")

# Encoders: layers, hidden size, width of the MLP, heads. The rest is in models/vision_kinds.py.
ENCODERS = {
    "clip": (24, 1024, 4096, 16),
    "siglip": (27, 1152, 4304, 16),
    "internvit": (45, 3200, 12800, 25),
    "internvit300M": (24, 1024, 4096, 16),
    "radio": (32, 1280, 5120, 16),
    "radio-g": (40, 1536, 4096, 24),
    "cradio-g": (40, 1536, 6144, 24),
}
# Options of the language model that hang on the activation, as `core_transformer_config_from_args` reads them.
ACTIVATIONS: dict[str, dict[str, Any]] = {
    "silu": {"swiglu": True, "squared_relu": False, "quick_geglu": False},
    "squared_relu": {"swiglu": False, "squared_relu": True, "quick_geglu": False},
}


def is_hybrid_type(language_model_type: str) -> bool:
    return language_model_type.startswith(HYBRIDS)


def differing(language_model_type: str, config: Any) -> list[str]:
    """The widths that Megatron has for the types, and `config`, a LLaVA's, has not: `ffn_hidden_size 14336 -> 96`."""
    kind, vision, text = LANGUAGES[language_model_type], config.vision_config, config.text_config
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
    theirs = dict(zip(names, ENCODERS[vision.vision_model_type], strict=True))
    widths: list[tuple[str, int | None, int]] = [
        (f"the encoder's {name}", size, getattr(vision, name)) for name, size in theirs.items()
    ]
    dense = kind.ffn is not None and not text.num_experts
    widths += [("the language model's ffn_hidden_size", kind.ffn, text.ffn_hidden_size)] if dense else []
    if config.vision_projection_type == "mlp":
        widths.append(("the projection's ffn_hidden_size", kind.projection_ffn, config.projection_ffn_hidden_size))
    return [f"{what} {size} -> {mine}" for what, size, mine in widths if size != mine]
