"""The `args` of a Megatron run: all of its 847 attributes, from the few that a model names."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Mapping
from functools import cache
from importlib import import_module, resources
from typing import Any

from megahf.errors import refuse
from megahf.judge import hybrid

RENAMED = {"norm_epsilon": "layernorm_epsilon", "apply_layernorm_1p": "layernorm_zero_centered_gamma"}


@cache
def defaults() -> dict[str, Any]:
    """Every argument of Megatron-LM's main (August 2026) with its default; None where a run has to say it.

    Made by its own `parse_args` and `validate_args`. Dtypes and enums are their full names (`torch.float32`).
    """
    text = resources.files("megahf").joinpath("arguments.json").read_text(encoding="utf-8")
    values: dict[str, Any] = json.loads(text)
    return values


def namespace(arguments: Mapping[str, Any]) -> Namespace:
    """`arguments` over the defaults, with what Megatron's `validate_args` derives from them.

    Raises:
        Refused: a name that no Megatron argument has.
    """
    unknown = sorted(set(arguments) - set(defaults()) - set(hybrid.BEFORE))
    if unknown:
        raise refuse(f"not an argument of Megatron's: {', '.join(unknown)}", "", "see megahf/arguments.json")
    args = Namespace(**{name: decoded(value) for name, value in {**defaults(), **arguments}.items()})
    derive_sizes(args)
    derive_run(args)
    hybrid.derive(args)
    return args


def recovered(stored: Mapping[str, Any]) -> dict[str, Any]:
    """What `namespace` takes of a stored Namespace: names of older Megatrons as they are now, foreign ones left out."""
    renamed = {RENAMED.get(name, name): value for name, value in stored.items()}
    return {name: value for name, value in renamed.items() if name in defaults() or name in hybrid.BEFORE}


def decoded(value: object) -> object:
    """A dtype or an enum from its full name, as a real Namespace holds it; None if this Megatron has no such enum."""
    if not isinstance(value, str) or not value.startswith(("torch.", "megatron.", "signal.")):
        return value
    owner, _, name = value.rpartition(".")
    module, _, holder = owner.rpartition(".") if "." in owner else (owner, "", "")
    found: Any = import_module(module)
    return getattr(getattr(found, holder, None) if holder else found, name, None)


def derive_sizes(args: Namespace) -> None:
    """Sizes that follow from other sizes where they are not given."""
    if args.ffn_hidden_size is None:
        # two thirds for three matrices instead of two, to a multiple of 64: Megatron's rule
        args.ffn_hidden_size = int(4 * args.hidden_size * 2 / 3 / 64) * 64 if args.swiglu else 4 * args.hidden_size
    if args.kv_channels is None:
        args.kv_channels = args.hidden_size // args.num_attention_heads
    if args.padded_vocab_size is None:
        step = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
        args.padded_vocab_size = math.ceil(args.vocab_size / step) * step
    args.num_experts = args.num_experts or None
    if args.num_experts and args.moe_ffn_hidden_size is None:
        args.moe_ffn_hidden_size = args.ffn_hidden_size
    args.encoder_num_layers, args.encoder_seq_length = args.num_layers, args.seq_length


def derive_run(args: Namespace) -> None:
    """Switches that follow from other switches, and the world this layout needs."""
    import torch

    args.params_dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    args.position_embedding_type = "rope" if args.use_rotary_position_embeddings else args.position_embedding_type
    args.bias_gelu_fusion = args.bias_gelu_fusion and args.add_bias_linear
    args.add_qkv_bias = args.add_qkv_bias or args.add_bias_linear
    args.attention_softmax_in_fp32 = args.attention_softmax_in_fp32 or args.apply_query_key_layer_scaling
    args.apply_rope_fusion = args.apply_rope_fusion and args.position_embedding_type == "rope"
    if args.num_virtual_stages_per_pipeline_rank is not None:
        args.virtual_pipeline_model_parallel_size = args.num_virtual_stages_per_pipeline_rank
    tensor, pipeline = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    args.expert_tensor_parallel_size = args.expert_tensor_parallel_size or tensor
    args.sequence_parallel = args.sequence_parallel or (bool(args.num_experts) and tensor > 1)  # asked for in training
    args.tensor_parallel_num_weight_shards = tensor
    args.expert_tensor_parallel_num_weight_shards = args.expert_tensor_parallel_size
    args.transformer_pipeline_model_parallel_size = pipeline
    args.data_parallel_size = data_parallel_size(vars(args))
    args.world_size = tensor * pipeline * args.data_parallel_size
    args.micro_batch_size = args.micro_batch_size or 1
    args.global_batch_size = args.global_batch_size or args.micro_batch_size * args.data_parallel_size


def data_parallel_size(arguments: Mapping[str, Any]) -> int:
    """The smallest number of data-parallel ranks, from that in `arguments` on, that the experts' groups fit into.

    In each stage, tensor x data ranks are also expert tensor x expert x (a rest of) data ranks.
    """
    tensor = arguments["tensor_model_parallel_size"]
    experts = arguments["expert_model_parallel_size"] * (arguments["expert_tensor_parallel_size"] or tensor)
    step = math.lcm(tensor, experts) // tensor
    return math.ceil(arguments["data_parallel_size"] / step) * step


def plain(args: Namespace) -> dict[str, Any]:
    """The Namespace as a dict of plain values; dtypes and enums as text."""
    kept = (int, float, str, bool, list, tuple, type(None))  # exactly: an enum may be an int as well
    return {name: value if type(value) in kept else str(value) for name, value in vars(args).items()}
