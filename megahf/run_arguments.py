"""The arguments of the run that would have written a checkpoint: what Megatron's trainer stores in it as `args`.

Names and defaults are Megatron-LM's of 2026 (`arguments.json`); 0.16.1 takes them too, as it looks up by name what it
knows. Nothing in them is of a class that one of the two lacks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import bert, hybrid, llava
from .arguments import Args, Config, arguments_of, defaults, lost
from .checkpoint.opcodes import Global, Made
from .dtypes import BY_TORCH, SHORT
from .errors import Refused, refuse
from .grid_arguments import grid_arguments
from .rows import is_bert, is_hybrid, is_llava

if TYPE_CHECKING:
    from .target import Target

ATTENTION_BACKEND = "megatron.core.transformer.enums.AttnBackend"
# Members of enums, by their names in `arguments.json`; None: 0.16.1 has no such class, and could not load the file.
MEMBERS: dict[str, tuple[str, int] | None] = {
    f"{ATTENTION_BACKEND}.auto": (ATTENTION_BACKEND, 5),
    "signal.Signals.SIGTERM": ("signal.Signals", 15),
    "megatron.core.transformer.enums.InferenceCudaGraphScope.none": None,
}
# Whatever the source's run was: weights lie as they always did, without an optimizer and without random generators.
WRITTEN: dict[str, Any] = {
    "rank": 0, "local_rank": 0, "data_parallel_size": 1, "no_save_optim": True, "no_save_rng": True,
    "use_torch_fsdp2": False, "use_megatron_fsdp": False, "mla_down_proj_fusion": False,
    "moe_mlp_glu_interleave_size": None, "moe_shared_expert_glu_interleave_size": None,
    "moe_single_grouped_weight": False, "moe_single_grouped_bias": False,
}  # fmt: skip


def run_arguments(
    config: Config, target: Target, *, source_args: Args | None, dtype: str, iteration: int
) -> dict[str, Any]:
    """Every argument of a run of `config` that wrote `target`; dtypes and enums as text, as in `defaults`.

    Args:
        source_args: of the Megatron run the weights come from: kept, but for layout, format and vocabulary.
        dtype: of most weights, by torch's name or short.

    Raises:
        Refused: fields of the config, or stages of the layout, that Megatron has no argument for; a dtype it does not
            train in.
    """
    name = SHORT.get(dtype, dtype)
    if name not in SHORT.values():
        raise refuse(f"Megatron trains no weights in {dtype}", "--dtype", f"one of {', '.join(SHORT)}")
    given = kept(source_args or {})
    made = {**defaults(), **given, bert.MARK: is_bert(config), llava.MARK: is_llava(config)}
    if not says(made, config):
        made |= arguments_of(config)
    if is_llava(config):
        made = {**llava.script(config), **made, "use_te": target.engine, "spec": None}
    elif is_hybrid(config):
        made |= {"is_hybrid_model": True, "spec": given.get("spec") or hybrid.SPEC}
    if is_bert(config):
        made["spec"] = None if target.engine else bert.LOCAL_SPEC
    made |= {**WRITTEN, **grid_arguments(target.grid, config), **experts(config, target, given)}
    made |= {"bf16": name == "bfloat16", "fp16": name == "float16", "iteration": iteration}
    made |= {"transformer_impl": "transformer_engine" if target.engine else "local", "ckpt_format": target.format}
    made |= {"padded_vocab_size": target.vocabulary, "vocab_size": config.vocab_size}
    made |= {"make_vocab_size_divisible_by": target.divisible_by, "use_dist_ckpt": target.format != "torch"}
    made["seq_length"] = made["seq_length"] or config.max_position_embeddings
    derive_sizes(made)
    derive_run(made)
    lost(made, config).raise_if_any()
    del made[bert.MARK], made[llava.MARK]
    return made


def says(args: Args, config: Config) -> bool:
    try:
        return not lost(args, config)
    except Refused:
        return False


def kept(source_args: Args) -> dict[str, Any]:
    """What today's Megatron knows of a source's args, in plain values: objects of its classes are of its version."""
    names = {*defaults(), *llava.NAMES}
    return {name: value for name, value in source_args.items() if name in names and is_plain(value)}


def is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(map(is_plain, [*value, *value.values()]))
    return value is None or isinstance(value, (bool, int, float, str))


def experts(config: Config, target: Target, given: Args) -> dict[str, Any]:
    """How experts are held and reached. Capacities, and most else, need `alltoall`: Megatron's default has neither."""
    if not config.num_experts:
        return {"moe_grouped_gemm": False}
    made = {
        "moe_grouped_gemm": target.experts != "sequential",
        "moe_token_dispatcher_type": given.get("moe_token_dispatcher_type") or "alltoall",
    }
    # an argument until 2026, when the experts it chooses were taken out
    return {**made, "moe_use_legacy_grouped_gemm": True} if target.experts == "legacy-grouped" else made


def derive_sizes(args: dict[str, Any]) -> None:
    """Sizes that follow from other sizes where they are not given, as `validate_args` has them."""
    if args["ffn_hidden_size"] is None:
        # two thirds for three matrices instead of two, to a multiple of 64: Megatron's rule
        four = 4 * args["hidden_size"]
        args["ffn_hidden_size"] = int(four * 2 / 3 / 64) * 64 if args["swiglu"] else four
    if args["kv_channels"] is None:
        args["kv_channels"] = args["hidden_size"] // args["num_attention_heads"]
    if args["padded_vocab_size"] is None:
        step = args["make_vocab_size_divisible_by"] * args["tensor_model_parallel_size"]
        args["padded_vocab_size"] = math.ceil(args["vocab_size"] / step) * step
    args["num_experts"] = args["num_experts"] or None
    if args["num_experts"] and args["moe_ffn_hidden_size"] is None:
        args["moe_ffn_hidden_size"] = args["ffn_hidden_size"]
    args["encoder_num_layers"], args["encoder_seq_length"] = args["num_layers"], args["seq_length"]


def derive_run(args: dict[str, Any]) -> None:
    """Switches that follow from other switches, and the world this layout needs."""
    args["params_dtype"] = "torch.bfloat16" if args["bf16"] else "torch.float16" if args["fp16"] else "torch.float32"
    if args["use_rotary_position_embeddings"]:
        args["position_embedding_type"] = "rope"
    args["bias_gelu_fusion"] = args["bias_gelu_fusion"] and args["add_bias_linear"]
    args["add_qkv_bias"] = args["add_qkv_bias"] or args["add_bias_linear"]
    args["attention_softmax_in_fp32"] = args["attention_softmax_in_fp32"] or args["apply_query_key_layer_scaling"]
    args["apply_rope_fusion"] = args["apply_rope_fusion"] and args["position_embedding_type"] == "rope"
    if args["num_virtual_stages_per_pipeline_rank"] is not None:
        args["virtual_pipeline_model_parallel_size"] = args["num_virtual_stages_per_pipeline_rank"]
    tensor, pipeline = args["tensor_model_parallel_size"], args["pipeline_model_parallel_size"]
    args["expert_tensor_parallel_size"] = args["expert_tensor_parallel_size"] or tensor
    # training asks for it with experts, and there is nothing to divide on one rank
    args["sequence_parallel"] = tensor > 1 and bool(args["sequence_parallel"] or args["num_experts"])
    args["tensor_parallel_num_weight_shards"] = tensor
    args["expert_tensor_parallel_num_weight_shards"] = args["expert_tensor_parallel_size"]
    args["transformer_pipeline_model_parallel_size"] = pipeline
    args["data_parallel_size"] = data_parallel_size(args)
    args["world_size"] = tensor * pipeline * (args["context_parallel_size"] or 1) * args["data_parallel_size"]
    args["micro_batch_size"] = args["micro_batch_size"] or 1
    args["global_batch_size"] = args["global_batch_size"] or args["micro_batch_size"] * args["data_parallel_size"]


def data_parallel_size(arguments: Mapping[str, Any]) -> int:
    """The smallest number of data-parallel ranks, from that in `arguments` on, that the experts' groups fit into.

    In each stage, tensor x context x data ranks are also expert tensor x expert x (a rest of) data ranks.
    """
    tensor = arguments["tensor_model_parallel_size"]
    ranks = tensor * (arguments.get("context_parallel_size") or 1)
    experts = arguments["expert_model_parallel_size"] * (arguments["expert_tensor_parallel_size"] or tensor)
    step = math.lcm(ranks, experts) // ranks
    return math.ceil(arguments["data_parallel_size"] / step) * step


def as_records(args: Args) -> Made:
    """The Namespace to pickle: what `run_arguments` gives, dtypes and members of enums as the objects they name."""
    namespace = Made("argparse.Namespace", ())
    namespace.state = {name: record(value) for name, value in args.items()}
    return namespace


def record(value: Any) -> Any:
    if isinstance(value, str) and value in MEMBERS:
        member = MEMBERS[value]
        return None if member is None else Made(member[0], (member[1],))
    if isinstance(value, str) and value.startswith("torch.") and value.removeprefix("torch.") in BY_TORCH:
        return Global(value)
    if isinstance(value, (list, tuple)):
        return type(value)(map(record, value))
    if isinstance(value, dict):
        return {key: record(item) for key, item in value.items()}
    return value
