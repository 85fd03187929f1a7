"""Promise: with the same weights multi-latent attention agrees with transformers' DeepSeek-V2 and -V3.

Where the two read the same words differently, Megatron is followed, and a test shows the difference.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny import M, randomise, tokens
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.deepseek_v2 import modeling_deepseek_v2

from megahf.models.configuration_mcore import McoreGPTConfig
from megahf.models.modeling_mcore_gpt import McoreGPTForCausalLM

CLASSES = {"V2": (DeepseekV2Config, DeepseekV2ForCausalLM), "V3": (DeepseekV3Config, DeepseekV3ForCausalLM)}
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 2,  # no layer of experts
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-6,  # written into the norms of latents there, whatever the config says
    "bos_token_id": None,
    "eos_token_id": None,
    "attention_dropout": 0.0,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 24}
YARN |= {"beta_fast": 32, "beta_slow": 1}
ROTATIONS: dict[str, dict[str, Any]] = {
    "rope": {"rope_type": "default", "rope_theta": 500.0},
    "yarn": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    "yarn, sharper": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.5},
    "yarn, Megatron's defaults": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.0},
    "yarn, uneven": {**YARN, "beta_fast": 3.0, "beta_slow": 0.5, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0},
}


def theirs(version: str, rotation: dict[str, Any], **changes: Any) -> Any:
    config, model = CLASSES[version]
    return randomise(model(config(**{**SIZES, "rope_parameters": dict(rotation), **changes}))).eval()


def ours(deepseek: Any, rotation: dict[str, Any], **changes: Any) -> McoreGPTForCausalLM:
    """Megatron's model of the same weights, its fields read off DeepSeek's."""
    c = deepseek.config
    yarn = rotation["rope_type"] == "yarn"
    fields = {
        "vocab_size": c.vocab_size,
        "num_layers": c.num_hidden_layers,
        "hidden_size": c.hidden_size,
        "ffn_hidden_size": c.intermediate_size,
        "num_attention_heads": c.num_attention_heads,
        "max_position_embeddings": c.max_position_embeddings,
        "multi_latent_attention": True,
        "q_lora_rank": c.q_lora_rank,
        "kv_lora_rank": c.kv_lora_rank,
        "qk_head_dim": c.qk_nope_head_dim,
        "qk_pos_emb_head_dim": c.qk_rope_head_dim,
        "v_head_dim": c.v_head_dim,
        "qk_layernorm": True,
        "position_embedding_type": "rope",
        "rope_type": "yarn" if yarn else "rope",
        "rotary_base": rotation["rope_theta"],
        "normalization": "RMSNorm",
        "layernorm_epsilon": c.rms_norm_eps,
        "activation_func": "silu",
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
    }
    if yarn:
        fields |= {
            "yarn_rotary_scaling_factor": rotation["factor"],
            "yarn_original_max_position_embeddings": rotation["original_max_position_embeddings"],
            "yarn_beta_fast": rotation["beta_fast"],
            "yarn_beta_slow": rotation["beta_slow"],
            "yarn_mscale": rotation["mscale"],
            "yarn_mscale_all_dim": rotation["mscale_all_dim"],
        }
    return filled(McoreGPTForCausalLM(McoreGPTConfig(**{**fields, **changes})), pack(deepseek.state_dict()))


def filled(model: M, weights: dict[str, Tensor]) -> M:
    model.load_state_dict(weights, strict=True)
    return model.eval()


def pack(hf: dict[str, Tensor]) -> dict[str, Tensor]:
    """DeepSeek's names and separate gate and up as Megatron's."""
    names = {
        "self_attn.q_proj": "self_attention.linear_q_proj",
        "self_attn.q_a_proj": "self_attention.linear_q_down_proj",
        "self_attn.q_a_layernorm": "self_attention.linear_q_up_proj_layernorm",
        "self_attn.q_b_proj": "self_attention.linear_q_up_proj",
        "self_attn.kv_a_proj_with_mqa": "self_attention.linear_kv_down_proj",
        "self_attn.kv_a_layernorm": "self_attention.linear_kv_up_proj_layernorm",
        "self_attn.kv_b_proj": "self_attention.linear_kv_up_proj",
        "self_attn.o_proj": "self_attention.linear_proj",
        "input_layernorm": "input_layernorm",
        "post_attention_layernorm": "mlp.linear_fc1_layernorm",
        "mlp.down_proj": "mlp.linear_fc2",
    }
    packed = {
        "model.embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        "model.decoder.final_layernorm.weight": hf["model.norm.weight"],
        "output_layer.weight": hf["lm_head.weight"],
    }
    for layer in range(2):
        old, new = f"model.layers.{layer}.", f"model.decoder.layers.{layer}."
        halves = [hf[f"{old}mlp.{half}_proj.weight"] for half in ("gate", "up")]
        packed[f"{new}mlp.linear_fc1.weight"] = torch.cat(halves)
        for their, our in names.items():
            if f"{old}{their}.weight" in hf:
                packed[f"{new}{our}.weight"] = hf[f"{old}{their}.weight"]
    return packed


@pytest.mark.parametrize("rank", [None, 12])
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("version", CLASSES)
@torch.no_grad()
def test_logits_agree_with_deepseek(version: str, rotation: str, rank: int | None) -> None:
    sharpened = version == "V3" or hasattr(modeling_deepseek_v2, "yarn_get_mscale")
    if "mscale_all_dim" in ROTATIONS[rotation] and not sharpened:
        pytest.skip("this version of transformers leaves mscale_all_dim out of DeepSeek-V2's scores")
    deepseek = theirs(version, ROTATIONS[rotation], q_lora_rank=rank)
    ids = tokens(2, 40)
    expected = deepseek(ids).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(deepseek, ROTATIONS[rotation])(ids).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_generation_agrees_with_deepseek(cache: str) -> None:
    deepseek = theirs("V3", ROTATIONS["yarn, sharper"])
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    expected = deepseek.generate(tokens(2, 9), **options)
    assert len(set(expected[:, 9:].flatten().tolist())) > 4
    model = ours(deepseek, ROTATIONS["yarn, sharper"])
    options |= {"cache_implementation": cache, "disable_compile": True}
    assert torch.equal(model.generate(tokens(2, 9), **options), expected)


def scales(model: McoreGPTForCausalLM) -> tuple[float, float]:
    """What a score is multiplied by, and what cosines and sines are."""
    return model.model.decoder.layers[0].self_attention.scaling, model.model.rotary_pos_emb.concentration


@torch.no_grad()
def test_a_stretch_counts_under_rope_too_as_in_megatron() -> None:
    """DeepSeek sharpens attention where its rope_type is yarn, Megatron wherever there is a factor."""
    deepseek = theirs("V3", ROTATIONS["rope"])
    plain = ours(deepseek, ROTATIONS["rope"])
    sharper = ours(deepseek, ROTATIONS["rope"], yarn_rotary_scaling_factor=40.0, yarn_mscale_all_dim=1.0)
    m = 0.1 * math.log(40) + 1
    assert scales(plain) == (pytest.approx(12**-0.5), 1.0)
    assert scales(sharper) == (pytest.approx(m * m * 12**-0.5), 1.0)
    expected = deepseek(tokens(2, 40)).logits
    torch.testing.assert_close(plain(tokens(2, 40)).logits, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(sharper(tokens(2, 40)).logits, expected, atol=1e-2)


@torch.no_grad()
def test_an_mscale_of_zero_is_a_weight_as_in_megatron() -> None:
    """transformers takes an `mscale` of 0 for one that is not given, and then neither counts for the angles."""
    rotation = {**YARN, "mscale": 0.0, "mscale_all_dim": 0.5}
    deepseek = theirs("V3", rotation)
    model = ours(deepseek, rotation)
    m = 0.05 * math.log(4) + 1
    assert scales(model) == (pytest.approx(m * m * 12**-0.5), pytest.approx(1 / m))
    assert deepseek.model.rotary_emb.attention_scaling == pytest.approx(0.1 * math.log(4) + 1)
    assert not torch.allclose(model(tokens(2, 40)).logits, deepseek(tokens(2, 40)).logits, atol=1e-2)


@torch.no_grad()
def test_norms_of_latents_have_the_models_epsilon_as_in_megatron() -> None:
    """transformers' norms of latents have 1e-6, whatever rms_norm_eps says."""
    deepseek = theirs("V3", ROTATIONS["rope"], rms_norm_eps=0.1)
    attention = ours(deepseek, ROTATIONS["rope"]).model.decoder.layers[0].self_attention
    assert attention.linear_kv_up_proj_layernorm.eps == attention.linear_q_up_proj_layernorm.eps == 0.1
    assert deepseek.model.layers[0].self_attn.kv_a_layernorm.variance_epsilon == 1e-6
