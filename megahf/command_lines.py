"""The options to load a written checkpoint with, for Megatron's command line of 2026, ready to be pasted."""

from __future__ import annotations

import shlex
from typing import Any

from .arguments import Args, defaults
from .grid_arguments import size
from .llava_arguments import ARGUMENTS

REQUIRED = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "seq_length", "max_position_embeddings",
    "position_embedding_type", "normalization", "micro_batch_size", "padded_vocab_size", "tensor_model_parallel_size",
    "pipeline_model_parallel_size", "ckpt_format",
)  # fmt: skip
# Whatever else describes the model, the layout or the format, where it is not Megatron's default: in this order.
OPTIONAL = (
    "hybrid_layer_pattern", "is_hybrid_model", "spec", "mamba_state_dim", "mamba_head_dim", "mamba_num_groups",
    "mamba_num_heads", "bert_binary_head",
    "group_query_attention", "num_query_groups", "kv_channels", "rotary_base", "rotary_percent", "rotary_interleaved",
    "rotary_seq_len_interpolation_factor", "use_rope_scaling", "no_rope_freq", "multi_latent_attention", "q_lora_rank",
    "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "rope_type", "rotary_scaling_factor",
    "yarn_original_max_position_embeddings", "yarn_beta_fast", "yarn_beta_slow", "mscale", "mscale_all_dim",
    "yarn_correction_range_round_to_int", "layernorm_epsilon", "layernorm_zero_centered_gamma", "add_bias_linear",
    "add_qkv_bias", "swiglu", "squared_relu", "quick_geglu", "bias_gelu_fusion", "bias_swiglu_fusion",
    "activation_func_clamp_value", "glu_linear_offset", "untie_embeddings_and_output_weights", "qk_layernorm",
    "qk_l2_norm", "attention_output_gate", "softmax_type", "window_size", "window_attn_skip_freq",
    "apply_query_key_layer_scaling", "fp32_residual_connection", "use_mup", "mup_base_hidden_size",
    "mup_base_head_dim", "mup_attn_scale_power", "mup_embedding_mult", "mup_output_mult", "num_experts",
    "moe_layer_freq", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_shared_expert_gate",
    "moe_latent_size", "moe_router_topk", "moe_router_score_function", "moe_router_pre_softmax",
    "moe_router_num_groups", "moe_router_group_topk", "moe_router_topk_scaling_factor",
    "moe_router_enable_expert_bias", "moe_router_dtype", "moe_router_load_balancing_type", "moe_aux_loss_coeff",
    "moe_z_loss_coeff", "moe_input_jitter_eps", "moe_apply_probs_on_input", "moe_expert_capacity_factor",
    "moe_token_drop_policy", "moe_token_dispatcher_type", "moe_grouped_gemm", "mtp_num_layers",
    "mtp_use_repeated_layer", "mtp_loss_scaling_factor", "attention_dropout", "hidden_dropout", "init_method_std",
    "bf16", "fp16", "make_vocab_size_divisible_by", "transformer_impl", "sequence_parallel",
    "expert_model_parallel_size", "expert_tensor_parallel_size", "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers", "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split", "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank", "pipeline_model_parallel_layout", "tokenizer_type", "tokenizer_model",
)  # fmt: skip
# Of the script of LLaVA's, examples/multimodal/train.py, which asks for the first two.
IMAGES = ("language_model_type", "vision_model_type")
SCRIPT = (
    "vision_projection_type", "img_h", "img_w", "patch_dim", "decoder_seq_length", "disable_vision_class_token",
    "pixel_shuffle", "use_tiling", "max_num_tiles", "use_thumbnail", "use_tile_tags", "image_tag_type",
    "class_token_len", "tokenizer_prompt_format", "use_te", "radio_disable_cpe", "radio_force_cpe_eval_mode",
    "radio_interpolate_only_cpe", "radio_cpe_aspect_ratio_select",
)  # fmt: skip
# Options that are not called as their argument.
RENAMED = {"layernorm_epsilon": "norm-epsilon", "layernorm_zero_centered_gamma": "apply-layernorm-1p"}
# Options that turn off what is on by default; of all other switches the option turns on.
OFF = {
    "add_bias_linear": "disable-bias-linear",
    "bert_binary_head": "bert-no-binary-head",
    "bias_gelu_fusion": "no-bias-gelu-fusion",
    "bias_swiglu_fusion": "no-bias-swiglu-fusion",
    "yarn_correction_range_round_to_int": "no-yarn-correction-range-round-to-int",
}
WHOLE = ("rotary_base", "rotary_seq_len_interpolation_factor")  # taken as whole numbers alone
ONE_WORD = ("no_rope_freq", "window_attn_skip_freq", "moe_layer_freq", "window_size")  # lists as Python writes them
LATER = ("use_mup", "yarn_original_max_position_embeddings", "yarn_beta_fast", "yarn_beta_slow")  # than 0.16.1


def command_line(args: Args, load: str) -> list[str]:
    """Megatron's options for the checkpoint in `load` with `args`, one an item, quoted for a shell.

    Model, layout and format are said in full, so that nothing hangs on what `--use-checkpoint-args` restores.

    Args:
        args: what `run_arguments` gives.
    """
    asked = [option(name, args[name]) for name in REQUIRED]
    asked += [option(name, args[name]) for name in OPTIONAL if needed(name, args)]
    if args.get("language_model_type"):
        asked += [option(name, args[name]) for name in IMAGES]
        given = [name for name in SCRIPT if args.get(name) not in (None, False, "", by_default(name))]
        asked += [option(name, args[name]) for name in given]
    return [*asked, f"--load {shlex.quote(load)}", "--no-load-optim", "--no-load-rng"]


def needed(name: str, args: Args) -> bool:
    """Whether a default does not say it, or what Megatron derives from the others."""
    value = args[name]
    derived = {
        "add_qkv_bias": args["add_bias_linear"],
        "bias_gelu_fusion": args["add_bias_linear"],
        "kv_channels": args["hidden_size"] // args["num_attention_heads"],
        "expert_tensor_parallel_size": size(args, "tensor_model_parallel_size"),
    }
    if name in WHOLE and not whole(value):
        return False
    return bool(value != derived.get(name, defaults()[name]))


def by_default(name: str) -> Any:
    """What Megatron's script takes where an option is not given."""
    return ARGUMENTS.get(name, defaults().get(name))


def whole(value: Any) -> bool:
    return value is None or value == int(value)


def option(name: str, value: Any) -> str:
    """`--swiglu`, `--num-layers 32`, `--moe-layer-freq '[0,1,1]'`."""
    if value is False:
        return f"--{OFF[name]}"
    words = [f"--{RENAMED.get(name, name.replace('_', '-'))}"]
    if name in ONE_WORD and isinstance(value, (list, tuple)):
        words.append(str(value).replace(" ", ""))
    elif isinstance(value, (list, tuple)):
        words += map(str, value)
    elif value is not True:
        words.append(str(int(value)) if name in WHOLE else str(value))
    return shlex.join(words)


def remarks(args: Args) -> list[str]:
    """What whoever pastes the options has to know, a sentence each."""
    said = ["--use-checkpoint-args restores a part of them, and not that of norms, latent attention and windows"]
    if not args["tokenizer_type"]:
        said.append("a tokenizer is for you to name: --tokenizer-type, and --tokenizer-model")
    if args["hybrid_layer_pattern"]:
        old = args["hybrid_override_pattern"]
        name = "--hybrid-layer-pattern"
        said.append(f"Megatron before 0.17 calls {name} --hybrid-override-pattern" if old else f"{name} is of 0.17 on")
    for name in WHOLE:
        if not whole(args[name]):
            said.append(f"{name} is {args[name]}, and Megatron's option takes whole numbers alone: set it in code")
    if any(args[name] != defaults()[name] for name in LATER):
        said.append("muP and YaRN outside of multi-latent attention are of Megatron after 0.16.1")
    if args["swiglu"] and args["activation_func_clamp_value"] is not None and not args["num_experts"]:
        said.append("2026's Megatron clamps SwiGLU in experts alone: load it with 0.16.1")
    if args["mtp_num_layers"] and args["position_embedding_type"] not in ("rope", "none"):
        said.append("Megatron's trainer takes heads for further tokens with rope and none alone, and refuses these")
    if args.get("moe_use_legacy_grouped_gemm"):
        said.append("the experts are held as --moe-use-legacy-grouped-gemm had them, which 2026's Megatron has not")
    return said
