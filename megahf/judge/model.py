"""From `args` to real GPTModels and their logits, the way Megatron-LM's main builds and runs them.

The quirks are Megatron's and kept: `rope_scaling_factor` never reaches the model (its 8 does), gelu is the tanh one
exactly where `bias_gelu_fusion` is on, `num_query_groups` counts only with `group_query_attention`.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megahf.judge import bert, hybrid, llava, transformer_engine
from megahf.judge.multimodal import is_llava

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig

# `config._apply_yarn_config_from_args` of Megatron's main: the config's name, the argument's, what stands for None.
YARN = (
    ("yarn_rotary_scaling_factor", "rotary_scaling_factor", 1.0),
    ("yarn_original_max_position_embeddings", "yarn_original_max_position_embeddings", 4096),
    ("yarn_beta_fast", "yarn_beta_fast", 32.0),
    ("yarn_beta_slow", "yarn_beta_slow", 1.0),
    ("yarn_mscale", "mscale", 1.0),
    ("yarn_mscale_all_dim", "mscale_all_dim", 0.0),
    ("yarn_correction_range_round_to_int", "yarn_correction_range_round_to_int", True),
)

# What a CPU cannot run as configured: CUDA kernels of the same mathematics, dropout, sixteen-bit weights (the reference
# is computed in fp32 from weights that a sixteen-bit file holds exactly), overlap of communication.
ON_CPU: dict[str, Any] = {
    "params_dtype": torch.float32,
    "pipeline_dtype": torch.float32,
    "bf16": False,
    "fp16": False,
    "use_cpu_initialization": True,
    "persist_layer_norm": False,
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "gradient_accumulation_fusion": False,
    "sequence_parallel": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}


def config(args: Namespace) -> TransformerConfig:
    """`core_transformer_config_from_args` for the fields that this Megatron-core has."""
    from megatron.core.activations import squared_relu
    from megatron.core.fusions.fused_bias_geglu import quick_gelu
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    made_of = MLATransformerConfig if args.multi_latent_attention else TransformerConfig
    fields = {field.name for field in dataclasses.fields(made_of)}
    given = {name: value for name, value in vars(args).items() if name in fields}
    given |= {
        "deallocate_pipeline_outputs": True,
        "batch_p2p_comm": not args.overlap_p2p_comm,
        "num_moe_experts": args.num_experts,
        "num_layers_in_first_pipeline_stage": args.decoder_first_pipeline_num_layers,
        "num_layers_in_last_pipeline_stage": args.decoder_last_pipeline_num_layers,
        "num_query_groups": args.num_query_groups if args.group_query_attention else None,
        "bias_activation_fusion": args.bias_swiglu_fusion if args.swiglu else args.bias_gelu_fusion,
        "cp_comm_type": args.cp_comm_type[0],
    }
    if args.swiglu:
        given |= {"activation_func": F.silu, "gated_linear_unit": True}
    elif args.squared_relu:
        given["activation_func"] = squared_relu
    elif args.quick_geglu:
        given |= {"activation_func": quick_gelu, "gated_linear_unit": True}
    if args.rope_type is None:
        given.pop("rope_type", None)  # the config's own default, which is YaRN, holds
    made = made_of(**(given | ON_CPU | hybrid.layout(args)))
    if args.position_embedding_type == "yarn" and not args.multi_latent_attention:
        for name, argument, default in YARN:
            value = getattr(args, argument)
            setattr(made, name, default if value is None else value)
    return made


def chunks(args: Namespace) -> list[GPTModel]:
    """The model chunks of this rank, in evaluation mode; the process group must be started at args' layout."""
    from megatron.core import parallel_state

    made, rank = config(args), parallel_state.get_pipeline_model_parallel_rank()
    virtual = args.virtual_pipeline_model_parallel_size
    stages = range(virtual) if virtual else [None]
    last_rank, last_stage = args.pipeline_model_parallel_size - 1, stages[-1]
    return [
        chunk(args, made, (rank, stage) == (0, stages[0]), (rank, stage) == (last_rank, last_stage), stage).eval()
        for stage in stages
    ]


def chunk(args: Namespace, made: TransformerConfig, first: bool, last: bool, stage: int | None) -> GPTModel:
    """`gpt_builder` with `gpt_config_from_args` of Megatron's main."""
    from megatron.core.models.gpt import GPTModel

    if bert.is_bert(args):
        return bert.chunk(args, made, first, last, stage)
    if is_llava(args):
        return llava.chunk(args, made, first, last, stage)
    if hybrid.is_hybrid(args):
        return hybrid.chunk(args, made, first, last, stage)
    return GPTModel(
        config=made,
        transformer_layer_spec=layer_spec(args, made, stage),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=first,
        post_process=last,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        mtp_block_spec=mtp_spec(args, made, stage),
        vp_stage=stage,
    )


def layer_spec(args: Namespace, made: TransformerConfig, stage: int | None) -> Any:
    """Megatron's own spec of a layer, or of this chunk's layers where some have experts; and the final norm with it."""
    from megatron.core.models.gpt import gpt_layer_specs

    engine = args.transformer_impl == "transformer_engine"
    transformer_engine.choose_final_norm(engine)
    if args.num_experts:
        return gpt_layer_specs.get_gpt_decoder_block_spec(
            made, engine, normalization=args.normalization, qk_l2_norm=args.qk_l2_norm, vp_stage=stage
        )
    options = {
        "qk_layernorm": made.qk_layernorm,
        "qk_l2_norm": made.qk_l2_norm,
        "multi_latent_attention": made.multi_latent_attention,
    }
    if engine:
        return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(**options)
    return gpt_layer_specs.get_gpt_layer_local_spec(normalization=args.normalization, **options)


def mtp_spec(args: Namespace, made: TransformerConfig, stage: int | None) -> Any:
    """The heads for further tokens, of the kind of the last layer; None in chunks that have none."""
    from megatron.core.models.gpt import gpt_layer_specs

    if args.mtp_num_layers is None:
        return None
    engine = args.transformer_impl == "transformer_engine"
    layers: Any = gpt_layer_specs.get_gpt_decoder_layer_specs(made, engine, args.normalization, args.qk_l2_norm)
    return gpt_layer_specs.get_gpt_mtp_block_spec(made, layers[-1], engine, vp_stage=stage)


@torch.no_grad()
def logits(args: Namespace, models: list[GPTModel], input_ids: Tensor) -> Tensor | None:
    """Pipelined forward of `[b, s]` tokens: fp32 logits `[1 + heads, b, s, padded vocabulary]`, the next token's first.

    None but on the last stage. Heads are those for further tokens (MTP). Of BERT and LLaVA it is what `bert.logits` and
    `llava.logits` give.
    """
    if bert.is_bert(args):
        return bert.logits(args, models, input_ids)
    if is_llava(args):
        return llava.logits(args, models, input_ids)
    from megatron.core import parallel_state

    stages = args.pipeline_model_parallel_size
    rank = parallel_state.get_pipeline_model_parallel_rank()
    group = parallel_state.get_pipeline_model_parallel_group()
    ranks = torch.distributed.get_process_group_ranks(group)
    position_ids = positions(input_ids)
    hidden = torch.empty(input_ids.shape[1], input_ids.shape[0], args.hidden_size)  # [s, b, h]
    for step in range(stages * len(models)):
        turn, stage = divmod(step, stages)
        last = step == stages * len(models) - 1
        if stage == rank:
            model = models[turn]
            model.set_input_tensor(None if step == 0 else hidden)
            if last:
                return heads(model, input_ids, position_ids)
            hidden = model(input_ids, position_ids, None).contiguous()
        if stages > 1 and not last:
            torch.distributed.broadcast(hidden, ranks[stage], group=group)
    return None


def positions(input_ids: Tensor) -> Tensor:
    return torch.arange(input_ids.shape[1]).expand_as(input_ids).contiguous()


def heads(model: GPTModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """What the output layer gives: `[1 + heads, b, s, padded vocabulary]`, the next token's first.

    0.16.1 does not run a model with MTP without labels; with labels it returns losses alone, so the output layer is
    listened to. Labels change nothing before it, and after it the loss is computed in place. It sees the heads in
    order, then the decoder.
    """
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    heard: list[Tensor] = []
    hook = model.output_layer.register_forward_hook(lambda layer, inputs, output: heard.append(output[0].clone()))
    model(input_ids, position_ids, None, labels=input_ids if model.config.mtp_num_layers else None)
    hook.remove()
    together = torch.stack([heard[-1], *heard[:-1]]).transpose(1, 2)  # [1 + heads, b, s, vocabulary / T]
    return gather_from_tensor_model_parallel_region(together)
