"""Llava, whose images go through CLIP, and InternVL, with either InternViT: Megatron's LLaVA where it is the same.

Both have three parts with a config.json's settings each: the rows here are of the encoder and of what stands between it
and the language model, whose own family has its rows (`composite.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..cuts import Config
from ..models.vision_kinds import places_of_a_tile
from ..rows import PROJECTION, VISION
from ..tiles import Tiled
from .activations import activation
from .family import GAMMA, ONE, QKV, Family, Field, Joint, Line, Settings, Theirs, pair

LAYER, FC = f"{VISION}.decoder.layers.{{l}}.", f"{PROJECTION}.encoder.linear_fc"
AT, MLP = f"{LAYER}self_attention.", f"{LAYER}mlp."
TOWER, PROJECTOR = "vision_tower.", "multi_modal_projector."


def with_ones(axes: int) -> Joint:
    """One array, which has here so many axes of one place more in front; below 0: fewer."""

    def shaped(array: Tiled, more: int) -> Tiled:
        if array.ndim <= -more:
            raise ValueError(f"{list(array.shape)} has too few axes")
        for _ in range(more):
            array = array.unflatten(0, (1, -1))
        for _ in range(-more):
            array = array.flatten(0)
        return array

    return Joint(lambda arrays, config: shaped(arrays[0], axes), lambda whole, config: [shaped(whole, -axes)])


def qkv(heads: str, kind: str) -> Line:
    """Queries, keys and values of a layer: three matrices, or three biases."""
    return Line(f"{AT}linear_qkv.{kind}", tuple(f"{heads}{x}_proj.{kind}" for x in "qkv"), QKV)


def used_layers(theirs: Theirs) -> tuple[int, int]:
    """Layers of the encoder up to that whose output is taken, and all.

    Raises:
        ValueError: outputs of several layers are taken, or none's.
    """
    chosen, layers = theirs["vision_feature_layer"], int(theirs["vision_config"]["num_hidden_layers"])
    if isinstance(chosen, list) and len(chosen) == 1:
        (chosen,) = chosen
    if not isinstance(chosen, int) or not 0 < (used := chosen + (layers + 1 if chosen < 0 else 0)) <= layers:
        raise ValueError(f"it is {chosen!r} of an encoder of {layers} layers; Megatron takes the output of one layer")
    return used, layers


def left_unused(theirs: Theirs) -> list[str]:
    used, layers = used_layers(theirs)
    if used == layers:
        return []
    return [f"of the encoder's {layers} layers the output of layer {used} is taken: those after it are left out"]


USUAL_LAYER = {"llava": -2, "internvl": -1}  # `vision_feature_layer` where config.json does not say
LAST = Settings(
    ("vision_feature_layer",),
    lambda theirs: {"num_layers": used_layers(theirs)[0]},  # of the encoder
    lambda config: {"vision_feature_layer": -1},
)
IMAGE_TOKENS = "image_token_index", "image_token_id"
PLACES = Settings(
    ("image_seq_length",), lambda theirs: {}, lambda config: {"image_seq_length": places_of_a_tile(config)}
)


def image_token(key: str, default: int) -> Settings:
    """The number of the image token, a word of theirs."""

    def write(config: Config) -> dict[str, Any]:
        token, words = config.image_token_id, config.text_config.vocab_size
        if not 0 <= token < words:
            raise ValueError(
                f"image_token_id is {token}, and transformers looks it up among the {words} words before images "
                f"take its place"
            )
        return {key: token}

    return Settings((key,), lambda theirs: {"image_token_id": theirs.get(key, default)}, write)


def sides(theirs: Theirs, image: int, patch: int) -> tuple[int, int]:
    """Pixels of an image's side and of a patch's, each a number or two that are alike."""
    found = []
    for key, default in (("image_size", image), ("patch_size", patch)):
        value = theirs.get(key, default)
        pair = list(value) if isinstance(value, (list, tuple)) else [value, value]
        if len(pair) != 2 or pair[0] != pair[1] or not isinstance(pair[0], int):
            raise ValueError(f"{key} is {value!r}; built are squares")
        found.append(pair[0])
    if found[0] % found[1]:
        raise ValueError(f"images of {found[0]} pixels are no whole number of patches of {found[1]}")
    return found[0], found[1]


def squares(image: int, patch: int, said: Callable[[int], Any]) -> Settings:
    """Sizes of images and patches; the defaults, and how a number of pixels is written."""

    def read(theirs: Theirs) -> dict[str, Any]:
        pixels, patch_dim = sides(theirs, image, patch)
        return {"img_h": pixels, "img_w": pixels, "patch_dim": patch_dim}

    def write(config: Config) -> dict[str, Any]:
        if config.img_h != config.img_w:
            raise ValueError(f"images are {config.img_h} x {config.img_w} pixels: transformers takes squares")
        return {"image_size": said(config.img_h), "patch_size": said(config.patch_dim)}

    return Settings(("image_size", "patch_size"), read, write)


def forms(known: dict[str, dict[str, Any]], defaults: dict[str, Any]) -> Settings:
    """The settings that together say which of Megatron's encoders it is, if one."""

    def read(theirs: Theirs) -> dict[str, Any]:
        told = {key: theirs.get(key, default) for key, default in defaults.items()}
        kind = next((kind for kind, settings in known.items() if settings == told), None)
        if kind is None:
            raise ValueError(f"{told}; built are {' and '.join(map(str, known.values()))}")
        return {"vision_model_type": kind}

    def write(config: Config) -> dict[str, Any]:
        kind = config.vision_model_type
        if kind not in known:
            raise ValueError(f"the encoder is {kind}: it takes {' or '.join(known)}")
        return dict(known[kind])

    return Settings(tuple(defaults), read, write)


def epsilon_of_heads(normed: bool, epsilon: float) -> dict[str, Any]:
    """Nothing; a ValueError where norms of queries and keys would have another epsilon than they have."""
    if normed and epsilon != 1e-6:
        raise ValueError(f"norms have an epsilon of {epsilon}: those of queries and keys always have 1e-6 there")
    return {}


def encoder_sizes(hidden: int, ffn: int, layers: int, heads: int, epsilon: float) -> tuple[Field, ...]:
    return (
        Field("hidden_size", "hidden_size", hidden),
        Field("intermediate_size", "ffn_hidden_size", ffn),
        Field("num_hidden_layers", "num_layers", layers),
        Field("num_attention_heads", "num_attention_heads", heads),
        Field("layer_norm_eps", "layernorm_epsilon", epsilon),
    )


CLIP_AT = f"{TOWER}encoder.layers.{{l}}."
CLIP = Family(
    name="clip_vision_model",
    architecture="CLIPVisionModel",
    fields=(*encoder_sizes(768, 3072, 12, 12, 1e-5), activation("hidden_act", "quick_gelu")),
    lines=(
        Line(f"{VISION}.class_token", (f"{TOWER}embeddings.class_embedding",), with_ones(2)),
        Line(f"{VISION}.position_embeddings.weight", (f"{TOWER}embeddings.position_embedding.weight",), ONE),
        Line(f"{VISION}.conv1.weight", (f"{TOWER}embeddings.patch_embedding.weight",), ONE),
        *pair(f"{VISION}.ln_pre.", f"{TOWER}pre_layrnorm.", GAMMA, ONE),
        *pair(f"{AT}linear_qkv.layer_norm_", f"{CLIP_AT}layer_norm1.", GAMMA, ONE),
        *(qkv(f"{CLIP_AT}self_attn.", kind) for kind in ("weight", "bias")),
        *pair(f"{AT}linear_proj.", f"{CLIP_AT}self_attn.out_proj.", ONE, ONE),
        *pair(f"{MLP}linear_fc1.layer_norm_", f"{CLIP_AT}layer_norm2.", GAMMA, ONE),
        *pair(f"{MLP}linear_fc1.", f"{CLIP_AT}mlp.fc1.", ONE, ONE),
        *pair(f"{MLP}linear_fc2.", f"{CLIP_AT}mlp.fc2.", ONE, ONE),
    ),
    settings=(forms({"clip": {}}, {}), squares(224, 32, lambda pixels: pixels)),
    constants={"model_type": ("clip_vision_model",), "num_channels": (3,)},
    harmless=frozenset(("projection_dim", "initializer_factor", "vocab_size", "dropout")),
)
INTERN_AT = f"{TOWER}encoder.layer.{{l}}."
INTERN_VIT = Family(
    name="internvl_vision",
    architecture="InternVLVisionModel",
    fields=(*encoder_sizes(1024, 4096, 24, 16, 1e-6), activation("hidden_act", "gelu")),
    lines=(
        Line(f"{VISION}.class_token", (f"{TOWER}embeddings.cls_token",), ONE),
        Line(f"{VISION}.position_embeddings.weight", (f"{TOWER}embeddings.position_embeddings",), with_ones(-1)),
        *pair(f"{VISION}.conv1.", f"{TOWER}embeddings.patch_embeddings.projection.", ONE, ONE),
        *pair(f"{LAYER}input_layernorm.", f"{INTERN_AT}layernorm_before.", GAMMA, ONE),
        *(qkv(f"{INTERN_AT}attention.", kind) for kind in ("weight", "bias")),
        *(Line(f"{AT}{x}_layernorm.weight", (f"{INTERN_AT}attention.{x}_norm.weight",), GAMMA) for x in "qk"),
        *pair(f"{AT}linear_proj.", f"{INTERN_AT}attention.projection_layer.", ONE, ONE),
        *pair(f"{LAYER}pre_mlp_layernorm.", f"{INTERN_AT}layernorm_after.", GAMMA, ONE),
        *pair(f"{MLP}linear_fc1.", f"{INTERN_AT}mlp.fc1.", ONE, ONE),
        *pair(f"{MLP}linear_fc2.", f"{INTERN_AT}mlp.fc2.", ONE, ONE),
        *(Line(f"{LAYER}ls{n}", (f"{INTERN_AT}lambda_{n}",), ONE) for n in "12"),
    ),
    settings=(
        forms(
            {
                "internvit300M": {"use_qk_norm": False, "norm_type": "layer_norm", "attention_bias": True},
                "internvit": {"use_qk_norm": True, "norm_type": "rms_norm", "attention_bias": False},
            },
            {"use_qk_norm": False, "norm_type": "layer_norm", "attention_bias": False},
        ),
        squares(448, 14, lambda pixels: [pixels, pixels]),
        Settings(
            ("layer_norm_eps",),
            lambda theirs: epsilon_of_heads(theirs.get("use_qk_norm", False), theirs.get("layer_norm_eps", 1e-6)),
            lambda config: epsilon_of_heads(config.qk_layernorm, config.layernorm_epsilon),
        ),
    ),
    constants={
        "model_type": ("internvl_vision",),
        "num_channels": (3,),
        "use_absolute_position_embeddings": (True,),
        "use_mask_token": (False,),
        "use_mean_pooling": (True,),  # else there is one more norm
    },
    harmless=frozenset(("hidden_dropout_prob", "projection_dropout", "layer_scale_init_value")),
)  # fmt: skip

# What neither has: the projection is an MLP without a gate, all images are one tile without a tag.
PLAIN: dict[str, Any] = {
    "vision_projection_type": "mlp",
    "projection_gated_linear_unit": False,
    "projection_normalization": None,
    "projection_layernorm_epsilon": 1e-5,
    "projection_layernorm_zero_centered_gamma": False,
    "pixel_shuffle": False,
    "conv_merging": False,
    "tile_tags": None,
    "use_tiling": False,
    "max_num_tiles": 1,
    "use_thumbnail": False,
}
ACTIVATION = replace(activation("projector_hidden_act", "gelu"), ours="projection_activation_func")
STRATEGIES = {"default": True, "full": False}
PARTS = frozenset(("text_config", "vision_config"))
# Names as transformers 5 has them in memory, and as transformers 4 stored them, to those that both read.
ONCE = {
    r"^model\.(language_model|vision_tower|multi_modal_projector)\.": r"\1.",
    r"^lm_head\.": "language_model.lm_head.",
    r"^language_model\.(?!model\.|lm_head\.)": "language_model.model.",
    r"^vision_tower\.vision_model\.": TOWER,
}


def read_strategy(theirs: Theirs) -> dict[str, Any]:
    found = theirs.get("vision_feature_select_strategy", "default")
    if found not in STRATEGIES:
        raise ValueError(f"it is {found!r}; built are {' and '.join(STRATEGIES)}")
    return {"drop_vision_class_token": STRATEGIES[found]}


def write_strategy(config: Config) -> dict[str, Any]:
    return {"vision_feature_select_strategy": "default" if config.drop_vision_class_token else "full"}


def post_norm(config: Config) -> dict[str, tuple[int, ...]]:
    """CLIP's norm of its class token, which Llava has and never runs."""
    return {f"{TOWER}post_layernorm.{kind}": (config.vision_config.hidden_size,) for kind in ("weight", "bias")}


LLAVA = Family(
    name="llava",
    architecture="LlavaForConditionalGeneration",
    fields=(
        Field("multimodal_projector_bias", "projection_add_bias_linear", True),
        Field("tie_word_embeddings", "tie_word_embeddings", False),
        ACTIVATION,
    ),
    lines=(*pair(f"{FC}1.", f"{PROJECTOR}linear_1.", ONE, ONE), *pair(f"{FC}2.", f"{PROJECTOR}linear_2.", ONE, ONE)),
    settings=(
        image_token(IMAGE_TOKENS[0], 32000),
        LAST,
        PLACES,
        Settings(("vision_feature_select_strategy",), read_strategy, write_strategy),
    ),
    fixed=PLAIN,
    harmless=PARTS | {"ignore_index", "vocab_size", "projection_dim"},  # of transformers 4
    ignored={
        r"vision_tower\.post_layernorm\..*": "a norm that is never run",
        r"vision_tower\.embeddings\.position_ids": "numbers of positions",
    },
    remarks=lambda theirs: [
        *left_unused(theirs),
        "the norm after its encoder, which Llava has and never runs, is not Megatron's: it is left out, or all zeros",
    ],
    once=ONCE,
    blank=post_norm,
    vision=CLIP,
)
INTERN_VL = Family(
    name="internvl",
    architecture="InternVLForConditionalGeneration",
    fields=(Field("tie_word_embeddings", "tie_word_embeddings", True), ACTIVATION),
    lines=(*pair(f"{FC}1.layer_norm_", f"{PROJECTOR}layer_norm.", GAMMA, ONE), *LLAVA.lines),
    settings=(image_token(IMAGE_TOKENS[1], 151667), LAST, PLACES),
    fixed={
        **PLAIN,
        "projection_normalization": "LayerNorm",
        "projection_add_bias_linear": True,
        "drop_vision_class_token": True,
        "pixel_shuffle": True,
    },
    constants={"downsample_ratio": (0.5,), "vision_feature_select_strategy": ("default",)},
    harmless=PARTS,
    remarks=left_unused,
    once=ONCE,
    vision=INTERN_VIT,
)
