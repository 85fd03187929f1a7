"""What no argument records, read off the names and shapes of the weights; and said."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from . import bert, llava
from .checkpoint import Checkpoint
from .cuts import Config
from .discovery_llava import ENCODER as ENCODER_LAYERS
from .discovery_llava import discover_llava
from .errors import refuse
from .hybrid import pattern_of
from .layouts import Grid
from .recognition import recognise
from .rows import IMAGES, LANGUAGE, is_bert, is_hybrid, is_llava, language

NO_ROUTER_BIAS = "there is no router.bias: Megatron before 0.15 had none, and none is added"
DECODER, HEAD = "decoder.layers.{l}.", "mtp.layers.{k}.mtp_model_layer.layers.{l}."
ENCODER, POSITIONS = "encoder.layers.{l}.self_attention.linear_proj.weight", "embedding.position_embeddings.weight"
TYPES = "embedding.tokentype_embeddings.weight"
MIXER = f"{DECODER}mixer"
CONVOLUTION, OUT, D = f"{MIXER}.conv1d.weight", f"{MIXER}.out_proj.weight", f"{MIXER}.D"
GATED_NORM, X_PROJ, DT_PROJ = f"{MIXER}.norm.weight", f"{MIXER}.x_proj.weight", f"{MIXER}.dt_proj.weight"
CONVOLUTION_BIAS = f"{MIXER}.conv1d.bias"
UNFUSED = f"{DECODER}norm.weight"  # how a mixer's first norm is spelled outside Transformer Engine
ROUTER_BIAS = f"{DECODER}mlp.router.bias"
QK_NORM = f"{DECODER}self_attention.q_layernorm.weight"
AXES = {OUT: 2, CONVOLUTION: 3, D: 1, X_PROJ: 2, DT_PROJ: 2}

Shape = tuple[int, ...]


def shapes_of(checkpoint: Checkpoint) -> dict[str, Shape]:
    """The name and the spelling of each row that is stored, and the shape of one array of it.

    It is a rank's array, in `torch` checkpoints. A layer of a head for further tokens counts as one of the stack, and
    a LLaVA's language model as a model of its own.
    """
    shapes = dict(found(checkpoint))
    if llava.MARK in shapes:
        shapes[ENCODER_LAYERS] = (encoder_layers(checkpoint),)
    return shapes


def encoder_layers(checkpoint: Checkpoint) -> int:
    """Layers of the image encoder."""
    count = 0
    for holding in checkpoint.holdings:
        for key, (shape, _) in holding.shapes.items():
            for one in recognise(key):
                if one.row.stack == IMAGES:
                    count = max(count, shape[0] if one.stacked else (one.layer or 0) + 1)
    return count


def found(checkpoint: Checkpoint) -> Iterator[tuple[str, Shape]]:
    for holding in checkpoint.holdings:
        for key, (shape, _) in holding.shapes.items():
            for one in recognise(key):
                for name in (one.row.name, one.spelling.key):
                    name = name.removeprefix(f"{LANGUAGE}.").replace(HEAD, DECODER)
                    yield name, shape[1:] if one.stacked else shape
                if one.row.part:
                    yield llava.MARK, ()


def marked(args: Mapping[str, Any], shapes: dict[str, Shape]) -> Mapping[str, Any]:
    """`args`, and which model they are of, where they do not say and the weights do."""
    if llava.MARK in shapes:
        return {**args, llava.MARK: True}
    if OUT in shapes and pattern_of(args) is None:
        return {**args, "is_hybrid_model": True}  # Mamba alone, of a Megatron that did not note it
    return {**args, bert.MARK: True} if ENCODER in shapes else args


def has_mixers(shapes: dict[str, Shape]) -> bool:
    return OUT in shapes


def discover(
    config: Config, args: Mapping[str, Any], shapes: dict[str, Shape], ranks: Grid, sharded: bool
) -> list[str]:
    """Settles in `config` what only the weights tell; gives what is worth saying.

    Args:
        sharded: whether `shapes` are those of one tensor-parallel rank.

    Raises:
        Refused: mixers of no size, and what cannot be told.
    """
    if is_llava(config):
        said = discover_llava(config, shapes, ranks, sharded)
        return said + discover(language(config), llava.language(args), shapes, ranks, sharded)
    said = []
    if config.moe_router_bias and ROUTER_BIAS not in shapes:
        config.moe_router_bias = False
        said.append(NO_ROUTER_BIAS)
    if is_bert(config):
        said += discover_bert(config, shapes)
    if is_hybrid(config):
        said += discover_hybrid(config, shapes, ranks.tensor if sharded else 1)
        check_mixers(config, shapes, ranks)
        said += epsilon(config, args, shapes)
    return said


def discover_bert(config: Config, shapes: dict[str, Shape]) -> list[str]:
    """Positions and token types, which the script that builds the model chooses."""
    said, kind = [], config.position_embedding_type
    if POSITIONS in shapes and kind != "learned_absolute":
        said.append(f"positions are learned, as pretrain_bert.py builds them, though the args say {kind}")
        config.position_embedding_type = "learned_absolute"
    config.num_tokentypes = shapes[TYPES][0] if TYPES in shapes else 0
    return said


def discover_hybrid(config: Config, shapes: dict[str, Shape], ranks: int) -> list[str]:
    """The sizes of the mixers, which are parameters of a spec and in no argument."""
    said = []
    if config.qk_layernorm and "*" in config.hybrid_layer_pattern and QK_NORM not in shapes:
        config.qk_layernorm = False
        said.append("there are no q and k norms: Megatron before 0.17 ignored --qk-layernorm in hybrids")
    if OUT not in shapes or CONVOLUTION not in shapes:
        heads, rest = divmod(config.mamba_expand * config.hidden_size, config.mamba_head_dim)
        config.mamba_num_heads = config.mamba_num_heads or (None if rest else heads)  # as the model class has it
        return said
    for name, axes in AXES.items():
        if name in shapes and len(shapes[name]) != axes:
            raise refuse(f"a weight of shape {list(shapes[name])}, which has {axes} axes in a mixer", name)
    width = shapes[OUT][1] * ranks
    config.mamba_d_conv = shapes[CONVOLUTION][-1]
    config.mamba_conv_bias = CONVOLUTION_BIAS in shapes
    if width % config.hidden_size == 0:
        config.mamba_expand = width // config.hidden_size
    if X_PROJ in shapes and DT_PROJ in shapes:
        config.mamba_version, config.mamba_dt_rank = 1, shapes[DT_PROJ][1]
        config.mamba_state_dim = (shapes[X_PROJ][0] - config.mamba_dt_rank) // 2
        return [*said, f"Mamba-1 mixers: {width} channels, time steps of rank {config.mamba_dt_rank}"]
    config.mamba_num_heads = config.mamba_num_heads or width // config.mamba_head_dim
    config.mamba_d_has_hdim = shapes[D][0] * ranks != config.mamba_num_heads if D in shapes else False
    config.mamba_rmsnorm = GATED_NORM in shapes
    skip = ", D for each channel" if config.mamba_d_has_hdim else ""
    norm = "" if config.mamba_rmsnorm else ", no gated norm"
    return [*said, f"from the weights: mixers of {width} channels, convolution over {config.mamba_d_conv}{skip}{norm}"]


def check_mixers(config: Config, shapes: dict[str, Shape], ranks: Grid) -> None:
    """Refuses heads and groups that Megatron could not have shared out."""
    heads, groups = config.mamba_num_heads, config.mamba_num_groups
    if not has_mixers(shapes) or config.mamba_version == 1:
        return
    if not heads:
        raise refuse(f"mixers of no whole head of {config.mamba_head_dim} channels", "args.mamba_head_dim")
    for what, count in (("heads", heads), ("groups", groups)):
        if count % ranks.tensor:
            raise refuse(f"{count} Mamba {what} do not divide over {ranks.tensor} tensor-parallel ranks", "args")
    if heads % groups:
        raise refuse(f"{heads} Mamba heads cannot be shared out over {groups} groups", "args.mamba_num_groups")


def epsilon(config: Config, args: Mapping[str, Any], shapes: dict[str, Shape]) -> list[str]:
    """Megatron's MambaLayer told a norm of its own no epsilon until July 2026, so that it ran with torch's 1e-5."""
    if config.layernorm_epsilon == 1e-5 or UNFUSED not in shapes:
        return []
    said = (
        f"the mixers' norms are not fused: Megatron ran them with 1e-5 until July 2026, then {config.layernorm_epsilon}"
    )
    if args.get("hybrid_layer_pattern") is None:  # arguments of before 2026
        raise refuse(said, "args.layernorm_epsilon", "one epsilon for some norms and one for others is not built")
    return [f"{said}, which is taken"]
