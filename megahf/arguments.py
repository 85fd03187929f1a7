"""The second table: Megatron's arguments and the config fields they become.

A row is (config field; argument names, newest first; default; how the value is read, and how it is written). An
argument that changes the mathematics in a way that is not built is refused by name, and so is a field's value that no
argument says. The rules follow `core_transformer_config_from_args` (megatron/training/argument_utils.py) and
`gpt_builder` (gpt_builders.py) of Megatron-LM, 2026, quirks included: what counts is the function that was trained, not
the option that was meant.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import SimpleNamespace
from typing import Any

from . import argument_values as values
from . import bert, hybrid, llava
from .argument_values import ALIKE, Args, Config, Read, Write, nothing, unless
from .errors import Problems, refuse
from .grid_arguments import DAMAGED, grid, is_count
from .models.checks import check_experts
from .patterns import pattern
from .rows import is_bert, is_hybrid, is_llava, language
from .unbuilt import REFUSED, before_014, refuse_unbuilt

__all__ = ["FIELDS", "Args", "arguments_of", "config", "fields", "grid", "notes", "unknown", "vocabulary"]

MISSING = object()


@dataclass(frozen=True)
class Argument:
    """One config field and where it comes from; `argument_values` has what reads and writes it."""

    field: str
    names: str = ""  # space separated, newest first; empty: the field's own name
    default: Any = MISSING  # for files that do not record it; MISSING: such a file is refused
    read: Read = lambda value, args: value
    write: Write | None = None  # None: the value, under the first name
    only: str = ""  # why some values cannot be written

    def arguments(self, config: Config) -> dict[str, Any]:
        """The arguments that say this field of `config`."""
        value = getattr(config, self.field)
        return {self.spelled()[0]: value} if self.write is None else self.write(value, config)

    def spelled(self) -> list[str]:
        return (self.names or self.field).split()


LATENT_YARN = "multi-latent attention of Megatron's has no argument for it"
NO_GATE = "Megatron's silu and quick_gelu are gated, its other functions are not"
ROUTER_BIAS = "Megatron's routers have a bias where add_bias_linear is, and nowhere else"
FIELDS = (
    Argument("num_layers", "num_layers encoder_num_layers"),
    Argument("hidden_size"),
    Argument("ffn_hidden_size", default=None, read=values.ffn_hidden_size),
    Argument("num_attention_heads"),
    Argument("num_query_groups", "", None, values.num_query_groups, values.write_num_query_groups),
    Argument("kv_channels", default=None, read=values.kv_channels),
    Argument("max_position_embeddings"),
    Argument("position_embedding_type", default="learned_absolute", read=values.position_embedding_type),
    Argument("rotary_base", "", 10000, values.number, values.write_number("rotary_base")),
    Argument("rotary_percent", default=1.0),
    Argument("rotary_interleaved", default=False),
    Argument("rotary_seq_len_interpolation_factor", "", None, values.number,
             values.write_number("rotary_seq_len_interpolation_factor")),
    Argument("use_rope_scaling", default=False, only="no builder of Megatron's hybrids passes it on"),
    Argument("rope_scaling_factor", "", 8.0, lambda value, args: 8.0, nothing, "Megatron's builders always run 8"),
    Argument("multi_latent_attention", default=False),
    Argument("q_lora_rank", default=None),
    Argument("kv_lora_rank", default=32),
    Argument("qk_head_dim", default=128),
    Argument("qk_pos_emb_head_dim", default=64),
    Argument("v_head_dim", default=128),
    Argument("rope_type", "", None, values.yarn("yarn"), unless("rope_type", "yarn")),
    Argument("yarn_rotary_scaling_factor", "rotary_scaling_factor", 1.0, values.yarn(1.0)),
    Argument("yarn_original_max_position_embeddings", "", None, values.yarn_original,
             values.write_yarn_or_latent("yarn_original_max_position_embeddings", 4096), LATENT_YARN),
    Argument("yarn_beta_fast", "", None, values.yarn_or_latent(32.0, "beta_fast"),
             values.write_yarn_or_latent("yarn_beta_fast", 32.0), LATENT_YARN),
    Argument("yarn_beta_slow", "", None, values.yarn_or_latent(1.0, "beta_slow"),
             values.write_yarn_or_latent("yarn_beta_slow", 1.0), LATENT_YARN),
    Argument("yarn_mscale", "mscale", None, values.mscale(1.0), only="Megatron scales by 1 where none is given"),
    Argument("yarn_mscale_all_dim", "mscale_all_dim", None, values.mscale(0.0),
             only="Megatron takes 0 where none is given"),
    Argument("yarn_correction_range_round_to_int", "", None, values.yarn(True),
             unless("yarn_correction_range_round_to_int", True)),
    Argument("no_rope_freq", default=None, read=pattern),
    Argument("normalization", default="LayerNorm"),
    Argument("layernorm_epsilon", "layernorm_epsilon norm_epsilon", 1e-5),
    Argument("layernorm_zero_centered_gamma", "layernorm_zero_centered_gamma apply_layernorm_1p", False),
    Argument("add_bias_linear", default=True),
    Argument("add_qkv_bias", default=False, read=lambda value, args: bool(value or args.get("add_bias_linear", True)),
             only="with add_bias_linear Megatron always has it"),
    Argument("activation_func", "", None, values.activation_func, values.write_activation_func,
             "Megatron approximates gelu by tanh where it fuses it with a bias, and only there"),
    Argument("gated_linear_unit", "swiglu", False, values.gated_linear_unit, nothing, NO_GATE),
    Argument("activation_func_clamp_value", default=None, read=values.number),
    Argument("glu_linear_offset", default=0.0),
    Argument("num_experts", default=None, read=lambda value, args: value or None),
    Argument("moe_layer_freq", default=1, read=values.moe_layer_freq),
    Argument("moe_ffn_hidden_size", "", None, values.moe_ffn_hidden_size, values.write_moe_ffn_hidden_size),
    Argument("moe_shared_expert_intermediate_size", default=None),
    Argument("moe_shared_expert_gate", default=False),
    Argument("moe_latent_size", default=None),
    Argument("moe_router_topk", default=2),
    Argument("moe_router_score_function", default="softmax"),
    Argument("moe_router_pre_softmax", default=False),
    Argument("moe_router_num_groups", default=None, read=values.router_groups),
    Argument("moe_router_group_topk", "moe_router_group_topk moe_router_topk_limited_devices", None),
    Argument("moe_router_topk_scaling_factor", default=None, read=values.number),
    Argument("moe_router_enable_expert_bias", default=False),
    Argument("moe_router_bias", "", None, lambda _, args: values.biased_router(args), nothing, ROUTER_BIAS),
    Argument("moe_router_dtype", default=None),
    Argument("moe_router_load_balancing_type", default="aux_loss", read=values.load_balancing),
    Argument("moe_aux_loss_coeff", default=0.0, read=values.load_balancing),
    Argument("moe_z_loss_coeff", default=None, read=values.number),
    Argument("moe_input_jitter_eps", default=None, read=values.number),
    Argument("moe_apply_probs_on_input", default=False),
    Argument("moe_expert_capacity_factor", default=None, read=values.capacity),
    Argument("moe_token_drop_policy", default="probs"),
    Argument("mtp_num_layers", default=None, read=lambda value, args: value or None),
    Argument("mtp_use_repeated_layer", default=False),
    Argument("mtp_loss_scaling_factor", default=0.1),
    Argument("tie_word_embeddings", "untie_embeddings_and_output_weights", False, lambda value, args: not value,
             lambda value, config: {"untie_embeddings_and_output_weights": not value}),
    Argument("qk_layernorm", default=False),
    Argument("qk_l2_norm", default=False),
    Argument("attention_output_gate", default=False),
    Argument("softmax_type", default="vanilla"),
    Argument("softmax_scale", "", None, values.softmax_scale, values.write_softmax_scale),
    Argument("window_size", "", None, values.window_size, values.write_window_size),
    Argument("window_attn_skip_freq", default=None, read=pattern),
    Argument("fp32_residual_connection", default=False),
    Argument("mup_embedding_mult", default=1.0, read=lambda value, args: value if args.get("use_mup") else 1.0),
    Argument("mup_output_mult", default=1.0, read=values.mup_output_mult),
    Argument("attention_dropout", default=0.1),
    Argument("hidden_dropout", default=0.1),
    Argument("init_method_std", default=0.02),
)  # fmt: skip

COUNTS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels",
    "max_position_embeddings",
)  # fmt: skip
COUNTS_OR_NONE = (
    "num_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_latent_size", "moe_router_topk",
    "moe_router_num_groups", "moe_router_group_topk", "mtp_num_layers", "q_lora_rank", "kv_lora_rank", "qk_head_dim",
    "qk_pos_emb_head_dim", "v_head_dim",
)  # fmt: skip

# Of Megatrons before 2026: what of them is read, and not by name in a row, or leaves the function as it is.
OLD = {
    "original_max_position_embeddings", "beta_fast", "beta_slow", "moe_extended_tp", "moe_use_legacy_grouped_gemm",
    "moe_token_dropping", "encoder_tensor_model_parallel_size", "encoder_pipeline_model_parallel_size",
}  # fmt: skip


@cache
def defaults() -> dict[str, Any]:
    """Every argument of Megatron-LM's main (August 2026) with its default; None where a run has to say it.

    Made by its own `parse_args` and `validate_args`. Dtypes and enums are their full names (`torch.float32`).
    """
    made: dict[str, Any] = json.loads(resources.files("megahf").joinpath("arguments.json").read_text(encoding="utf-8"))
    return made


@cache
def known() -> frozenset[str]:
    """The arguments Megatron-LM has (2026): those that no row reads are known not to change the function."""
    rows = {name for row in FIELDS for name in row.spelled()} | {row[0] for row in REFUSED}
    return frozenset(defaults()) | rows | OLD | hybrid.ARGUMENTS | llava.NAMES | {bert.MARK, llava.MARK}


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


def config(args: Args, vocab_size: int) -> SimpleNamespace:
    """The config as the tables read it, without transformers; a LLaVA's as a `Llava`."""
    if llava.is_marked(args):
        text = config(llava.language(args), vocab_size)
        return llava.fields(args, text, SimpleNamespace(**fields({**args, "bias_gelu_fusion": False})))
    made = SimpleNamespace(vocab_size=vocab_size, **{**fields(args), **hybrid.fields(args), **bert.fields(args)})
    try:
        check_experts(made)  # as the model class will
    except ValueError as error:
        raise refuse(str(error), "args", "such a model cannot be built") from error
    return made


def arguments_of(config: Config) -> dict[str, Any]:
    """The arguments that `config` is read from: the inverse of the function `config`, field for field.

    Raises:
        Refused: every field of the config that Megatron has no argument for; a `moe_router_bias` that is not there and
            what a hybrid's spec sets are not among them: `unsaid` says them, and the weights tell.
    """
    made: dict[str, Any] = {}
    own = language(config)
    for row in FIELDS:
        made |= row.arguments(own)
    if is_hybrid(own):
        made |= hybrid.arguments(own)
    if is_bert(own):
        made |= bert.arguments(own)
    if is_llava(config):
        made |= llava.arguments(config)
    lost(made, config).raise_if_any()
    return made


def lost(args: Args, wanted: Config) -> Problems:
    """The fields of `wanted` that `args` do not say."""
    found, reasons = Problems(), {row.field: row.only for row in FIELDS}
    read = config(args, wanted.vocab_size)
    other, own = language(read), language(wanted)
    told = llava.TOLD_IN_TEXT if is_llava(wanted) else frozenset()
    differing = [
        (name, getattr(own, name, None), value)
        for name, value in vars(other).items()
        if alike(name, getattr(own, name, None), own) != alike(name, value, own)
        and not (name in told or told_by_weights(name, own))
    ]
    for name, value, instead in [*differing, *(llava.lost(read, wanted) if is_llava(wanted) else ())]:
        why = reasons.get(name) or "Megatron has no argument that says so"
        found.add(f"{name} is {value!r:.60}: {why}", "config", f"in Megatron it would be {instead!r:.60}")
    return found


def alike(name: str, value: Any, config: Config) -> Any:
    value = ALIKE[name](value, config) if name in ALIKE else value
    return list(value) if isinstance(value, tuple) else value


def told_by_weights(name: str, config: Config) -> bool:
    """Whether `discovery` reads the field off the weights, so that files without it still hold the whole model."""
    return name in {*hybrid.DISCOVERED, *bert.DISCOVERED} or (name == "moe_router_bias" and not config.moe_router_bias)


def unsaid(config: Config) -> list[str]:
    """What `config` has and no argument says, though it may be written; a sentence each."""
    said = []
    if config.num_experts and config.add_bias_linear and not config.moe_router_bias:
        said.append("the routers have no bias, as in Megatron before 0.15; later ones expect one and load no such file")
    if is_llava(config):
        return said + llava.unsaid(config) + hybrid.unsaid(language(config))
    return said + (bert.unsaid(config) if is_bert(config) else hybrid.unsaid(config))


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
    if llava.is_marked(args):
        return notes(llava.language(args)) + llava.notes(args)
    said = []
    if args.get("use_rope_scaling") and args.get("rope_scaling_factor", 8.0) != 8.0 and llava.MARK not in args:
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
    return said + hybrid.notes(args) + bert.notes(args)
