"""Layers of image encoders and of projections, as Megatron's examples/multimodal define them on core's own classes.

After layer_specs.py, layer_scaling.py, nvlm/internvit.py and radio/radio_g.py, which are in no package; imported in
workers alone. Of 0.16.1 they need two words more: its specs take no partial functions.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import (
    TEColumnParallelLinear,
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TERowParallelLinear,
)
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

HEADS = 25  # of InternViT-6B; its others are dummies of zeros


class LayerScalingTransformerLayer(TransformerLayer):
    """A layer that scales what attention and MLP add, channel by channel."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ls1 = nn.Parameter(torch.ones(self.config.hidden_size))
        self.ls2 = nn.Parameter(torch.ones(self.config.hidden_size))
        self.self_attn_bda: Any = partial(self.self_attn_bda, self.ls1)
        self.mlp_bda: Any = partial(self.mlp_bda, self.ls2)


def get_bias_dropout_add_layer_scaling(scale: Tensor, training: bool, fused: bool) -> Any:
    """`residual + (x + bias) * scale`; nothing is dropped here."""
    if fused:
        raise ValueError("fused bias-dropout-add is not implemented for layer scaling")

    def add(x_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, probability: float) -> Tensor:
        x, bias = x_with_bias
        return residual + (x if bias is None else x + bias) * scale

    return add


class InternViTRMSNorm(MegatronModule):
    """RMSNorm; over the true heads of all ranks together where it is one of queries or keys (`compute_var`)."""

    def __init__(
        self,
        config: Any,
        hidden_size: int,
        eps: float = 1e-6,
        sequence_parallel: bool = False,
        compute_var: bool = False,
    ) -> None:
        super().__init__(config=config)
        self.eps, self.compute_var = eps, compute_var
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        """`[s, b, h]`, or `[s, b, heads of this rank, d]`."""
        if not self.compute_var:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight
        width = x.shape[-1]
        flat = x.reshape(x.size(0), x.size(1), -1)  # [s, b, heads * d]
        variance = self.gather_var(flat.pow(2), width) / self.config.hidden_size
        normed = flat * torch.rsqrt(variance + self.eps) * self.weight
        return normed.reshape(x.size(0), x.size(1), -1, width)

    def gather_var(self, squares: Tensor, width: int) -> Tensor:
        """The sum `[s, b, 1]` over all ranks' heads that are no dummies."""
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        rank = parallel_state.get_tensor_model_parallel_rank()
        heads = self.config.num_attention_heads // ranks
        valid_ranks, residual = (HEADS - 1) // heads, HEADS % heads or heads
        if rank < valid_ranks:
            own = squares.sum(-1, keepdim=True)
        elif rank == valid_ranks:  # the one that may have dummies beside true heads
            own = squares[..., : width * residual].sum(-1, keepdim=True)
        else:
            own = squares.sum(-1, keepdim=True) * 0.0
        every = [torch.empty_like(own) for _ in range(ranks)]
        every[rank] = own
        torch.distributed.all_gather(every, own, group=parallel_state.get_tensor_model_parallel_group())
        return torch.cat(every, dim=-1).sum(-1, keepdim=True)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """Norms of queries and keys are cut over the ranks."""
        if "q_layernorm" in prefix or "k_layernorm" in prefix:
            state = self.state_dict(prefix="", keep_vars=True)
            return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)
        return super().sharded_state_dict(prefix, sharded_offsets, metadata)


class InternViTSelfAttention(SelfAttention):
    """Self-attention without a bias of queries, keys and values, and with norms over all heads of them."""

    def __init__(self, config: Any, submodules: SelfAttentionSubmodules, *args: Any, **kwargs: Any) -> None:
        super().__init__(config=config, submodules=submodules, *args, **kwargs)  # noqa: B026
        self.linear_qkv = submodules.linear_qkv(
            self.config.hidden_size,
            self.query_projection_size + 2 * self.kv_projection_size,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="qkv",
            tp_group=self.pg_collection.tp,
        )
        size = self.hidden_size_per_attention_head * self.num_attention_heads_per_partition
        for name in ("q_layernorm", "k_layernorm"):
            norm = InternViTRMSNorm(config, size, self.config.layernorm_epsilon, compute_var=True)
            setattr(self, name, norm)


def layer_spec(vision_model_type: str, engine: bool) -> ModuleSpec:
    """A layer of the encoder, without a mask (core's own local spec of a ViT has a causal one)."""
    if vision_model_type == "internvit":
        return plain_norms(InternViTRMSNorm, InternViTSelfAttention, InternViTRMSNorm, engine)
    if vision_model_type == "internvit300M":
        return plain_norms(WrappedTorchNorm, SelfAttention, None, engine)
    scaled = vision_model_type == "radio-g"
    if not engine:
        return plain_norms(WrappedTorchNorm, SelfAttention, IdentityOp, engine, scaled)
    return ModuleSpec(
        module=LayerScalingTransformerLayer if scaled else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=attention(SelfAttention, IdentityOp, TELayerNormColumnParallelLinear, engine),
            self_attn_bda=get_bias_dropout_add_layer_scaling if scaled else get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp,
            mlp=ModuleSpec(module=MLP, submodules=mlp(engine, norm=True)),
            mlp_bda=get_bias_dropout_add_layer_scaling if scaled else get_bias_dropout_add,
        ),
    )


def plain_norms(norm: Any, attends: Any, qk_norm: Any, engine: bool, scaled: bool = True) -> ModuleSpec:
    """A layer whose norms are modules of their own."""
    column = TEColumnParallelLinear if engine else ColumnParallelLinear
    return ModuleSpec(
        module=LayerScalingTransformerLayer if scaled else TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=attention(attends, qk_norm, column, engine),
            self_attn_bda=get_bias_dropout_add_layer_scaling if scaled else get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(module=MLP, submodules=mlp(engine, norm=False)),
            mlp_bda=get_bias_dropout_add_layer_scaling if scaled else get_bias_dropout_add,
        ),
    )


def attention(attends: Any, qk_norm: Any, column: Any, engine: bool) -> ModuleSpec:
    return ModuleSpec(
        module=attends,
        params={"attn_mask_type": AttnMaskType.no_mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=column,
            core_attention=TEDotProductAttention if engine else DotProductAttention,
            linear_proj=TERowParallelLinear if engine else RowParallelLinear,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )


def mlp(engine: bool, norm: bool) -> MLPSubmodules:
    """The two matrices of an MLP or of a projection; with a norm they are Transformer Engine's in any case."""
    if norm:
        return MLPSubmodules(linear_fc1=TELayerNormColumnParallelLinear, linear_fc2=TERowParallelLinear)
    if engine:
        return MLPSubmodules(linear_fc1=TEColumnParallelLinear, linear_fc2=TERowParallelLinear)
    return MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)


def language_spec(engine: bool) -> ModuleSpec:
    """A layer of a GPT without experts, as layer_specs.py has it: no norms of queries and keys in any case."""
    spec = layer_spec("clip", engine)
    spec.submodules.self_attention.params = {"attn_mask_type": AttnMaskType.causal}
    return spec
