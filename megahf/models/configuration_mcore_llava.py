"""Configuration of Megatron-core's LLaVA: an image encoder, a projection, and a GPT or a hybrid as language model."""

from __future__ import annotations

from operator import attrgetter
from typing import Any, ClassVar, NamedTuple, cast

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

from .checks import at_least_one, one_of
from .configuration_mcore import ACTIVATIONS, NORMALIZATIONS, McoreGPTConfig
from .configuration_mcore_hybrid import McoreHybridConfig
from .plans import attention_plan, mlp_plan
from .vision_kinds import VisionKind, places_of_a_tile, vision_kind

TEXT_CONFIGS = {"mcore_gpt": McoreGPTConfig, "mcore_hybrid": McoreHybridConfig}
PROJECTIONS = ("mlp", "affine")
# Fields of a language model that Megatron's LLaVA cannot have, or has in a way that transformers' inputs cannot say.
TEXT_WITHOUT: dict[str, tuple[tuple[Any, ...], str]] = {
    "position_embedding_type": (("rope", "yarn", "none"), "Megatron counts an image as one learned position of text"),
    "mup_embedding_mult": ((1.0,), "Megatron multiplies the embeddings of text by it and not those of images"),
    "mtp_num_layers": ((None,), "Megatron's LLaVA has no heads that predict further tokens"),
}


class ProjectionConfig(NamedTuple):
    """What the modules of the projection ask a configuration."""

    hidden_size: int
    activation_func: str
    gated_linear_unit: bool
    normalization: str | None
    layernorm_epsilon: float
    layernorm_zero_centered_gamma: bool
    activation_func_clamp_value: None = None
    glu_linear_offset: float = 0.0


@strict
class McoreVisionConfig(PreTrainedConfig):
    """An image encoder of Megatron-core. Fields left out are what `vision_model_type` has them be (`vision_kinds.py`).

    The names are those of a GPT's configuration, since the layers are the same modules.
    """

    model_type = "mcore_vision"
    base_config_key = "vision_config"
    base_model_fsdp_plan = {"decoder.layers.*": "free_full_weight"}  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "num_hidden_layers": "num_layers",
        "intermediate_size": "ffn_hidden_size",
        "num_key_value_heads": "num_query_groups",
        "head_dim": "kv_channels",
        "patch_size": "patch_dim",
        "initializer_range": "init_method_std",
    }

    vision_model_type: str = "clip"
    num_layers: int = 24
    hidden_size: int = 1024
    ffn_hidden_size: int = 4096  # width of the MLP (of each half, if gated)
    num_attention_heads: int = 16
    kv_channels: int | None = None
    num_query_groups: int = 0  # always one a head
    normalization: str | None = None
    layernorm_epsilon: float | None = None
    layernorm_zero_centered_gamma: bool = False
    activation_func: str | None = None
    gated_linear_unit: bool | None = None
    add_bias_linear: bool = True
    add_qkv_bias: bool | None = None
    qk_layernorm: bool | None = None  # RMSNorms over the channels of all heads

    img_h: int = 336
    img_w: int = 336
    patch_dim: int = 14
    class_token_len: int | None = None  # of the encoder; whether the language model sees them the LLaVA's field says
    max_img_h: int | None = None  # pixels that RADIO's table of positions covers
    max_img_w: int | None = None
    # RADIO's positions. Megatron-core to 0.16 interpolates with aligned corners, 2026's main without.
    interpolate_align_corners: bool = True
    has_cpe: bool = True  # the table is stretched over the image, else its corner is cut out
    force_cpe_eval_mode: bool = False  # also in training; else training stretches a random part of the table
    interpolate_only_cpe: bool = False  # straight to the image's shape, not to a square that is cut
    cpe_aspect_ratio_select: bool = False  # of the table only a part with the image's shape

    attention_dropout: float | int = 0.0
    hidden_dropout: float | int = 0.0
    init_method_std: float | int = 0.02

    # What the shared modules ask beyond this, and no encoder has.
    stack: ClassVar[str] = "decoder"
    multi_latent_attention: ClassVar[bool] = False
    attention_output_gate: ClassVar[bool] = False
    qk_l2_norm: ClassVar[bool] = False
    softmax_type: ClassVar[str] = "vanilla"
    softmax_scale: ClassVar[None] = None
    sliding_window: ClassVar[None] = None
    rotary_interleaved: ClassVar[bool] = False
    activation_func_clamp_value: ClassVar[None] = None
    glu_linear_offset: ClassVar[float] = 0.0
    num_experts: ClassVar[None] = None

    def __post_init__(self, **kwargs: Any) -> None:
        kind = self.kind
        for name in ("normalization", "activation_func", "gated_linear_unit", "add_qkv_bias", "qk_layernorm"):
            self.fill(name, getattr(kind, name))
        self.fill("class_token_len", kind.class_token_len)
        self.fill("kv_channels", kind.kv_channels or self.hidden_size // self.num_attention_heads)
        self.fill("layernorm_epsilon", kind.layernorm_epsilon or 1e-5)
        self.fill("max_img_h", kind.max_img)
        self.fill("max_img_w", kind.max_img)
        self.num_query_groups = self.num_query_groups or self.num_attention_heads
        super().__post_init__(**kwargs)
        self.base_model_tp_plan = encoder_plan(self)

    def fill(self, name: str, value: Any) -> None:
        if getattr(self, name) is None:
            setattr(self, name, value)

    @property
    def kind(self) -> VisionKind:
        """What the type decides beside these fields; a ValueError if there is no such type."""
        return vision_kind(self.vision_model_type)

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.img_h // self.patch_dim) * (self.img_w // self.patch_dim)

    @property
    def seq_length(self) -> int:
        """Tokens of an image inside the encoder, class tokens first."""
        return self.num_patches + (self.class_token_len or 0)

    @property
    def rotary_layers(self) -> list[bool]:
        return [False] * self.num_layers

    @property
    def moe_layers(self) -> list[bool]:
        return [False] * self.num_layers

    @property
    def layer_types(self) -> list[str]:
        return ["full_attention"] * self.num_layers

    def validate_architecture(self) -> None:
        """Sizes that fit together, and those that the type fixes."""
        for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "patch_dim"):
            at_least_one(name, getattr(self, name))
        if self.num_query_groups != self.num_attention_heads:
            raise ValueError(
                f"num_query_groups is {self.num_query_groups}: an image encoder has one a head, it must be "
                f"{self.num_attention_heads}"
            )
        tokens, kind = self.class_token_len or 0, self.kind
        for name in ("img_h", "img_w"):
            if getattr(self, name) < 1 or getattr(self, name) % self.patch_dim:
                raise ValueError(
                    f"{name} is {getattr(self, name)}: it must be a multiple of patch_dim {self.patch_dim}, above 0"
                )
        for name in ("max_img_h", "max_img_w"):
            if kind.tower == "radio" and getattr(self, name) < self.patch_dim:
                raise ValueError(f"{name} is {getattr(self, name)}: a table of positions has at least one patch")
        if tokens < 0 or (kind.tower == "clip" and tokens != kind.class_token_len):
            raise ValueError(
                f"class_token_len is {tokens}: with vision_model_type {self.vision_model_type} it must be "
                f"{kind.class_token_len if kind.tower == 'clip' else '0 or above'}"
            )

    def validate_choices(self) -> None:
        """Words that have a meaning."""
        one_of("normalization", str(self.normalization), NORMALIZATIONS)
        one_of("activation_func", str(self.activation_func), ACTIVATIONS)
        if self.qk_layernorm != self.kind.qk_layernorm:
            raise ValueError(
                f"qk_layernorm is {self.qk_layernorm}: in a {self.vision_model_type} encoder it is "
                f"{self.kind.qk_layernorm}"
            )


def encoder_plan(config: McoreVisionConfig) -> dict[str, str]:
    """How processes share the encoder: by heads and widths; norms over all heads keep those whole."""
    shared = cast(McoreGPTConfig, config)
    parts = {**({} if config.qk_layernorm else attention_plan(shared)), **mlp_plan(shared)}
    return {f"{config.stack}.layers.*.{name}": style for name, style in parts.items()}


@strict
class McoreLlavaConfig(PreTrainedConfig):
    """A Megatron-core LLaVA: what is the encoder's and the language model's lies in configurations of their own."""

    model_type = "mcore_llava"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig, "vision_config": McoreVisionConfig}
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    base_model_fsdp_plan = {"vision_projection": "free_full_weight"}  # noqa: RUF012

    text_config: Any = None  # a McoreGPTConfig or McoreHybridConfig, or the fields of one with its model_type
    vision_config: Any = None  # a McoreVisionConfig, or its fields

    vision_projection_type: str = "mlp"
    projection_ffn_hidden_size: int = 0  # width of the mlp; 0: 4 hidden_size of the language model
    projection_activation_func: str = "gelu"
    projection_gated_linear_unit: bool = False
    projection_add_bias_linear: bool = False
    projection_normalization: str | None = None  # in front of the mlp
    projection_layernorm_epsilon: float = 1e-5
    projection_layernorm_zero_centered_gamma: bool = False

    drop_vision_class_token: bool = False  # the language model does not see them
    pixel_shuffle: bool = False  # two by two patches become one, of four times the channels
    conv_merging: bool = False  # says that the encoder itself merges patches: none here does
    tile_tags: list[list[int]] | None = None  # tokens in front of a tile, by its place; the last are the thumbnail's
    image_token_id: int = -200  # stands once for each place that an image takes

    use_tiling: bool = False  # for the image processor: an image is cut into tiles
    max_num_tiles: int = 1
    use_thumbnail: bool = False  # and shown whole, as the last tile
    tie_word_embeddings: bool | None = None  # the language model's

    # What is asked of a language model's configuration by its name there.
    hidden_size = property(attrgetter("text_config.hidden_size"))
    num_layers = property(attrgetter("text_config.num_layers"))
    init_method_std = property(attrgetter("text_config.init_method_std"))
    mup_output_mult = property(attrgetter("text_config.mup_output_mult"))
    loss_chunk_size = property(attrgetter("text_config.loss_chunk_size"))
    mtp_loss_scaling_factor = property(attrgetter("text_config.mtp_loss_scaling_factor"))

    @property
    def vocab_size(self) -> int:
        return self.text_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, rows: int) -> None:
        self.text_config.vocab_size = rows

    def __post_init__(self, **kwargs: Any) -> None:
        self.text_config = text_config_of(self.text_config)
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = McoreVisionConfig(**(self.vision_config or {}))
        if self.tie_word_embeddings is None:
            self.tie_word_embeddings = self.text_config.tie_word_embeddings
        self.projection_ffn_hidden_size = self.projection_ffn_hidden_size or 4 * self.text_config.hidden_size
        super().__post_init__(**kwargs)
        self.base_model_tp_plan = projection_plan(self)

    @property
    def projection(self) -> ProjectionConfig:
        """The fields of the projection under the names of a GPT's."""
        return ProjectionConfig(
            self.text_config.hidden_size,
            self.projection_activation_func,
            self.projection_gated_linear_unit,
            self.projection_normalization,
            self.projection_layernorm_epsilon,
            self.projection_layernorm_zero_centered_gamma,
        )

    @property
    def projection_input_size(self) -> int:
        """Channels of what the projection takes."""
        return self.vision_config.hidden_size * (4 if self.pixel_shuffle else 1)

    @property
    def img_seq_len(self) -> int:
        """Places that a tile takes among the language model's tokens, tags included."""
        return places_of_a_tile(self)

    def validate_architecture(self) -> None:
        """Sizes that fit together."""
        at_least_one("projection_ffn_hidden_size", self.projection_ffn_hidden_size)
        at_least_one("max_num_tiles", self.max_num_tiles)
        vision = self.vision_config
        rows, columns = vision.img_h // vision.patch_dim, vision.img_w // vision.patch_dim
        if self.pixel_shuffle and (rows != columns or rows % 2):
            raise ValueError(
                f"pixel_shuffle joins two by two patches of a square: an image has {rows} x {columns} patches"
            )
        if self.pixel_shuffle and not self.drop_vision_class_token and vision.class_token_len:
            raise ValueError(
                f"pixel_shuffle takes patches alone, but {vision.class_token_len} class tokens are kept: "
                f"drop_vision_class_token must be true"
            )
        if self.tie_word_embeddings != self.text_config.tie_word_embeddings:
            raise ValueError(
                f"tie_word_embeddings is {self.tie_word_embeddings}, the text_config's is "
                f"{self.text_config.tie_word_embeddings}: they must be the same"
            )

    def validate_choices(self) -> None:
        """Words that have a meaning."""
        one_of("vision_projection_type", self.vision_projection_type, PROJECTIONS)
        one_of("projection_activation_func", self.projection_activation_func, ACTIVATIONS)
        if self.projection_normalization is not None:
            one_of("projection_normalization", self.projection_normalization, NORMALIZATIONS)
        if self.conv_merging:
            raise ValueError(
                f"conv_merging counts on an encoder that merges two by two patches itself, which "
                f"{self.vision_config.vision_model_type} does not: it must be false"
            )

    def validate_tags(self) -> None:
        """Tags are equally long, and there is a thumbnail's beside at least one tile's."""
        if self.tile_tags is None:
            return
        lengths = sorted({len(tag) for tag in self.tile_tags})
        if len(self.tile_tags) < 2 or len(lengths) != 1 or lengths == [0]:
            raise ValueError(
                f"tile_tags are {len(self.tile_tags)} lists of {lengths} tokens: as many tokens are needed in each, "
                f"a list for each of max_num_tiles {self.max_num_tiles} tiles and one for the thumbnail"
            )
        vocabulary = self.text_config.vocab_size
        wrong = [token for tag in self.tile_tags for token in tag if not 0 <= token < vocabulary]
        if wrong:
            raise ValueError(f"tile_tags have token {wrong[0]}, the vocabulary {vocabulary}")

    def validate_text(self) -> None:
        """A language model that Megatron's LLaVA can have."""
        for name, (allowed, reason) in TEXT_WITHOUT.items():
            value = getattr(self.text_config, name)
            if value not in allowed:
                choices = " or ".join(str(x) for x in allowed)
                raise ValueError(f"{name} of text_config is {value}, but {reason}: it must be {choices}")


def projection_plan(config: McoreLlavaConfig) -> dict[str, str]:
    """How processes share the projection: an MLP by its width, a matrix not."""
    if config.vision_projection_type == "affine":
        return {}
    fields = cast(McoreGPTConfig, config.projection)
    return mlp_plan(fields, "vision_projection.encoder.", config.projection_add_bias_linear)


def text_config_of(fields: dict[str, Any] | PreTrainedConfig | None) -> McoreGPTConfig:
    """The language model's configuration, a GPT's or a hybrid's."""
    if isinstance(fields, McoreGPTConfig):
        return fields
    given = fields.to_dict() if isinstance(fields, PreTrainedConfig) else dict(fields or {})
    kind = given.pop("model_type", "mcore_gpt")
    if kind not in TEXT_CONFIGS:
        raise ValueError(f"text_config is of model_type {kind!r}: it must be one of {', '.join(TEXT_CONFIGS)}")
    if not fields:
        given["position_embedding_type"] = "rope"
    return TEXT_CONFIGS[kind](**given)


McoreVisionConfig.register_for_auto_class()
McoreLlavaConfig.register_for_auto_class()
