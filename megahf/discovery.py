"""What no argument records, read off the names and shapes of the weights; and said."""

from __future__ import annotations

from collections.abc import Iterator

from .checkpoint import Checkpoint
from .cuts import Config
from .layouts import Grid
from .recognition import recognise

NO_ROUTER_BIAS = "there is no router.bias: Megatron before 0.15 had none, and none is added"
MIXER = "decoder.layers.{l}.mixer"
CONVOLUTION, OUT, D = f"{MIXER}.conv1d.weight", f"{MIXER}.out_proj.weight", f"{MIXER}.D"
GATED_NORM, X_PROJ, DT_PROJ = f"{MIXER}.norm.weight", f"{MIXER}.x_proj.weight", f"{MIXER}.dt_proj.weight"
CONVOLUTION_BIAS = f"{MIXER}.conv1d.bias"
ROUTER_BIAS = "decoder.layers.{l}.mlp.router.bias"
QK_NORM = "decoder.layers.{l}.self_attention.q_layernorm.weight"

Shape = tuple[int, ...]


def shapes_of(checkpoint: Checkpoint) -> dict[str, Shape]:
    """The name of each row that is stored, and the shape of one array of it: a rank's, in `torch` checkpoints."""
    return dict(found(checkpoint))


def found(checkpoint: Checkpoint) -> Iterator[tuple[str, Shape]]:
    for holding in checkpoint.holdings:
        for key, (shape, _) in holding.shapes.items():
            yield from ((one.row.name, shape) for one in recognise(key))


def has_mixers(shapes: dict[str, Shape]) -> bool:
    return OUT in shapes


def discover(config: Config, shapes: dict[str, Shape], ranks: Grid, sharded: bool) -> list[str]:
    """Settles in `config` what only the weights tell; gives what is worth saying.

    Args:
        sharded: whether `shapes` are those of one tensor-parallel rank.
    """
    said = []
    if config.moe_router_bias and ROUTER_BIAS not in shapes:
        config.moe_router_bias = False
        said.append(NO_ROUTER_BIAS)
    if getattr(config, "hybrid_layer_pattern", None) is not None:
        said += discover_hybrid(config, shapes, ranks.tensor if sharded else 1)
    return said


def discover_hybrid(config: Config, shapes: dict[str, Shape], ranks: int) -> list[str]:
    """The sizes of the mixers, which are parameters of a spec and in no argument."""
    said = []
    if config.qk_layernorm and "*" in config.hybrid_layer_pattern and QK_NORM not in shapes:
        config.qk_layernorm = False
        said.append("there are no q and k norms: Megatron before 0.17 ignored --qk-layernorm in hybrids")
    if OUT not in shapes or CONVOLUTION not in shapes:
        return said
    width = shapes[OUT][1] * ranks
    config.mamba_d_conv = shapes[CONVOLUTION][-1]
    config.mamba_conv_bias = CONVOLUTION_BIAS in shapes
    if width % config.hidden_size == 0:
        config.mamba_expand = width // config.hidden_size
    if X_PROJ in shapes:
        config.mamba_version, config.mamba_dt_rank = 1, shapes[DT_PROJ][1]
        config.mamba_state_dim = (shapes[X_PROJ][0] - config.mamba_dt_rank) // 2
        return [*said, f"Mamba-1 mixers: {width} channels, time steps of rank {config.mamba_dt_rank}"]
    config.mamba_num_heads = config.mamba_num_heads or width // config.mamba_head_dim
    config.mamba_d_has_hdim = shapes[D][0] * ranks != config.mamba_num_heads if D in shapes else False
    config.mamba_rmsnorm = GATED_NORM in shapes
    skip = ", D for each channel" if config.mamba_d_has_hdim else ""
    norm = "" if config.mamba_rmsnorm else ", no gated norm"
    return [*said, f"from the weights: mixers of {width} channels, convolution over {config.mamba_d_conv}{skip}{norm}"]
