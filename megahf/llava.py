"""What is LLaVA's own between Megatron's arguments and the config.

The script that starts the run, examples/multimodal/train.py, adds arguments of its own and takes the rest from tables
by type (`llava_types.py`): most widths are in no argument, and are read off the weights. That a run was LLaVA's the
names of the weights say; `MARK` stands for that beside the arguments, in memory alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from .errors import Problems, refuse
from .grid_arguments import is_count
from .llava_arguments import ARGUMENTS, PROJECTION
from .llava_types import ACTIVATIONS, FROM_ARGS, LANGUAGES, differing, is_hybrid_type
from .models.vision_kinds import vision_kind
from .rows import is_hybrid

Args = Mapping[str, Any]
MARK = "is_llava_model"
NAMES = frozenset((*ARGUMENTS, PROJECTION, "language_model_type"))
OF_2026 = "radio_force_eval_mode"  # only Megatrons that interpolate RADIO's positions otherwise have this argument
RADIO = {
    "has_cpe": ("radio_disable_cpe", False),
    "force_cpe_eval_mode": ("radio_force_cpe_eval_mode", True),
    "interpolate_only_cpe": ("radio_interpolate_only_cpe", True),
    "cpe_aspect_ratio_select": ("radio_cpe_aspect_ratio_select", True),
}  # field -> argument, and the field's value where it is given
OF_RADIO = frozenset(argument for argument, _ in RADIO.values())
SWITCHES = {
    "drop_vision_class_token": "disable_vision_class_token",
    "pixel_shuffle": "pixel_shuffle",
    "use_tiling": "use_tiling",
    "use_thumbnail": "use_thumbnail",
}
# Arguments that make another function: (name, what they are); None, False, 0 and 1 do not.
REFUSED = {
    "sound_model_type": "a model that hears",
    "dynamic_resolution": "images of any size in one sequence",
    "conv_merging": "an encoder that merges patches itself",
    "separate_video_embedder": "an encoder of videos",
    "video_temporal_patch_size": "patches of several frames of a video",
    "multi_latent_attention": "multi-latent attention, which Megatron's LLaVA does not build",
}
# Fields of its language model that the weights tell, where the types and the arguments may say otherwise.
TOLD_IN_TEXT = frozenset((
    "add_qkv_bias", "add_bias_linear", "qk_layernorm", "ffn_hidden_size", "tie_word_embeddings", "num_tokentypes",
))  # fmt: skip
# And fields that they, or a tokenizer, tell of the rest.
TOLD = frozenset((
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "class_token_len", "projection_ffn_hidden_size", "projection_gated_linear_unit", "projection_add_bias_linear",
    "projection_normalization", "vision_projection_type", "image_token_id", "tile_tags", "tie_word_embeddings",
))  # fmt: skip
# All fields but the configs of the parts, and an image encoder's.
OWN = frozenset((
    "vision_projection_type", "projection_ffn_hidden_size", "projection_activation_func",
    "projection_gated_linear_unit", "projection_add_bias_linear", "projection_normalization",
    "projection_layernorm_epsilon", "projection_layernorm_zero_centered_gamma", "drop_vision_class_token",
    "pixel_shuffle", "conv_merging", "tile_tags", "image_token_id", "use_tiling", "max_num_tiles", "use_thumbnail",
    "tie_word_embeddings",
))  # fmt: skip
ENCODER = frozenset((
    "vision_model_type", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
    "kv_channels", "normalization", "layernorm_epsilon", "layernorm_zero_centered_gamma", "activation_func",
    "gated_linear_unit", "add_bias_linear", "add_qkv_bias", "qk_layernorm", "img_h", "img_w", "patch_dim",
    "class_token_len", "max_img_h", "max_img_w", "interpolate_align_corners", "attention_dropout", "hidden_dropout",
    "init_method_std", *RADIO,
))  # fmt: skip
FROM_TOKENIZER = ("image_token_id", "tile_tags")
IMAGE_TOKEN, UNKNOWN_IMAGE_TOKEN = "<image>", -200  # IMAGE_TOKEN and DEFAULT_IMAGE_TOKEN_INDEX of llava_model.py
NO_TOKEN = f"there is no tokenizer, so image_token_id is Megatron's placeholder {UNKNOWN_IMAGE_TOKEN}: --tokenizer DIR"


class Llava(SimpleNamespace):
    """A LLaVA's config; what it does not have itself is its language model's."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "text_config":
            raise AttributeError(name)
        return getattr(self.text_config, name)


def is_marked(args: Args) -> bool:
    return bool(args.get(MARK))


def check(args: Args) -> None:
    """Refuses what is not built: by name, all of it."""
    found = Problems()
    for name, known in (("language_model_type", tuple(LANGUAGES)), ("vision_model_type", ())):
        kind = args.get(name)
        if not isinstance(kind, str):
            what = f"the weights are a LLaVA's, and the args do not say {name}"
            found.add(what, "args", "those of examples/multimodal/train.py do; pretrain_vlm.py's models are not built")
        elif kind.startswith("hf://"):
            found.add(f"--{name.replace('_', '-')} {kind} is transformers' own model inside Megatron's", "args",
                      "its weights are under hf names already: they can be loaded by transformers")  # fmt: skip
        elif known and kind not in known:
            found.add(f"--{name.replace('_', '-')} {kind!r:.60} is not built", "args", f"one of {', '.join(known)}")
        elif not known:
            try:
                vision_kind(kind)
            except ValueError as error:
                found.add(str(error), "args")
    for name in ("img_h", "img_w", "patch_dim"):
        if not is_count(args.get(name)):
            found.add(f"{name} is {args.get(name)!r:.60}, not a number of at least 1", "args")
    for name, meaning in REFUSED.items():
        if args.get(name) not in (None, False, 0, 1) or args.get(name) is True:
            found.add(f"--{name.replace('_', '-')} {args[name]} is {meaning}, which is not built", "args")
    found.raise_if_any()
    for side in ("img_h", "img_w"):
        if args[side] % args["patch_dim"]:
            raise refuse(f"{side} {args[side]} is no multiple of patch_dim {args['patch_dim']}", "args")


def language(args: Args) -> dict[str, Any]:
    """The arguments of the language model alone: what its type says over what was given."""
    check(args)
    name = args["language_model_type"]
    kind, hybrid = LANGUAGES[name], is_hybrid_type(name)
    made = {**args, MARK: False, "bias_gelu_fusion": False, "mtp_num_layers": None, **kind.mixers}
    made |= {"is_hybrid_model": hybrid, "rotary_seq_len_interpolation_factor": None}
    if not hybrid:
        made |= {"hybrid_layer_pattern": None, "hybrid_override_pattern": None}
        made |= {"hybrid_attention_ratio": 0.0, "hybrid_mlp_ratio": 0.0}
    if kind.activation != FROM_ARGS:
        made |= {**ACTIVATIONS[kind.activation], "add_bias_linear": False}
        made["add_qkv_bias"] = kind.qkv_bias or bool(args.get("add_qkv_bias"))
    if kind.plain_gamma:
        made |= {"layernorm_zero_centered_gamma": False, "apply_layernorm_1p": False}
    return made


def fields(args: Args, text: Any, base: Any) -> Llava:
    """The config that `args` stand for, without what the weights tell.

    Args:
        text: the config of its language model.
        base: the config that the arguments make by themselves, which the projection starts from.
    """
    for name, why in (
        ("position_embedding_type learned_absolute", "Megatron counts an image as one learned position of text"),
        ("mtp_num_layers", "Megatron's LLaVA has no heads that predict further tokens"),
        ("mup_embedding_mult", "Megatron multiplies the embeddings of text by it and not those of images"),
    ):
        field, _, value = name.partition(" ")
        there = getattr(text, field)
        if there == value if value else there not in (None, 1.0):
            raise refuse(f"{field} {there}: {why}", "args", "such a LLaVA is not built")
    if text.use_rope_scaling and OF_2026 in args:  # whose script passes the factor on, as no other builder does
        text.rope_scaling_factor = float(args.get("rope_scaling_factor") or 8.0)
    kind = LANGUAGES[args["language_model_type"]]
    activation = base.activation_func if kind.projection_activation == FROM_ARGS else kind.projection_activation
    return Llava(
        text_config=text,
        vision_config=vision(args, base),
        vision_projection_type=args.get(PROJECTION) or "mlp",
        projection_ffn_hidden_size=0,
        projection_activation_func=activation,
        projection_gated_linear_unit=False,
        projection_add_bias_linear=kind.bias,
        projection_normalization=text.normalization if kind.norm == FROM_ARGS else kind.norm,
        projection_layernorm_epsilon=1e-5 if kind.bias else base.layernorm_epsilon,
        projection_layernorm_zero_centered_gamma=base.layernorm_zero_centered_gamma,
        **{field: bool(args.get(name)) for field, name in SWITCHES.items()},
        conv_merging=False,
        tile_tags=None,
        image_token_id=UNKNOWN_IMAGE_TOKEN,
        max_num_tiles=args.get("max_num_tiles") or 1,
        tie_word_embeddings=text.tie_word_embeddings,
    )


def vision(args: Args, base: Any) -> SimpleNamespace:
    """The image encoder's config, with sizes of 0 where the weights tell them."""
    kind, later = vision_kind(args["vision_model_type"]), OF_2026 in args
    radio = {name: bool(args.get(argument)) == value for name, (argument, value) in RADIO.items()}
    radio["force_cpe_eval_mode"] |= bool(args.get(OF_2026))  # which is that, without dropout besides
    return SimpleNamespace(
        vision_model_type=args["vision_model_type"],
        num_layers=0,
        hidden_size=0,
        ffn_hidden_size=0,
        num_attention_heads=0,
        kv_channels=kind.kv_channels or 0,
        num_query_groups=0,
        normalization=kind.normalization,
        layernorm_epsilon=kind.layernorm_epsilon or base.layernorm_epsilon,
        layernorm_zero_centered_gamma=False,
        activation_func=kind.activation_func,
        gated_linear_unit=kind.gated_linear_unit,
        add_bias_linear=True,
        add_qkv_bias=kind.add_qkv_bias,
        qk_layernorm=kind.qk_layernorm,
        img_h=args["img_h"],
        img_w=args["img_w"],
        patch_dim=args["patch_dim"],
        class_token_len=kind.class_token_len,
        max_img_h=kind.max_img,
        max_img_w=kind.max_img,
        interpolate_align_corners=not later,
        **radio,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        init_method_std=0.02,
    )


def arguments(config: Any) -> dict[str, Any]:
    """The arguments, and the mark, that `fields` reads LLaVA's own fields from; the widths are in none.

    Raises:
        Refused: no type of Megatron's has this language model with this projection.
    """
    vision, text = config.vision_config, config.text_config
    name, default = language_type(config), vision_kind(vision.vision_model_type).class_token_len
    made: dict[str, Any] = {
        MARK: True,
        "language_model_type": name,
        "vision_model_type": vision.vision_model_type,
        PROJECTION: config.vision_projection_type,
        "img_h": vision.img_h,
        "img_w": vision.img_w,
        "patch_dim": vision.patch_dim,
        "class_token_len": vision.class_token_len if vision.class_token_len != default else None,
        "max_num_tiles": config.max_num_tiles,
        "use_tile_tags": config.tile_tags is not None,
        "decoder_seq_length": text.max_position_embeddings,
        **{argument: getattr(config, field) for field, argument in SWITCHES.items()},
    }
    if LANGUAGES[name].plain_gamma:  # which leaves the argument to the projection
        made["layernorm_zero_centered_gamma"] = config.projection_layernorm_zero_centered_gamma
    if not vision.interpolate_align_corners:
        radio = {argument: getattr(vision, field) == value for field, (argument, value) in RADIO.items()}
        made |= {OF_2026: False, **radio}
    return made


def script(config: Any) -> dict[str, Any]:
    """The arguments of Megatron's script with their defaults: of 2026, or without those that came with its RADIO."""
    if not config.vision_config.interpolate_align_corners:
        return ARGUMENTS
    return {name: value for name, value in ARGUMENTS.items() if name != OF_2026 and name not in OF_RADIO}


def language_type(config: Any) -> str:
    """The type by which Megatron builds the language model and the projection: best with all of its widths."""
    fitting = [name for name in LANGUAGES if builds(name, config)]
    if not fitting:
        text = config.text_config
        raise refuse(
            f"no --language-model-type of Megatron's is a language model of {text.activation_func} behind a projection "
            f"of {config.projection_activation_func} with norm {config.projection_normalization} and "
            f"{'biases' if config.projection_add_bias_linear else 'no biases'}",
            "config",
            f"types are {', '.join(LANGUAGES)}",
        )
    return min(fitting, key=lambda name: len(differing(name, config)))


def builds(name: str, config: Any) -> bool:
    """Whether Megatron makes a LLaVA of this type the function that `config` describes."""
    kind, text = LANGUAGES[name], config.text_config
    same = [
        is_hybrid_type(name) == is_hybrid(text),
        kind.experts == (is_hybrid(text) and bool(text.num_experts)),
        kind.activation in (FROM_ARGS, text.activation_func),
        kind.activation == FROM_ARGS or not text.add_bias_linear,
        not kind.qkv_bias or text.add_qkv_bias,
        not kind.plain_gamma or not text.layernorm_zero_centered_gamma,
        kind.bias == config.projection_add_bias_linear,
        kind.projection_activation
        == (FROM_ARGS if kind.projection_activation == FROM_ARGS else config.projection_activation_func),
        not config.projection_gated_linear_unit,
        all(getattr(text, field, None) == size for field, size in kind.mixers.items()),
    ]
    norm = text.normalization if kind.norm == FROM_ARGS else kind.norm
    return all(same) and norm == config.projection_normalization


def lost(read: Any, wanted: Any) -> Iterator[tuple[str, Any, Any]]:
    """The fields beside the language model's that `wanted` has otherwise than was `read`: (name, wanted, read)."""
    for mine, theirs in ((read, wanted), (read.vision_config, wanted.vision_config)):
        for name, value in vars(mine).items():
            there = getattr(theirs, name, None)
            if name not in ("text_config", "vision_config", *TOLD) and there != value and matters(name, wanted):
                yield name, there, value


def matters(name: str, config: Any) -> bool:
    """Whether a field of the projection's norm, or of RADIO's positions, has an effect."""
    if name.startswith("projection_layernorm"):
        return config.projection_normalization is not None
    if name in (*RADIO, "interpolate_align_corners", "max_img_h", "max_img_w"):
        return vision_kind(config.vision_config.vision_model_type).tower == "radio"
    return True


def notes(args: Args) -> list[str]:
    """What is worth saying about how LLaVA's arguments were read."""
    said = [
        f"{name} has no effect: Megatron's LLaVA is built without"
        for name in ("mtp_num_layers", "rotary_seq_len_interpolation_factor")
        if args.get(name)
    ]
    if vision_kind(args["vision_model_type"]).tower == "radio":
        version, corners = ("after", "without") if OF_2026 in args else ("up to", "with")
        said.append(
            f"RADIO's positions are interpolated {corners} aligned corners, as Megatron {version} 0.17 does: "
            f"interpolate_align_corners in vision_config says so"
        )
    return said


def unsaid(config: Any) -> list[str]:
    """What the arguments do not say, and what Megatron's script does whatever they say."""
    said = ["no argument says that it is a LLaVA: examples/multimodal/train.py loads it"]
    if config.tile_tags is not None:
        said.append("tile tags are made of words by Megatron's tokenizer: it must be this model's, with its format")
    vision, text = config.vision_config, config.text_config
    if vision.vision_model_type == "internvit" and vision.kv_channels != text.kv_channels:
        said.append(
            f"InternViT's heads have {vision.kv_channels} channels, and Megatron gives them the language model's "
            f"{text.kv_channels}: set kv_channels in get_vision_model_config"
        )
    return said


def remarks(args: Args, config: Any) -> list[str]:
    """What whoever loads the checkpoint with Megatron's script has to know, a sentence each."""
    name = args["language_model_type"]
    said = ["the script asks its tokenizer for <image>: --special-tokens '<image>' adds it"]
    if not args.get("tokenizer_prompt_format"):
        said.append("the prompts are for you to name: --tokenizer-prompt-format")
    if other := differing(name, config):
        where = "examples/multimodal/config.py has other widths for these types, set them there"
        said.append(f"{where}: {', '.join(other)}")
    if args["pipeline_model_parallel_size"] > 1:
        said.append("the image encoder is on the first stage alone: give LLaVAModel add_encoder=pre_process")
    return said


def refuse_untold(config: Any, args: Args) -> None:
    """Refuses to make a model without the tags of its tiles, which only a tokenizer tells."""
    if args.get("use_tile_tags") and config.tile_tags is None:
        what = "the model was trained with tags in front of tiles, which the tokenizer makes tokens of"
        raise refuse(what, "args.use_tile_tags", "give --tokenizer DIR with the tokenizer that it was trained with")
