"""From `args` to real MambaModels, the way `mamba_builder` of Megatron 0.16.1 builds them.

Main has renamed the class and its arguments and cannot run on 0.16.1; of main here are what it stores: its `args`, its
names of the convolution's weights, its stages by `|`. What computes, shards and saves is 0.16.1 all the same.

Args of a hybrid by version: until 0.16 `hybrid_override_pattern` (or the two ratios, or nothing for pure Mamba); from
0.17 on `hybrid_layer_pattern`, in which `|` ends a stage and `+` is latent attention. `spec` is there always.
"""

from __future__ import annotations

import copy
import math
import re
from argparse import Namespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from megahf.bert import LOCAL_SPEC

if TYPE_CHECKING:
    import torch
    from megatron.core.models.mamba import MambaModel
    from megatron.core.transformer import TransformerConfig
    from torch import Tensor

BEFORE = ("hybrid_attention_ratio", "hybrid_mlp_ratio")  # arguments of 0.16.1 that main no longer has
MEGATRON = ["megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"]
MAIN = ["megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"]

# Specs of one's own, as `--spec` names them: arguments of the mixer that no option of Megatron's reaches. They heed
# `--qk-layernorm`, as main does; 0.16.1's spec, and the first one as its equal without Transformer Engine, does not.
UNFUSED = "unfused_stack_spec"
OWN: dict[str, dict[str, Any]] = {
    UNFUSED: {},
    "own_stack_spec": {},
    "channel_stack_spec": {"D_has_hdim": True},
    "ungated_norm_stack_spec": {"rmsnorm": False},
    "short_stack_spec": {"d_conv": 3},
    "bare_stack_spec": {"rmsnorm": False, "D_has_hdim": True},
    "wide_stack_spec": {"expand": 3},
}


def is_hybrid(args: Namespace) -> bool:
    """`--spec` makes a hybrid: `mamba_builder` asks for it; of other models here only BERT has one, of one word."""
    return args.spec not in (None, LOCAL_SPEC)


def own_spec(name: str) -> list[str]:
    """What `--spec` is for a key of `OWN`."""
    return [__name__, name]


def derive(args: Namespace) -> None:
    """What follows from a hybrid's arguments, and no attribute that its version of Megatron does not have."""
    if not is_hybrid(args):
        return
    if args.transformer_impl == "local" and args.spec in (MEGATRON, MAIN):  # which are for Transformer Engine alone
        args.spec = own_spec(UNFUSED if args.spec == MEGATRON else "own_stack_spec")
    if args.hybrid_layer_pattern is None:
        as_before(args)
        return
    args.is_hybrid_model = False  # a field of the config alone since then, which the builder sets
    stages = args.hybrid_layer_pattern.split("|")
    args.num_layers = sum(map(len, stages))
    args.multi_latent_attention = args.multi_latent_attention or "+" in args.hybrid_layer_pattern
    virtual = len(stages) // args.pipeline_model_parallel_size
    args.virtual_pipeline_model_parallel_size = virtual if args.pipeline_model_parallel_size > 1 < virtual else None


def as_before(args: Namespace) -> None:
    """Without the argument that 0.16.1 does not have yet, with those it still has."""
    del args.hybrid_layer_pattern
    for name in BEFORE:
        setattr(args, name, getattr(args, name, 0.0))


def layers(args: Namespace) -> str:
    """A symbol a layer, as 0.16.1 knows them: `M * - E`."""
    from megatron.core.ssm.mamba_hybrid_layer_allocation import allocate_layers

    pattern = getattr(args, "hybrid_layer_pattern", None)
    if pattern is not None:
        return str(pattern).replace("|", "").replace("+", "*")
    ratios = (getattr(args, name) for name in BEFORE)
    return "".join(allocate_layers(args.num_layers, *ratios, args.hybrid_override_pattern))


def layout(args: Namespace) -> dict[str, str]:
    """For stages by `|`: the config field that tells 0.16.1's attention and MLP layers of the same stages."""
    pattern = getattr(args, "hybrid_layer_pattern", None)
    if not is_hybrid(args) or pattern is None or "|" not in pattern or args.pipeline_model_parallel_size == 1:
        return {}
    return {"pipeline_model_parallel_layout": "E" + re.sub(r"[^|]", "t", pattern) + "L"}


def chunk(args: Namespace, made: TransformerConfig, first: bool, last: bool, stage: int | None) -> MambaModel:
    """`mamba_builder` of 0.16.1."""
    from megatron.core.models.mamba import MambaModel
    from megatron.core.ssm.mamba_block import MambaStack
    from megatron.core.transformer.enums import LayerType

    def select(stack: MambaStack, types: list[str]) -> tuple[int, list[str]]:  # as main cuts at `|`
        where = {"layer_type": LayerType.decoder, "vp_stage": stage}
        offset = made.pipeline_model_parallel_layout.get_layer_offset(**where)
        return offset, types[offset:][: made.pipeline_model_parallel_layout.get_num_layers_to_build(**where)]

    chosen = select if made.pipeline_model_parallel_layout else MambaStack._select_layers_for_pipeline_parallel
    rotary = args.position_embedding_type == "rope" and made.multi_latent_attention  # which turns its own channels
    with patch.object(MambaStack, "_select_layers_for_pipeline_parallel", chosen):
        return MambaModel(
            config=made,
            mamba_stack_spec=stack_spec(args, made, stage),
            vocab_size=args.padded_vocab_size,
            max_sequence_length=args.max_position_embeddings,
            hybrid_override_pattern=layers(args),
            pre_process=first,
            post_process=last,
            parallel_output=True,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type="none" if rotary else args.position_embedding_type,
            rotary_percent=args.rotary_percent,
            rotary_base=args.rotary_base,
        )


def stack_spec(args: Namespace, made: TransformerConfig, stage: int | None) -> Any:
    """What `--spec` names; every layer is told its virtual stage, of which 0.16.1's hybrids know nothing."""
    from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
    from megatron.core.transformer import TransformerLayer

    spec = copy.deepcopy(mamba_stack_spec)
    if args.spec != MEGATRON:
        make_own(spec.submodules, args, made)
    if stage is not None:
        for layer in (spec.submodules.attention_layer, spec.submodules.mlp_layer, spec.submodules.moe_layer):
            layer.params = {"vp_stage": stage}
        spec.submodules.mlp_layer.module = TransformerLayer  # its subclass takes no virtual stage
    return spec


def make_own(spec: Any, args: Namespace, made: TransformerConfig) -> None:
    """The layers that GPT has, from its specs; for the local ones the norm of the Mamba layer on its own as well."""
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    chosen = {
        "qk_layernorm": made.qk_layernorm and args.spec[1] != UNFUSED,
        "multi_latent_attention": made.multi_latent_attention,
    }
    if args.transformer_impl == "local":
        given: dict[str, Any] = {"normalization": made.normalization}
        of_layer = gpt_layer_specs.get_gpt_layer_local_spec
        # Megatron's Mamba layer gives its norm no epsilon; here it is told, to compare with the fused one
        norm = ModuleSpec(module=WrappedTorchNorm, params={"eps": made.layernorm_epsilon})
        spec.mamba_layer.submodules.norm = norm
        inner = spec.mamba_layer.submodules.mixer.submodules
        inner.in_proj, inner.out_proj = ColumnParallelLinear, RowParallelLinear
    else:
        given, of_layer = {}, gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec
    spec.mamba_layer.submodules.mixer.params = OWN.get(args.spec[1], {})
    dense, experts = (
        of_layer(**given, **chosen, num_experts=count, moe_grouped_gemm=made.moe_grouped_gemm).submodules
        for count in (None, made.num_moe_experts or 1)
    )
    attention, mlp, moe = (each.submodules for each in (spec.attention_layer, spec.mlp_layer, spec.moe_layer))
    attention.input_layernorm, attention.self_attention = dense.input_layernorm, dense.self_attention
    mlp.pre_mlp_layernorm, mlp.mlp = dense.pre_mlp_layernorm, dense.mlp
    moe.pre_mlp_layernorm, moe.mlp = experts.pre_mlp_layernorm, experts.mlp


def as_main(args: Namespace) -> None:
    """Turns `args` into what main stores of the same model."""
    if not is_hybrid(args):
        return
    args.spec = MAIN if args.spec == MEGATRON else args.spec
    args.is_hybrid_model = False
    if not hasattr(args, "hybrid_layer_pattern"):
        args.hybrid_layer_pattern, args.hybrid_override_pattern = layers(args), None
        for name in BEFORE:
            delattr(args, name)


def as_main_names(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict with the convolution's weights as 0.19 and main name them: parameters of the mixer itself."""
    convolution = re.compile(r"\.mixer\.conv1d\.(weight|bias)$")
    return type(state)((convolution.sub(r".mixer.conv1d_\1", name), value) for name, value in state.items())


# A mixer's own weights, and between what they are drawn.
DRAWN = {"A_log": (math.log(0.5), math.log(4)), "dt_bias": (-4.0, 0.0), "D": (0.3, 1.7)}
CONVOLUTION = ("conv1d.weight", "conv1d.bias")


def draw(weights: dict[str, Tensor], generator: torch.Generator) -> None:
    """The mixers' own weights again, in ranges where a state neither dies nor explodes.

    Steps around 0.02 to 0.7 where the input adds nothing, A of 0.5 to 4: a state keeps 0.06 to 0.99 of itself a token.
    """

    import torch

    def uniform(like: Tensor, low: float, high: float) -> Tensor:
        return torch.rand(like.shape, generator=generator) * (high - low) + low

    for name, weight in weights.items():
        own = name.rpartition("mixer.")[2]
        if own in DRAWN:
            weight.data.copy_(uniform(weight, *DRAWN[own]))
        elif own in CONVOLUTION:
            weight.data.mul_(0.5)
