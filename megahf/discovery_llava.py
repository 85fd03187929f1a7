"""What no argument of a LLaVA records: the sizes of its encoder and projection, and what its types say otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .cuts import padded_heads
from .errors import Problems, refuse
from .layouts import Grid
from .models.vision_kinds import vision_kind
from .rows import PROJECTION, VISION, is_hybrid

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

ENCODER, AT = f"{VISION}.decoder.layers.{{l}}.", "self_attention"
QKV, PROJ, DOWN = (
    f"{ENCODER}{AT}.linear_qkv.weight",
    f"{ENCODER}{AT}.linear_proj.weight",
    f"{ENCODER}mlp.linear_fc2.weight",
)
CLASS = f"{VISION}.class_token"
FC1, FC2, AFFINE = (f"{PROJECTION}.encoder.{name}" for name in ("linear_fc1", "linear_fc2.weight", "weight"))
# Of the language model, as a model of its own.
LAYER = "decoder.layers.{l}."
TEXT_QKV_BIAS, TEXT_BIAS = f"{LAYER}{AT}.linear_qkv.bias", f"{LAYER}{AT}.linear_proj.bias"
TEXT_QK_NORM, TEXT_DOWN, OUTPUT = (
    f"{LAYER}{AT}.q_layernorm.weight",
    f"{LAYER}mlp.linear_fc2.weight",
    "output_layer.weight",
)
TEXT_PROJ, TEXT_DOWN_BIAS = f"{LAYER}{AT}.linear_proj.weight", f"{LAYER}mlp.linear_fc2.bias"


def discover_llava(config: Any, shapes: Shapes, ranks: Grid, sharded: bool) -> list[str]:
    """Settles in `config` what the weights of a LLaVA tell; gives what is worth saying.

    Args:
        shapes: as `discovery.shapes_of` gives them, and the number of the encoder's layers under its prefix.
        sharded: whether they are those of one tensor-parallel rank.

    Raises:
        Refused: an encoder that is not there, or is another than the arguments say.
    """
    encoder_ranks = (ranks.encoder or ranks.tensor) if sharded else 1
    check_there(shapes)
    see_encoder(config.vision_config, shapes, encoder_ranks, ranks.encoder or ranks.tensor)
    see_projection(config, shapes, encoder_ranks)
    return see_language(config, shapes, ranks.tensor if sharded else 1)


def check_there(shapes: Shapes) -> None:
    """Refuses a checkpoint without what tells the encoder's and the projection's sizes."""
    found = Problems()
    for name in (QKV, PROJ, DOWN):
        if name not in shapes:
            found.add("the image encoder is not in this checkpoint", name, "is the first pipeline stage missing?")
        elif len(shapes[name]) != 2:
            found.add(f"a weight of shape {list(shapes[name])}, which has 2 axes", name)
    mlp = [name for name in (f"{FC1}.weight", FC2) if name not in shapes]
    if mlp and AFFINE not in shapes:
        for name in mlp:
            found.add("the projection is not in this checkpoint", name, "is the first pipeline stage missing?")
    for name in (f"{FC1}.weight", FC2, AFFINE):
        if len(shapes.get(name, (1, 1))) != 2:
            found.add(f"a weight of shape {list(shapes[name])}, which has 2 axes", name)
    found.raise_if_any()


def see_encoder(vision: Any, shapes: Shapes, ranks: int, written_by: int) -> None:
    """The encoder's sizes.

    Args:
        ranks: that each hold a share of the shapes.
        written_by: tensor-parallel ranks of the run, by which InternViT-6B has dummy heads.
    """
    kind = vision_kind(vision.vision_model_type)
    vision.num_layers = shapes[ENCODER][0]
    vision.hidden_size = shapes[PROJ][0]
    vision.ffn_hidden_size = shapes[DOWN][1] * ranks
    channels = shapes[PROJ][1] * ranks
    if kind.num_attention_heads is not None:
        vision.num_attention_heads = kind.num_attention_heads
        vision.kv_channels, rest = divmod(channels, padded_heads(vision, written_by))
        what = f"{padded_heads(vision, written_by)} heads, as {written_by} tensor-parallel ranks have them"
    else:
        vision.num_attention_heads, rest = divmod(channels, vision.kv_channels)
        what = f"heads of {vision.kv_channels} channels"
    if rest or not channels:
        remedy = "are these the args of the run that wrote it?"
        raise refuse(f"{channels} channels of attention are not {what}: no {vision.vision_model_type}", PROJ, remedy)
    vision.num_query_groups = vision.num_attention_heads
    if kind.class_token_len and CLASS in shapes and len(shapes[CLASS]) > 1:
        vision.class_token_len = shapes[CLASS][-2]  # with fp8 Megatron has 16 or 32 of them


def see_projection(config: Any, shapes: Shapes, ranks: int) -> None:
    """The projection's kind, widths, biases and norm."""
    config.vision_projection_type = "affine" if AFFINE in shapes else "mlp"
    if AFFINE in shapes:
        config.projection_add_bias_linear = f"{PROJECTION}.encoder.bias" in shapes
        config.projection_normalization = None
        config.projection_ffn_hidden_size = 4 * config.text_config.hidden_size  # which it does not have
        return
    config.projection_ffn_hidden_size = shapes[FC2][1] * ranks
    config.projection_gated_linear_unit = shapes[f"{FC1}.weight"][0] == 2 * shapes[FC2][1]
    config.projection_add_bias_linear = f"{FC1}.bias" in shapes
    normed, shifted = (f"{FC1}.layer_norm_{kind}" in shapes for kind in ("weight", "bias"))
    config.projection_normalization = ("LayerNorm" if shifted else "RMSNorm") if normed else None


def see_language(config: Any, shapes: Shapes, ranks: int) -> list[str]:
    """What Megatron's script and its table of types make of the language model, whatever the arguments say."""
    text, said = config.text_config, []
    if TEXT_PROJ in shapes:
        text.add_qkv_bias = TEXT_QKV_BIAS in shapes
        if text.qk_layernorm and TEXT_QK_NORM not in shapes:
            text.qk_layernorm = False
            said.append("there are no q and k norms: Megatron's LLaVA is built without, whatever the args say")
    if TEXT_DOWN in shapes and len(shapes[TEXT_DOWN]) == 2:
        text.ffn_hidden_size = shapes[TEXT_DOWN][1] * ranks
        if not text.num_experts:
            text.moe_ffn_hidden_size = text.ffn_hidden_size  # nobody's, and Megatron wants it to be no other
    if text.tie_word_embeddings and is_hybrid(text) and OUTPUT in shapes:
        text.tie_word_embeddings = False
        said.append("the output layer is not the embedding, as the args say: Megatron's hybrids in LLaVA share none")
    config.tie_word_embeddings = text.tie_word_embeddings
    return said
