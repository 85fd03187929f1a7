"""Promise: transformers' mixtures of experts become ours and come back: the same logits, the same bytes.

Every architecture is built small by transformers' own class, in each form it has in the wild.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from families import SIZES, change, loaded, logits, model_of, roundtrip, stored, unheard_of
from safetensors.torch import load_file

from megahf import convert

COMMON = {**SIZES, "tie_word_embeddings": False}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 24}
SHARP = {**YARN, "mscale": 0.707, "mscale_all_dim": 0.5, "beta_fast": 16, "beta_slow": 2}
QWEN = {**COMMON, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
LATENTS = {
    **COMMON,
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "rope_parameters": ROPE,
}
GROUPS = {
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
}
NO_GROUPS = {**GROUPS, "n_group": 1, "topk_group": 1, "norm_topk_prob": True}
OSS = {**COMMON, "head_dim": 8, "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 6}

CLAMP = {"swiglu_limit": 0.7} if "swiglu_limit" in T.GptOssConfig().to_dict() else {}  # earlier ones have 7 written in


def mixtral(**changes: Any) -> T.PretrainedConfig:
    return T.MixtralConfig(**{**COMMON, "num_local_experts": 6, **changes})


def qwen2(**changes: Any) -> T.PretrainedConfig:
    return T.Qwen2MoeConfig(**{**QWEN, "shared_expert_intermediate_size": 40, **changes})


def qwen3(**changes: Any) -> T.PretrainedConfig:
    return T.Qwen3MoeConfig(**{**QWEN, "head_dim": 16, **changes})


def deepseek_v2(**changes: Any) -> T.PretrainedConfig:
    return T.DeepseekV2Config(**{**LATENTS, **GROUPS, "num_experts_per_tok": 3, **changes})


def deepseek_v3(**changes: Any) -> T.PretrainedConfig:
    return T.DeepseekV3Config(**{**LATENTS, **GROUPS, **changes})


def glm4(**changes: Any) -> T.PretrainedConfig:
    return T.Glm4MoeConfig(**{**COMMON, **NO_GROUPS, "head_dim": 16, **changes})


def dots1(**changes: Any) -> T.PretrainedConfig:
    return T.Dots1Config(**{**COMMON, **NO_GROUPS, "head_dim": 8, "sliding_window": None, **changes})


def gpt_oss(**changes: Any) -> T.PretrainedConfig:
    return T.GptOssConfig(**{**OSS, **changes})


CASES: dict[str, Callable[[], T.PretrainedConfig]] = {
    "mixtral": mixtral,
    "mixtral, with a window": lambda: mixtral(sliding_window=7),
    "mixtral, tied": lambda: mixtral(tie_word_embeddings=True, num_experts_per_tok=1),
    "qwen2": qwen2,
    "qwen2, experts in every other layer": lambda: qwen2(decoder_sparse_step=2, norm_topk_prob=True, qkv_bias=False),
    "qwen2, with a window in some layers": lambda: qwen2(
        use_sliding_window=True,
        sliding_window=7,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    ),
    "qwen3": lambda: qwen3(norm_topk_prob=True, tie_word_embeddings=True),
    "qwen3, weights left as they are": lambda: qwen3(norm_topk_prob=False, mlp_only_layers=[0, 2]),
    "qwen3, with a window": lambda: qwen3(use_sliding_window=True, sliding_window=7, rope_parameters=YARN),
    "deepseek v2": lambda: deepseek_v2(routed_scaling_factor=16.0),
    "deepseek v2, in groups": lambda: deepseek_v2(topk_method="group_limited_greedy"),
    "deepseek v2, lite": lambda: deepseek_v2(q_lora_rank=None, first_k_dense_replace=0),
    "deepseek v3": deepseek_v3,
    "deepseek v3, stretched": lambda: deepseek_v3(rope_parameters=SHARP),
    "deepseek v3, stretched as Megatron by itself": lambda: deepseek_v3(rope_parameters=YARN),
    "deepseek v3, without groups": lambda: deepseek_v3(**{**NO_GROUPS, "num_experts_per_tok": 3}, q_lora_rank=None),
    "deepseek v3, one expert a token": lambda: deepseek_v3(
        **{**NO_GROUPS, "num_experts_per_tok": 1, "norm_topk_prob": False}
    ),
    "deepseek v3, dense": lambda: deepseek_v3(first_k_dense_replace=3),
    "glm4": glm4,
    "glm4, with biases and norms": lambda: glm4(attention_bias=True, use_qk_norm=True, routed_scaling_factor=2.5),
    "dots1": dots1,
    "dots1, with a window at the top": lambda: dots1(sliding_window=7, max_window_layers=1),
    "gpt-oss": gpt_oss,
    "gpt-oss, other layers and a tighter clamp": lambda: gpt_oss(
        layer_types=["full_attention", "full_attention", "sliding_attention"], **CLAMP
    ),
    "gpt-oss, not stretched": lambda: gpt_oss(rope_parameters={"rope_type": "default", "rope_theta": 150000.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_comes_and_goes_back_as_it_was(case: str, tmp_path: Path) -> None:
    roundtrip(model_of(CASES[case]()), tmp_path)


@pytest.mark.parametrize("family", [mixtral, qwen2, qwen3, deepseek_v2, deepseek_v3, glm4, dots1, gpt_oss])
def test_no_setting_of_transformers_is_unheard_of(family: Callable[[], T.PretrainedConfig]) -> None:
    assert unheard_of(family()) == set()


def test_a_model_in_many_files_comes_and_goes_back_as_it_was(tmp_path: Path) -> None:
    """Which file an expert is in is nobody's promise: transformers has them in another order in memory."""
    model = model_of(deepseek_v3())
    model.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    convert(tmp_path / "theirs", tmp_path / "ours", to="hf", max_shard_size="30KB")
    convert(tmp_path / "ours", tmp_path / "back", to="deepseek_v3", max_shard_size="30KB")
    assert all(len(list((tmp_path / folder).glob("*.safetensors"))) > 3 for folder in ("theirs", "ours", "back"))
    again = loaded(tmp_path / "back")
    again.set_attn_implementation("eager")
    assert torch.equal(logits(again), logits(model))


def test_a_bias_for_the_choice_stays_float32_beside_bfloat16(tmp_path: Path) -> None:
    model_of(deepseek_v3(), torch.bfloat16).save_pretrained(tmp_path / "new")
    loaded(tmp_path / "new").save_pretrained(tmp_path / "theirs")  # a new one's bias is as narrow as the rest
    convert(tmp_path / "theirs", tmp_path / "ours", to="hf")
    convert(tmp_path / "ours", tmp_path / "back", to="deepseek_v3")
    assert stored(tmp_path / "back") == stored(tmp_path / "theirs")
    kinds = {name: array.dtype for name, array in load_file(tmp_path / "ours/model.safetensors").items()}
    assert {kind for name, kind in kinds.items() if "expert_bias" in name} == {torch.float32}
    assert {kind for name, kind in kinds.items() if "expert_bias" not in name} == {torch.bfloat16}


BEFORE = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 24, "beta_fast": 32, "beta_slow": 1}
OLD: dict[str, tuple[Callable[..., T.PretrainedConfig], dict[str, Any], dict[str, Any]]] = {
    "deepseek_v3": (
        deepseek_v3,
        {"rope_theta": 5000, "rope_scaling": {**BEFORE, "mscale": 1.0, "mscale_all_dim": 1.0}},
        {"rotary_base": 5000.0, "rope_type": "yarn", "yarn_rotary_scaling_factor": 40.0, "yarn_mscale_all_dim": 1.0},
    ),
    "gpt_oss": (
        gpt_oss,
        {"rope_theta": 7000, "rope_scaling": {**BEFORE, "truncate": False}},
        {"rotary_base": 7000.0, "yarn_rotary_scaling_factor": 40.0, "yarn_correction_range_round_to_int": False},
    ),
    "mixtral": (mixtral, {}, {"rotary_base": 1e6, "position_embedding_type": "rope"}),
    "glm4_moe": (glm4, {"partial_rotary_factor": 0.25}, {"rotary_percent": 0.25}),
}


@pytest.mark.parametrize("case", OLD)
def test_rotations_in_the_words_of_transformers_4_are_read(case: str, tmp_path: Path) -> None:
    family, said, expected = OLD[case]
    model_of(family()).save_pretrained(tmp_path / "theirs")
    plan = convert(change(tmp_path / "theirs", "rope_parameters", **said), tmp_path / "ours", to="hf")
    assert {name: getattr(plan.config, name) for name in expected} == expected
    theirs, ours = loaded(tmp_path / "theirs"), loaded(tmp_path / "ours")
    theirs.set_attn_implementation("eager")
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)


# What config.json leaves out, and transformers' class then has.
UNSAID: dict[str, tuple[Callable[..., T.PretrainedConfig], tuple[str, ...]]] = {
    "qwen2_moe": (
        lambda: qwen2(num_key_value_heads=4, shared_expert_intermediate_size=5632, use_sliding_window=False),
        ("rms_norm_eps", "norm_topk_prob", "qkv_bias", "decoder_sparse_step", "shared_expert_intermediate_size"),
    ),
    "deepseek_v3": (
        lambda: deepseek_v3(**{**NO_GROUPS, "n_shared_experts": 1, "first_k_dense_replace": 3}, num_hidden_layers=4),
        ("rms_norm_eps", "first_k_dense_replace", "n_shared_experts", "norm_topk_prob", "routed_scaling_factor"),
    ),
    "gpt_oss": (
        lambda: gpt_oss(sliding_window=128, head_dim=64, num_experts_per_tok=4),
        ("sliding_window", "layer_types", "head_dim", "swiglu_limit", "rope_parameters", "num_experts_per_tok"),
    ),
}


@pytest.mark.parametrize("case", UNSAID)
def test_what_config_json_leaves_out_is_as_in_transformers(case: str, tmp_path: Path) -> None:
    family, unsaid = UNSAID[case]
    model_of(family()).save_pretrained(tmp_path / "theirs")
    convert(change(tmp_path / "theirs", *unsaid), tmp_path / "ours", to="hf")
    theirs = loaded(tmp_path / "theirs")
    theirs.set_attn_implementation("eager")
    torch.testing.assert_close(logits(loaded(tmp_path / "ours")), logits(theirs), atol=1e-5, rtol=1e-5)
