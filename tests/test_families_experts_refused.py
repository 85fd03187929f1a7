"""Promise: a mixture of experts that is another function on the other side is refused, with what differs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers as T
from families import config_of, logits, model_of, refusal, refusal_of, refusal_to_lower
from safetensors.numpy import load_file, save_file
from test_families_experts import YARN, deepseek_v2, deepseek_v3, glm4, gpt_oss, qwen2, qwen3
from tiny import EXPERTS, LLAMA, MLA, tiny

from megahf import convert

INTAKE: dict[str, tuple[Callable[..., T.PretrainedConfig], dict[str, Any], str]] = {
    "a window in unsaid layers": (
        qwen2,
        {"use_sliding_window": True, "sliding_window": 7, "layer_types": None},
        "a window, and no layer_types to say where: versions of transformers differ in that",
    ),
    "a bias of the output": (qwen3, {"attention_bias": True}, "attention_bias is True; built for qwen3_moe is False"),
    "no experts": (qwen3, {"decoder_sparse_step": 4}, "no layer has experts"),
    "groups ranked by their best": (
        deepseek_v2,
        {"topk_method": "group_limited_greedy", "num_experts_per_tok": 4},
        "groups are ranked by their best 1, in Megatron by their best 2 (4 experts of 2 groups): another choice",
    ),
    "a way to choose of another version": (
        deepseek_v2,
        {"topk_method": "noaux_tc"},
        "topk_method is 'noaux_tc'; built are greedy and group_limited_greedy",
    ),
    "normalised after a softmax over all": (
        deepseek_v2,
        {"norm_topk_prob": True},
        "norm_topk_prob is true; built is a softmax whose weights are left as they are",
    ),
    "groups ranked by their best two": (
        deepseek_v3,
        {"num_experts_per_tok": 2},
        "groups are ranked by their best 2, in Megatron by their best 1 (2 experts of 2 groups): another choice",
    ),
    "sigmoids that are not normalised": (
        deepseek_v3,
        {"norm_topk_prob": False},
        "norm_topk_prob is False; Megatron normalises those of several",
    ),
    "an epsilon that norms of latents do not have": (
        deepseek_v3,
        {"rms_norm_eps": 1e-5},
        "rms_norm_eps: 1e-05; the norms of latents have 1e-06 there whatever it says, Megatron's have it",
    ),
    "pairs of channels that lie apart": (
        deepseek_v3,
        {"rope_interleave": False},
        "rope_interleave is False; built for deepseek_v3 is True",
    ),
    "fewer keys than heads": (deepseek_v3, {"num_key_value_heads": 2}, "2 for 4 attention heads"),
    "no shared experts": (deepseek_v3, {"n_shared_experts": 0}, "n_shared_experts is 0; the architecture always has"),
    "sharper by itself": (
        deepseek_v3,
        {"rope_parameters": {**YARN, "mscale_all_dim": 1.0}},
        "mscale_all_dim without mscale, and Megatron weighs cosines and sines by both",
    ),
    "a range that is not rounded": (
        deepseek_v3,
        {"rope_parameters": {**YARN, "truncate": False}},
        "truncate is false, and Megatron's attention by latents always rounds the range",
    ),
    "another factor on the angles": (
        deepseek_v3,
        {"rope_parameters": {**YARN, "attention_factor": 1.5}},
        "attention_factor 1.5 is not the 1.13863 that Megatron computes",
    ),
    "a part of the head, stretched": (
        glm4,
        {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor is 0.5; with YaRN Megatron rotates whole heads",
    ),
    "another gate": (gpt_oss, {"swiglu_alpha": 1.5}, "swiglu_alpha is 1.5; built for gpt_oss is 1.702"),
    "no biases": (gpt_oss, {"attention_bias": False}, "attention_bias is False; built for gpt_oss is True"),
    "another family": (qwen3, {"model_type": "olmoe"}, "model_type 'olmoe' is not among the families"),
}


@pytest.mark.parametrize("case", INTAKE)
def test_what_is_another_function_here_is_refused(case: str, tmp_path: Path) -> None:
    family, changes, words = INTAKE[case]
    assert words in refusal_of(family(), tmp_path, **changes)


QUANTISED: dict[str, tuple[dict[str, Any], str, str]] = {
    "mxfp4": ({"quantization_config": {"quant_method": "mxfp4"}}, "", "Mxfp4Config(dequantize=True)"),
    "mxfp4, by its weights": ({}, "gate_up_proj_blocks", "Mxfp4Config(dequantize=True)"),
    "fp8": ({"quantization_config": {"quant_method": "fp8"}}, "", "FineGrainedFP8Config(dequantize=True)"),
    "fp8, by its scales": ({}, "weight_scale_inv", "FineGrainedFP8Config(dequantize=True)"),
    "awq": ({"quantization_config": {"quant_method": "awq"}}, "", "take the original weights"),
}


@pytest.mark.parametrize("case", QUANTISED)
def test_quantised_weights_are_refused_with_the_way_out(case: str, tmp_path: Path) -> None:
    changes, name, remedy = QUANTISED[case]
    model_of(gpt_oss()).save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs/model.safetensors"
    if name:
        save_file({**load_file(path), f"model.layers.0.{name}": np.zeros((2, 2), np.uint8)}, path, {"format": "pt"})
    said = refusal_of(gpt_oss(), tmp_path, **changes) if changes else refusal(tmp_path / "theirs", tmp_path / "ours")
    assert f"the weights are quantised with {case.partition(',')[0]}" in said
    assert remedy in said


def test_float8_weights_are_refused_by_their_numbers(tmp_path: Path) -> None:
    model_of(qwen3()).save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs/model.safetensors"
    found = load_file(path)
    found["model.layers.0.self_attn.q_proj.weight"] = found["model.layers.0.self_attn.q_proj.weight"].astype(
        ml_dtypes.float8_e4m3fn
    )
    save_file(found, path, {"format": "pt"})
    assert "the weights are quantised with fp8 (model.layers.0.self_attn.q_proj" in refusal(
        tmp_path / "theirs", tmp_path / "ours"
    )


SPARSE = {**LLAMA, "num_experts": 8, "moe_ffn_hidden_size": 24}
QK = {**SPARSE, "qk_layernorm": True}
SIGMOID = {
    **MLA,
    "layernorm_epsilon": 1e-6,
    "yarn_mscale_all_dim": 0.7,
    "num_experts": 8,
    "moe_ffn_hidden_size": 24,
    "moe_shared_expert_intermediate_size": 48,
    "moe_router_topk": 4,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_dtype": "fp32",
}
LOWERING: dict[str, tuple[dict[str, Any], str, str]] = {
    "no experts": (LLAMA, "mixtral", "no layer has experts"),
    "experts in some layers": (
        {**SPARSE, "moe_layer_freq": 2},
        "mixtral",
        "there are layers without experts, and the architecture has them in every layer",
    ),
    "shared experts": (
        {**QK, "moe_shared_expert_intermediate_size": 40},
        "qwen3_moe",
        "moe_shared_expert_intermediate_size is 40, in Qwen3MoeForCausalLM None",
    ),
    "no gate of shared experts": (
        {**SPARSE, "moe_shared_expert_intermediate_size": 40, "add_qkv_bias": True},
        "qwen2_moe",
        "moe_shared_expert_gate is False, in Qwen2MoeForCausalLM True",
    ),
    "experts of latents": ({**QK, "moe_latent_size": 16}, "qwen3_moe", "moe_latent_size is 16, in Qwen3Moe"),
    "a capacity": (
        {**SPARSE, "moe_expert_capacity_factor": 1.5},
        "mixtral",
        "moe_expert_capacity_factor is 1.5, in MixtralForCausalLM None",
    ),
    "jitter": ({**SPARSE, "moe_input_jitter_eps": 0.1}, "mixtral", "moe_input_jitter_eps is 0.1, in Mixtral"),
    "sinkhorn": (
        {**SPARSE, "moe_router_load_balancing_type": "sinkhorn"},
        "mixtral",
        "moe_router_load_balancing_type is 'sinkhorn', in MixtralForCausalLM False",
    ),
    "a softmax over all": (
        {**SPARSE, "moe_router_pre_softmax": True},
        "mixtral",
        "moe_router_pre_softmax is True, in MixtralForCausalLM False",
    ),
    "heads for further tokens": ({**QK, "mtp_num_layers": 1}, "qwen3_moe", "mtp_num_layers is 1, in Qwen3Moe"),
    "latents": ({**MLA, **EXPERTS}, "qwen3_moe", "multi_latent_attention is True, in Qwen3MoeForCausalLM False"),
    "layers by turns": (
        {**SIGMOID, "moe_layer_freq": [1, 0]},
        "deepseek_v3",
        "layers without experts come after layers with them; there the first ones are dense",
    ),
    "shared experts of another width": (
        {**SIGMOID, "moe_shared_expert_intermediate_size": 40},
        "deepseek_v3",
        "shared experts are 40 wide; there they are one or more times the 24 of an expert",
    ),
    "an epsilon": (
        {**SIGMOID, "layernorm_epsilon": 1e-5},
        "deepseek_v3",
        "rms_norm_eps: 1e-05; the norms of latents have 1e-06 there whatever it says",
    ),
    "groups ranked by one": (
        {**SIGMOID, "moe_router_num_groups": 8, "moe_router_group_topk": 4},
        "deepseek_v3",
        "groups are ranked by their best 2, in Megatron by their best 1 (4 experts of 4 groups): another choice",
    ),
    "no bias for the choice": (
        {**SIGMOID, "moe_router_enable_expert_bias": False},
        "deepseek_v3",
        "moe_router_enable_expert_bias is False, in DeepseekV3ForCausalLM True",
    ),
    "latents without norms": (
        {**SIGMOID, "qk_layernorm": False},
        "deepseek_v3",
        "qk_layernorm is False, in DeepseekV3ForCausalLM True",
    ),
    "angles weighed by one alone": (
        {**SIGMOID, "yarn_mscale": 0.7, "yarn_mscale_all_dim": 0.0},
        "deepseek_v3",
        "yarn_mscale is 0.7, in DeepseekV3ForCausalLM 1.0",
    ),
    "sharper without a stretch": (
        {**SIGMOID, "rope_type": "rope"},
        "deepseek_v3",
        "yarn_mscale_all_dim is 0.7, in DeepseekV3ForCausalLM 0.0",
    ),
    "weights of several normalised": (
        {**SIGMOID, "moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False},
        "deepseek_v2",
        "moe_router_pre_softmax is False, in DeepseekV2ForCausalLM True",
    ),
    "no sinks": (
        {**SPARSE, "add_bias_linear": True, "moe_router_bias": True, "activation_func": "quick_gelu"},
        "gpt_oss",
        "softmax_type is 'vanilla', in GptOssForCausalLM 'learnable'",
    ),
}


@pytest.mark.parametrize("case", LOWERING)
def test_what_is_another_function_there_is_refused(case: str, tmp_path: Path) -> None:
    options, family, words = LOWERING[case]
    assert words in refusal_to_lower(tiny(**options), family, tmp_path)


@pytest.mark.parametrize(
    "same",
    [
        {"moe_router_pre_softmax": True},  # which sigmoids do not heed
        {"moe_router_num_groups": 4, "moe_router_group_topk": 4},  # all groups
        {"moe_router_num_groups": 4},
        {"moe_router_topk_scaling_factor": 1.0},
        {"moe_layer_freq": [1, 1]},
        {"moe_layer_freq": [0, 1]},
        {"moe_router_num_groups": 4, "moe_router_group_topk": 2, "moe_router_topk_scaling_factor": 2.5},
        {"rope_type": "rope", "yarn_mscale_all_dim": 0.0},  # a stretch of which nothing is left
        {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.1},
    ],
    ids=str,
)
def test_one_function_in_other_words_is_lowered(same: dict[str, Any], tmp_path: Path) -> None:
    ours = tiny(**{**SIGMOID, **same})
    ours.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", to="deepseek_v3")
    theirs = T.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert type(theirs) is T.DeepseekV3ForCausalLM
    torch.testing.assert_close(logits(theirs), logits(ours), atol=1e-5, rtol=1e-5)


def test_a_router_in_other_numbers_is_lowered_and_said(tmp_path: Path) -> None:
    ours = tiny(**{**QK, "moe_router_dtype": "fp32"})
    ours.save_pretrained(tmp_path / "ours")
    plan = convert(tmp_path / "ours", tmp_path / "back", to="qwen3_moe")
    assert any("moe_router_dtype is 'fp32', in Qwen3MoeForCausalLM None" in note for note in plan.notes)
    assert config_of(tmp_path / "back")["num_experts"] == 8
    theirs = T.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    torch.testing.assert_close(logits(theirs), logits(ours), atol=1e-5, rtol=1e-5)
