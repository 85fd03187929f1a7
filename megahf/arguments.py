"""The second table: Megatron's arguments and the config fields they become.

A row is (argument names, newest first; config field; default; how the value is read). An argument that changes the
mathematics in a way that is not built is refused by name. The rules follow `core_transformer_config_from_args`
(megatron/training/argument_utils.py) and `gpt_builder` (gpt_builders.py) of Megatron-LM, 2026, quirks included: what
counts is the function that was trained, not the option that was meant.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import SimpleNamespace
from typing import Any

from . import hybrid
from .errors import Problems, refuse
from .layouts import Grid, stage_count
from .models.checks import check_experts
from .patterns import pattern, written
from .unbuilt import REFUSED, before_014, refuse_unbuilt

Args = Mapping[str, Any]
MISSING = object()


@dataclass(frozen=True)
class Argument:
    """One config field and where it comes from; `read` gets the stored value and all arguments."""

    field: str
    names: str = ""  # space separated, newest first; empty: the field's own name
    default: Any = MISSING  # for files that do not record it; MISSING: such a file is refused
    read: Callable[[Any, Args], Any] = lambda value, args: value

    def spelled(self) -> list[str]:
        return (self.names or self.field).split()


def ffn_hidden_size(value: int | None, args: Args) -> int:
    """What Megatron fills in when the option is not given: 4h, or two thirds of it in steps of 64 with SwiGLU."""
    if value is not None:
        return value
    four = 4 * args["hidden_size"]
    return int((four * 2 / 3) / 64) * 64 if args.get("swiglu") else four


def num_query_groups(value: int | None, args: Args) -> int:
    """`num_query_groups` is 1 by default and counts only with `--group-query-attention`."""
    return value if args.get("group_query_attention") and value else args["num_attention_heads"]


def position_embedding_type(value: str, args: Args) -> str:
    return "rope" if args.get("use_rotary_position_embeddings") else value


def activation_func(_: Any, args: Args) -> str:
    """The function that ran: the fused bias + gelu kernel, on by default with biases, is the tanh approximation."""
    if args.get("swiglu"):
        return "silu"
    if args.get("squared_relu"):
        return "squared_relu"
    if args.get("quick_geglu"):
        return "quick_gelu"
    fused = args.get("bias_gelu_fusion", True) and args.get("add_bias_linear", True)
    return "gelu_tanh" if fused else "gelu"


def window_size(value: Any, _: Args) -> list[int] | None:
    pair = written(value) if isinstance(value, str) else value
    if pair is None or tuple(pair) in ((-1, -1), (-1, 0)):
        return None
    left, right = (int(side) for side in pair)
    if right != 0:
        raise refuse(f"--window-size {left} {right} looks ahead; only (left, 0) is causal", "args")
    return [left, right]


def softmax_scale(value: float | None, args: Args) -> float | None:
    """muP divides by the head size, not by its root (`TransformerConfig.__post_init__`)."""
    if value is not None or not args.get("use_mup"):
        return value
    base = 1.0 if args.get("mup_base_head_dim") is None else args["mup_base_head_dim"] ** 0.5
    return float(base / kv_channels(args.get("kv_channels"), args) ** args.get("mup_attn_scale_power", 1.0))


def kv_channels(value: int | None, args: Args) -> int:
    return value or args["hidden_size"] // args["num_attention_heads"]


def mup_output_mult(value: float, args: Args) -> float:
    """Set to 1 / width multiplier unless given (`TransformerConfig.__post_init__`)."""
    if not args.get("use_mup"):
        return 1.0
    width = args["hidden_size"] / (args.get("mup_base_hidden_size") or args["hidden_size"])
    return 1.0 / width if value == 1.0 else value


def number(value: Any, _: Args) -> Any:
    return None if value is None else float(value)


def yarn(default: Any) -> Callable[[Any, Args], Any]:
    """The defaults that `_apply_yarn_config_from_args` puts where an option is not given."""
    return lambda value, args: default if value is None else value


def yarn_or_latent(default: Any, latent: str) -> Callable[[Any, Args], Any]:
    """As `yarn`; multi-latent attention reads `latent`, for which there is no option, so that its default runs."""

    def read(value: Any, args: Args) -> Any:
        if args.get("multi_latent_attention"):
            value = args.get(latent)
        return default if value is None else value

    return read


def yarn_original(value: int | None, args: Args) -> int:
    """Multi-latent attention of Megatron before 0.14 stretched from `max_position_embeddings`."""
    if before_014(args):
        return int(args["max_position_embeddings"])
    return int(yarn_or_latent(4096, "original_max_position_embeddings")(value, args))


def mscale(default: float) -> Callable[[Any, Args], float]:
    """The first Megatrons with multi-latent attention had no option for it, and 0.707 in their config."""

    def read(value: float | None, args: Args) -> float:
        if value is None:
            return 0.707 if before_014(args) and "mscale" not in args else default
        return float(value)

    return read


def moe_ffn_hidden_size(value: int | None, args: Args) -> int:
    return value or ffn_hidden_size(args.get("ffn_hidden_size"), args)


def moe_layer_freq(value: Any, args: Args) -> Any:
    """A number, or one flag a layer; 1 for models without experts."""
    flags = pattern(value, args) if args.get("num_experts") else 1
    if isinstance(flags, int) and flags < 1:
        raise ValueError("a frequency is 1 or more")
    if isinstance(flags, list) and len(flags) != stored(FIELDS[0], args):
        raise ValueError(f"{len(flags)} flags for {stored(FIELDS[0], args)} layers")
    return flags


def router_groups(value: int | None, args: Args) -> int | None:
    """Megatron before 0.12 limited devices, not groups: a group is an expert-parallel rank."""
    return size(args, "expert_model_parallel_size") if args.get("moe_router_topk_limited_devices") else value


def biased_router(args: Args) -> bool:
    return bool(args.get("num_experts") and args.get("add_bias_linear", True))


def capacity(value: float | None, args: Args) -> float | None:
    """Megatron's trainer takes negative numbers for none."""
    return None if value is None or value < 0 else float(value)


def load_balancing(value: Any, args: Args) -> Any:
    """One type or several; lists of one are what the command line makes of one."""
    return value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value


FIELDS = (
    Argument("num_layers", "num_layers encoder_num_layers"),
    Argument("hidden_size"),
    Argument("ffn_hidden_size", default=None, read=ffn_hidden_size),
    Argument("num_attention_heads"),
    Argument("num_query_groups", default=None, read=num_query_groups),
    Argument("kv_channels", default=None, read=kv_channels),
    Argument("max_position_embeddings"),
    Argument("position_embedding_type", default="learned_absolute", read=position_embedding_type),
    Argument("rotary_base", default=10000, read=number),
    Argument("rotary_percent", default=1.0),
    Argument("rotary_interleaved", default=False),
    Argument("rotary_seq_len_interpolation_factor", default=None, read=number),
    Argument("use_rope_scaling", default=False),
    Argument("rope_scaling_factor", default=8.0, read=lambda value, args: 8.0),  # no builder passes the option on
    Argument("multi_latent_attention", default=False),
    Argument("q_lora_rank", default=None),
    Argument("kv_lora_rank", default=32),
    Argument("qk_head_dim", default=128),
    Argument("qk_pos_emb_head_dim", default=64),
    Argument("v_head_dim", default=128),
    Argument("rope_type", default=None, read=yarn("yarn")),
    Argument("yarn_rotary_scaling_factor", "rotary_scaling_factor", 1.0, yarn(1.0)),
    Argument("yarn_original_max_position_embeddings", default=None, read=yarn_original),
    Argument("yarn_beta_fast", default=None, read=yarn_or_latent(32.0, "beta_fast")),
    Argument("yarn_beta_slow", default=None, read=yarn_or_latent(1.0, "beta_slow")),
    Argument("yarn_mscale", "mscale", None, mscale(1.0)),
    Argument("yarn_mscale_all_dim", "mscale_all_dim", None, mscale(0.0)),
    Argument("yarn_correction_range_round_to_int", default=None, read=yarn(True)),
    Argument("no_rope_freq", default=None, read=pattern),
    Argument("normalization", default="LayerNorm"),
    Argument("layernorm_epsilon", "layernorm_epsilon norm_epsilon", 1e-5),
    Argument("layernorm_zero_centered_gamma", "layernorm_zero_centered_gamma apply_layernorm_1p", False),
    Argument("add_bias_linear", default=True),
    Argument("add_qkv_bias", default=False, read=lambda value, args: bool(value or args.get("add_bias_linear", True))),
    Argument("activation_func", default=None, read=activation_func),
    Argument("gated_linear_unit", "swiglu", False, lambda value, args: bool(value or args.get("quick_geglu"))),
    Argument("activation_func_clamp_value", default=None, read=number),
    Argument("glu_linear_offset", default=0.0),
    Argument("num_experts", default=None, read=lambda value, args: value or None),
    Argument("moe_layer_freq", default=1, read=moe_layer_freq),
    Argument("moe_ffn_hidden_size", default=None, read=moe_ffn_hidden_size),
    Argument("moe_shared_expert_intermediate_size", default=None),
    Argument("moe_shared_expert_gate", default=False),
    Argument("moe_latent_size", default=None),
    Argument("moe_router_topk", default=2),
    Argument("moe_router_score_function", default="softmax"),
    Argument("moe_router_pre_softmax", default=False),
    Argument("moe_router_num_groups", default=None, read=router_groups),
    Argument("moe_router_group_topk", "moe_router_group_topk moe_router_topk_limited_devices", None),
    Argument("moe_router_topk_scaling_factor", default=None, read=number),
    Argument("moe_router_enable_expert_bias", default=False),
    Argument("moe_router_bias", default=None, read=lambda _, args: biased_router(args)),
    Argument("moe_router_dtype", default=None),
    Argument("moe_router_load_balancing_type", default="aux_loss", read=load_balancing),
    Argument("moe_aux_loss_coeff", default=0.0, read=load_balancing),
    Argument("moe_z_loss_coeff", default=None, read=number),
    Argument("moe_input_jitter_eps", default=None, read=number),
    Argument("moe_apply_probs_on_input", default=False),
    Argument("moe_expert_capacity_factor", default=None, read=capacity),
    Argument("moe_token_drop_policy", default="probs"),
    Argument("mtp_num_layers", default=None, read=lambda value, args: value or None),
    Argument("mtp_use_repeated_layer", default=False),
    Argument("mtp_loss_scaling_factor", default=0.1),
    Argument("tie_word_embeddings", "untie_embeddings_and_output_weights", False, lambda value, args: not value),
    Argument("qk_layernorm", default=False),
    Argument("qk_l2_norm", default=False),
    Argument("attention_output_gate", default=False),
    Argument("softmax_type", default="vanilla"),
    Argument("softmax_scale", default=None, read=softmax_scale),
    Argument("window_size", default=None, read=window_size),
    Argument("window_attn_skip_freq", default=None, read=pattern),
    Argument("fp32_residual_connection", default=False),
    Argument("mup_embedding_mult", default=1.0, read=lambda value, args: value if args.get("use_mup") else 1.0),
    Argument("mup_output_mult", default=1.0, read=mup_output_mult),
    Argument("attention_dropout", default=0.1),
    Argument("hidden_dropout", default=0.1),
    Argument("init_method_std", default=0.02),
)

COUNTS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "max_position_embeddings",
)  # fmt: skip
COUNTS_OR_NONE = (
    "num_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_latent_size", "moe_router_topk",
    "moe_router_num_groups", "moe_router_group_topk", "mtp_num_layers", "q_lora_rank", "kv_lora_rank", "qk_head_dim",
    "qk_pos_emb_head_dim", "v_head_dim",
)  # fmt: skip
DAMAGED = "the args are damaged, or not Megatron's own"


# Of Megatrons before 2026: what of them is read, and not by name in a row, or leaves the function as it is.
OLD = {
    "original_max_position_embeddings", "beta_fast", "beta_slow", "moe_extended_tp", "moe_use_legacy_grouped_gemm",
    "moe_token_dropping",
}  # fmt: skip


@cache
def known() -> frozenset[str]:
    """The arguments Megatron-LM has (2026): those that no row reads are known not to change the function."""
    text = resources.files("megahf").joinpath("arguments.json").read_text()
    rows = {name for row in FIELDS for name in row.spelled()} | {row[0] for row in REFUSED}
    return frozenset(json.loads(text)) | rows | OLD | hybrid.ARGUMENTS


def unknown(args: Args) -> list[str]:
    """Arguments that neither a row nor the list of known ones names; reported, and refused under `--strict`."""
    return sorted(set(args) - known())


def problems(args: Args) -> Problems:
    """Everything in `args` that the model classes cannot compute, and everything they need that is not there."""
    found = Problems()
    refuse_unbuilt(args, found)
    for row in FIELDS:
        if row.default is MISSING and stored(row, args) is MISSING:
            found.add(
                f"the args do not say {row.field}", "args", "the checkpoint was not written by Megatron's trainer"
            )
    return found


def stored(row: Argument, args: Args) -> Any:
    return next((args[name] for name in row.spelled() if args.get(name) is not None), row.default)


def fields(args: Args) -> dict[str, Any]:
    """The config fields that `args` stand for, all but `vocab_size`; refuses what is not built."""
    found = problems(args)
    found.raise_if_any()
    made: dict[str, Any] = {}
    for row in FIELDS:
        try:
            made[row.field] = row.read(stored(row, args), args)
        except (TypeError, ValueError, ArithmeticError) as error:
            found.add(f"{row.spelled()[0]} {stored(row, args)!r:.60} cannot be read: {error}", "args", DAMAGED)
    for name in (*COUNTS, *COUNTS_OR_NONE):
        if name in made and not is_count(made[name]) and not (made[name] is None and name in COUNTS_OR_NONE):
            found.add(f"{name} is {made[name]!r:.60}, not a number of at least 1", "args", DAMAGED)
    found.raise_if_any()
    return made


def is_count(value: Any) -> bool:
    return type(value) is int and value > 0


def config(args: Args, vocab_size: int) -> SimpleNamespace:
    """The config as the tables read it, without transformers."""
    made = SimpleNamespace(vocab_size=vocab_size, **{**fields(args), **hybrid.fields(args)})
    try:
        check_experts(made)  # as the model class will
    except ValueError as error:
        raise refuse(str(error), "args", "such a model cannot be built") from error
    return made


def grid(args: Args, chunks: int | None = None) -> Grid:
    """The writer's ranks. `chunks`: model chunks seen in a file, which settles what old args leave open."""
    tensor, pipeline = size(args, "tensor_model_parallel_size"), size(args, "pipeline_model_parallel_size")
    layout = (hybrid.layout(args) or args.get("pipeline_model_parallel_layout")) if pipeline > 1 else None
    if layout is not None and not isinstance(layout, str):
        raise refuse(f"pipeline_model_parallel_layout {layout!r:.60} is no layout string", "args", DAMAGED)
    virtual = size(args, "virtual_pipeline_model_parallel_size")
    return Grid(
        tensor=tensor,
        pipeline=pipeline,
        virtual=chunks or (stage_count(layout) // pipeline if layout else virtual),
        expert=size(args, "expert_model_parallel_size"),
        expert_tensor=size(args, "expert_tensor_parallel_size", tensor),
        first=0 if args.get("standalone_embedding_stage") else given(args, "first", pipeline),
        last=given(args, "last", pipeline),
        embedding=bool(args.get("account_for_embedding_in_pipeline_split")) and pipeline > 1,
        loss=bool(args.get("account_for_loss_in_pipeline_split")) and pipeline > 1,
        layout=layout,
    )


def size(args: Args, name: str, default: int = 1) -> int:
    """A parallel size; old files leave out those their Megatron did not have."""
    value: int = default if args.get(name) is None else args[name]
    if not is_count(value):
        raise refuse(f"{name} is {value!r:.60}, not a number of at least 1", "args", DAMAGED)
    return value


def given(args: Args, end: str, pipeline: int) -> int | None:
    """Layers of the first or last stage, when set by hand; a stage may hold none."""
    name = f"decoder_{end}_pipeline_num_layers"
    value: int | None = args.get(name)
    if value is not None and (type(value) is not int or value < 0):
        raise refuse(f"{name} is {value!r:.60}, not a number of layers", "args", DAMAGED)
    return value if pipeline > 1 else None


def vocabulary(args: Args, rows: int, asked: int | None = None, tokenizer: int | None = None) -> tuple[int, str]:
    """The true vocabulary size and how it is known; `rows` are what the embedding stores, padding at the end.

    Asked for on the command line, else the tokenizer's, else the args' `vocab_size`, else all rows.
    """
    for size, source in (
        (asked, "as asked for"),
        (tokenizer, "the tokenizer's"),
        (args.get("vocab_size"), "from the args"),
    ):
        if size is None:
            continue
        if not is_count(size) or size > rows:
            raise refuse(
                f"a vocabulary of {size} ({source}) does not fit the {rows} rows stored",
                "embedding.word_embeddings.weight",
                f"give --true-vocab-size N with N at most {rows}",
            )
        return size, source
    return rows, "unknown: all rows kept, padding included"


def notes(args: Args) -> list[str]:
    """What is worth saying about how `args` were read."""
    said = []
    if args.get("use_rope_scaling") and args.get("rope_scaling_factor", 8.0) != 8.0:
        said.append(
            f"rope_scaling_factor {args['rope_scaling_factor']} has no effect: Megatron's builders always run 8"
        )
    if args.get("tokenizer_type") == "NullTokenizer" and args.get("vocab_size"):
        said.append(
            f"tokenizer_type NullTokenizer: before 2026 Megatron gave it one more id, {args['vocab_size']}, for "
            f"the end of a document; give --true-vocab-size {args['vocab_size'] + 1} to keep its row"
        )
    if before_014(args):
        said.append("the args have no rope_type: YaRN starts from max_position_embeddings, as in Megatron before 0.14")
    if args.get("num_experts") and args.get("moe_expert_rank_capacity_factor") is not None:
        said.append("moe_expert_rank_capacity_factor dropped tokens beyond a rank's share; here none are dropped")
    if args.get("rotary_seq_len_interpolation_factor") is not None:
        said.append("rotary_seq_len_interpolation_factor is applied, as pretrain_gpt.py does; gpt_builders.py drops it")
    return said + hybrid.notes(args)
