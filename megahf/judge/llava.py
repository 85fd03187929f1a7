"""From `args` to real LLaVAModels, the way `model_provider` of Megatron's examples/multimodal/model.py builds them.

The tables are its `config.py`, without the widths: what a type makes of the base config. Everything else is inherited,
quirks included: CLIP has the language model's epsilon, a projection its norm; dense language models have no norms of
queries and keys; hybrids never share embeddings; every ViT has a bias in its linear layers.

Inputs are made of the tokens alone: an image token takes as many tiles as the token behind it says.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megahf.judge import hybrid, transformer_engine
from megahf.judge.multimodal import is_llava, sizes
from megahf.llava_arguments import ARGUMENTS, PROJECTION

if TYPE_CHECKING:
    from megatron.core.models.multimodal.llava_model import LLaVAModel
    from megatron.core.transformer import TransformerConfig

HYBRID, HYBRID_OF_MAIN = "nemotron5-hybrid", "nemotron6-moe"  # which 0.16.1 does not know by that name
# get_language_model_config: what a type says of the config, whatever the arguments do.
GATED: dict[str, Any] = {
    "activation_func": "silu",
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "apply_query_key_layer_scaling": False,
    "layernorm_zero_centered_gamma": False,
    "attention_softmax_in_fp32": True,
}
SQUARED: dict[str, Any] = {"activation_func": "squared_relu", "gated_linear_unit": False, "add_bias_linear": False}
QWEN = {**GATED, "add_qkv_bias": True}
MAMBA = {**GATED, **SQUARED}
LANGUAGE: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama3_8b", "llama3.1_8b", "llama3.1_70B", "llama3.2_1b"), GATED),
    **dict.fromkeys(("mistral_7b", "yi-34b", "llama_nemotron_8b"), GATED),
    **dict.fromkeys(("qwen2.0_72B", "qwen2.5_7B", "qwen2.5_72B"), QWEN),
    "nemotron5-8b": SQUARED,
    "nemotron5-hybrid-8b": MAMBA,
    "nemotron5-hybrid-56b": {**MAMBA, "mamba_state_dim": 256},
    HYBRID_OF_MAIN: {},
    "nemotron5-hybrid-12b": {**MAMBA, "mamba_state_dim": 128, "mamba_num_heads": 128, "mamba_head_dim": 80},
}
# get_vision_projection_config; a norm that is not named is the language model's.
GELU = {"activation_func": "gelu"}
NORMED = {**GELU, "normalization": "LayerNorm"}
BIASED = {**NORMED, "layernorm_epsilon": 1e-5, "add_bias_linear": True}
RELU = {"activation_func": "squared_relu"}
PROJECTIONS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("llama3_8b", "qwen2.5_7B"), GELU),
    **dict.fromkeys(("llama3.1_8b", "llama_nemotron_8b"), BIASED),
    **dict.fromkeys(("llama3.2_1b", "yi-34b", "qwen2.0_72B", "qwen2.5_72B"), NORMED),
    "mistral_7b": {**GELU, "normalization": None},
    HYBRID_OF_MAIN: {},
    **dict.fromkeys(("nemotron5-8b", "nemotron5-hybrid-8b", "nemotron5-hybrid-12b", "nemotron5-hybrid-56b"), RELU),
}


class Vision(NamedTuple):
    """get_vision_model_config, without the widths. An epsilon of None is the language model's."""

    activation_func: str
    normalization: str = "LayerNorm"
    layernorm_epsilon: float | None = 1e-6
    add_qkv_bias: bool = True
    gated_linear_unit: bool = False
    class_tokens: int = 1


VISION = {
    "clip": Vision("quick_gelu", layernorm_epsilon=None),
    "siglip": Vision("fast_gelu", class_tokens=0),
    "internvit": Vision("gelu", "RMSNorm", add_qkv_bias=False),
    "internvit300M": Vision("gelu"),
    "radio": Vision("fast_gelu", class_tokens=8),
    "radio-g": Vision("silu", gated_linear_unit=True, class_tokens=5),
    "cradio-g": Vision("fast_gelu", class_tokens=8),
}


def derive(args: Namespace) -> None:
    """What the script makes of its arguments before it builds; it stores them after."""
    if not is_llava(args):
        return
    if args.use_te is None:
        args.use_te = args.transformer_impl == "transformer_engine"
    args.seq_length = args.encoder_seq_length = places(args)  # the encoder's; `decoder_seq_length` is the text's
    args.max_position_embeddings = max(args.max_position_embeddings, args.decoder_seq_length)
    pattern = getattr(args, "hybrid_layer_pattern", "")
    if pattern is None:
        hybrid.as_before(args)
    elif pattern:
        args.num_layers, args.is_hybrid_model = len(pattern), False


def is_hybrid(args: Namespace) -> bool:
    return bool(args.language_model_type.startswith((HYBRID, HYBRID_OF_MAIN)))


def places(args: Any) -> int:
    """Embeddings a tile takes in the text, its tag included: Megatron's `img_seq_len`."""
    patches = (args.img_h // args.patch_dim) * (args.img_w // args.patch_dim)
    kept = 0 if args.disable_vision_class_token else VISION[args.vision_model_type].class_tokens
    tag = len(args.tile_tags[0]) if args.tile_tags else 0
    return (patches + kept) // (4 if args.pixel_shuffle else 1) + tag


def adapted(base: TransformerConfig, **changed: Any) -> TransformerConfig:
    """A copy with some fields changed, activations by name; no fusions, as the script has it."""
    from megatron.core.activations import fast_gelu, quick_gelu, squared_relu

    named = {"gelu": F.gelu, "silu": F.silu, "fast_gelu": fast_gelu, "quick_gelu": quick_gelu}
    named["squared_relu"] = squared_relu
    made = copy.deepcopy(base)
    made.bias_activation_fusion = made.bias_dropout_fusion = made.apply_rope_fusion = False
    for name, value in changed.items():
        setattr(made, name, named.get(value, value) if name == "activation_func" else value)
    return made


def language_config(args: Namespace, base: TransformerConfig) -> TransformerConfig:
    changed = LANGUAGE[args.language_model_type]
    made = adapted(base, **changed, ffn_hidden_size=args.language_ffn_hidden_size)
    made.language_model_type = HYBRID if is_hybrid(args) else args.language_model_type
    return made


def vision_config(args: Namespace, base: TransformerConfig) -> TransformerConfig:
    """For InternViT-6B with dummy heads, so that ranks can share them."""
    kind, ranks, heads = VISION[args.vision_model_type], args.tensor_model_parallel_size, args.vision_heads
    if args.vision_model_type == "internvit":
        heads = ((heads - 1) // ranks + 1) * ranks
    changed = {name: value for name, value in kind._asdict().items() if value is not None and name != "class_tokens"}
    return adapted(
        base,
        **changed,
        vision_model_type=args.vision_model_type,
        num_layers=args.vision_num_layers,
        hidden_size=args.vision_hidden_size,
        ffn_hidden_size=args.vision_ffn_hidden_size,
        num_attention_heads=heads,
        num_query_groups=heads,
        kv_channels=args.vision_kv_channels,
        add_bias_linear=True,
        layernorm_zero_centered_gamma=False,
        apply_query_key_layer_scaling=False,
        attention_softmax_in_fp32=True,
        pipeline_model_parallel_size=1,
    )


def projection_config(args: Namespace, base: TransformerConfig) -> TransformerConfig:
    changed = {"gated_linear_unit": False, "add_bias_linear": False, **PROJECTIONS[args.language_model_type]}
    return adapted(base, **changed, ffn_hidden_size=args.projection_ffn_hidden_size, pipeline_model_parallel_size=1)


def chunk(args: Namespace, base: TransformerConfig, first: bool, last: bool, stage: int | None) -> LLaVAModel:
    """`model_provider`, with the encoder and the projection on the first stage."""
    from megatron.core.models.multimodal.llava_model import LLaVAModel

    from megahf.judge import vision_layers

    language, vision, projection = (made(args, base) for made in (language_config, vision_config, projection_config))
    return LLaVAModel(
        language_transformer_config=language,
        language_transformer_layer_spec=language_spec(args, language, stage),
        language_vocab_size=args.padded_vocab_size,
        language_max_sequence_length=args.decoder_seq_length,
        vision_transformer_config=vision,
        vision_transformer_layer_spec=vision_layers.layer_spec(args.vision_model_type, args.use_te),
        drop_vision_class_token=args.disable_vision_class_token,
        vision_projection_config=projection,
        vision_projection_layer_spec=vision_layers.mlp(args.use_te, norm=bool(projection.normalization)),
        vision_projection_type=getattr(args, PROJECTION, None) or "mlp",
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        language_position_embedding_type=args.position_embedding_type,
        language_rotary_percent=args.rotary_percent,
        pre_process=first,
        post_process=last,
        add_encoder=first,
        add_decoder=True,
        img_h=args.img_h,
        img_w=args.img_w,
        patch_dim=args.patch_dim,
        language_rotary_base=args.rotary_base,
        language_rope_scaling=args.use_rope_scaling,
        hybrid_override_pattern=hybrid.layers(args) if is_hybrid(args) else None,
        hybrid_attention_ratio=0.0,
        hybrid_mlp_ratio=0.0,
        image_token_index=args.image_token_id,
        pixel_shuffle=args.pixel_shuffle,
        tile_tags=args.tile_tags,
        max_num_tiles=args.max_num_tiles,
        tokenizer_type=args.tokenizer_prompt_format,
        vp_stage=stage,
    )


def language_spec(args: Namespace, made: TransformerConfig, stage: int | None) -> Any:
    """The layers of the language model, and the final norm with them."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    from megahf.judge import vision_layers

    transformer_engine.choose_final_norm(args.use_te)
    if is_hybrid(args):
        own = hybrid.own_spec("own_stack_spec" if args.use_te else hybrid.UNFUSED)
        spec = hybrid.MEGATRON if args.use_te and not args.num_experts else own
        impl = "transformer_engine" if args.use_te else "local"
        return hybrid.stack_spec(Namespace(**{**vars(args), "spec": spec, "transformer_impl": impl}), made, stage)
    if args.num_experts:
        return get_gpt_decoder_block_spec(made, args.use_te, args.normalization, args.qk_l2_norm, vp_stage=stage)
    return vision_layers.language_spec(args.use_te)


def draw(weights: dict[str, Tensor]) -> None:
    """Patches of about the size that other activations have."""
    for name, weight in weights.items():
        if name.endswith("vision_model.conv1.weight"):
            weight.data.div_((weight[0].numel() / weight.shape[1]) ** 0.5)


def tokens(args: Namespace, generator: torch.Generator, images: list[list[int]], length: int = 10) -> Tensor:
    """Random tokens `[b, s]`, with an image token at the places `images` has for each row."""
    ids = torch.randint(1, args.vocab_size, (len(images), length), generator=generator)
    ids[ids == args.image_token_id] = 0
    for row, where in zip(ids, images, strict=True):
        row[where] = args.image_token_id
    return ids


def asked(arguments: dict[str, Any], config: Any) -> tuple[dict[str, Any], Tensor]:
    """A checkpoint's arguments with what they do not say of its model, and tokens to try them on.

    Args:
        config: the model's, as megahf reads it.
    """
    told = {**ARGUMENTS, **arguments, **sizes(config), "vocab_size": config.text_config.vocab_size}
    args = Namespace(**told)
    return told, tokens(args, torch.Generator().manual_seed(0), mixed(args))


def has_dummy_heads(arguments: dict[str, Any]) -> bool:
    """Whether other layouts than its own cannot load a checkpoint, as each needs heads of its own."""
    return bool(arguments["vision_model_type"] == "internvit" and arguments["tensor_model_parallel_size"] > 1)


def mixed(args: Namespace) -> list[list[int]]:
    """Places of images in rows: one, several in a row, none, the ends. With tile tags Megatron takes a single image."""
    return [[4]] if args.use_tile_tags else [[3], [1, 2, 6], [], [0, 9]]


def prompts(args: Namespace, generator: torch.Generator) -> dict[str, dict[str, Tensor]]:
    """Tokens on their own: with one image, with several in a row, and without."""
    rows: dict[str, list[list[int]]] = {"one image": [[5]], "several images": [[2, 3, 4]], "text": [[], []]}
    if args.use_tile_tags:
        del rows["several images"]
    return {name: {"input_ids": tokens(args, generator, images)} for name, images in rows.items()}


def tiles(args: Any, ids: Tensor) -> Tensor:
    """Tiles of each image `[images]`: one to three with tiling, as the token behind it says."""
    image = ids == args.image_token_id
    return 1 + ids.roll(-1, dims=1)[image] % 3 if args.use_tiling else torch.ones(int(image.sum()), dtype=torch.long)


def pixels(args: Any, count: int) -> Tensor:
    """`[tiles, 3, h, w]`, always the same ones."""
    return torch.randn(count, 3, args.img_h, args.img_w, generator=torch.Generator().manual_seed(11))


def expanded(args: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens with the image token once for each place an image takes, 0 behind the end; and the mask `[b, s']`."""
    counts, rows = iter((tiles(args, ids) * places(args)).tolist()), []
    for row in ids.tolist():
        every = [[token] * (next(counts) if token == args.image_token_id else 1) for token in row]
        rows.append(torch.tensor([token for each in every for token in each]))
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # [b, s']
    lengths = torch.tensor([len(row) for row in rows])
    return padded, (torch.arange(padded.shape[1]) < lengths[:, None]).long()


@torch.no_grad()
def logits(args: Namespace, models: list[LLaVAModel], ids: Tensor) -> Tensor | None:
    """Pipelined forward of tokens `[b, s]`: fp32 `[1, b, s', padded vocabulary]`, 0 at padding.

    None but on the last stage. With several stages Megatron pads to the language model's longest sequence.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    (model,), stages = models, args.pipeline_model_parallel_size
    rank = parallel_state.get_pipeline_model_parallel_rank()
    group = parallel_state.get_pipeline_model_parallel_group()
    ranks = torch.distributed.get_process_group_ranks(group)
    counts, (_, mask) = tiles(args, ids), expanded(args, ids)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    hidden = torch.empty(args.decoder_seq_length, ids.shape[0], args.hidden_size)  # [s, b, h]
    for stage in range(stages):
        if stage == rank:
            if stage == 0 and model.img_seq_len != places(args):  # other stages do not know RADIO's class tokens
                raise ArithmeticError(f"a tile takes {model.img_seq_len} places, not {places(args)}")
            model.set_input_tensor(None if stage == 0 else hidden)
            said, _ = model(pixels(args, int(counts.sum())), ids, positions, None, num_image_tiles=counts.int())
            if stage == stages - 1:
                whole = gather_from_tensor_model_parallel_region(said)[:, : mask.shape[1]]
                return (whole * mask[..., None])[None]
            hidden = said.contiguous()
        if stages > 1 and stage < stages - 1:
            torch.distributed.broadcast(hidden, ranks[stage], group=group)
    return None


@torch.no_grad()
def ours(model: Any, args: Any, ids: Tensor) -> Tensor:
    """What a model of megahf's says to tokens `[b, s]`, 0 at padding: `[b, s', V]`.

    Args:
        args: `img_h`, `img_w` and what else `tiles`, `pixels` and `expanded` ask; a Namespace of Megatron's.
    """
    counts, (padded, mask) = tiles(args, ids), expanded(args, ids)
    images = {"pixel_values": pixels(args, int(counts.sum()))} if len(counts) else {}
    if args.tile_tags and len(counts):
        images["num_tiles"] = counts
    return model(input_ids=padded, attention_mask=mask, **images).logits * mask[..., None]
