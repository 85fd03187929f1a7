"""Promise: on the same weights our GPT gives the logits of transformers' own models, to 1e-5.

transformers' Llama, Qwen, GPT-2, GPT-NeoX, Nemotron, Mistral and GPT-OSS are built small with random weights; these
are packed into Megatron's layout here, by hand and not by the project's tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as T
from tiny import LLAMA, randomise, tiny_config, tokens
from torch import Tensor

from megahf.models.modeling_mcore_gpt import McoreGPTForCausalLM

Weights = dict[str, Tensor]
COMMON = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
HF_LLAMA = {**COMMON, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 96}


def pack_qkv(query: Tensor, key: Tensor, value: Tensor, groups: int) -> Tensor:
    """For each group its queries, its key, its value."""
    parts = [x.unflatten(0, (groups, -1)) for x in (query, key, value)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def turned(x: Tensor) -> Tensor:
    return x.T if x.dim() == 2 else x


def pack_llama(hf: Weights, prefix: str = "model.") -> Weights:
    """Weights of Llama and its kin: Qwen2, Qwen3, Mistral, Nemotron (whose MLP has no gate)."""
    ours = {"embedding.word_embeddings.weight": hf[f"{prefix}embed_tokens.weight"]}
    for kind in ("weight", "bias"):
        if f"{prefix}norm.{kind}" in hf:
            ours[f"decoder.final_layernorm.{kind}"] = hf[f"{prefix}norm.{kind}"]
    for layer in range(COMMON["num_hidden_layers"]):
        old, new = f"{prefix}layers.{layer}.", f"decoder.layers.{layer}."
        for kind in ("weight", "bias"):
            qkv = [hf.get(f"{old}self_attn.{x}_proj.{kind}") for x in "qkv"]
            if qkv[0] is not None:
                ours[f"{new}self_attention.linear_qkv.{kind}"] = pack_qkv(*qkv, groups=2)
            gate, up = hf.get(f"{old}mlp.gate_proj.{kind}"), hf.get(f"{old}mlp.up_proj.{kind}")
            if up is not None:
                ours[f"{new}mlp.linear_fc1.{kind}"] = up if gate is None else torch.cat((gate, up))
            for theirs, mine in (
                ("self_attn.o_proj", "self_attention.linear_proj"),
                ("self_attn.q_norm", "self_attention.q_layernorm"),
                ("self_attn.k_norm", "self_attention.k_layernorm"),
                ("mlp.down_proj", "mlp.linear_fc2"),
                ("input_layernorm", "self_attention.linear_qkv_layernorm"),
                ("post_attention_layernorm", "mlp.linear_fc1_layernorm"),
            ):
                if f"{old}{theirs}.{kind}" in hf:
                    ours[f"{new}{mine}.{kind}"] = hf[f"{old}{theirs}.{kind}"]
    return ours


def pack_gpt2(hf: Weights) -> Weights:
    """GPT-2 keeps matrices transposed, and q, k, v one after the other."""
    ours = {
        "embedding.word_embeddings.weight": hf["transformer.wte.weight"],
        "embedding.position_embeddings.weight": hf["transformer.wpe.weight"],
    }
    for kind in ("weight", "bias"):
        ours[f"decoder.final_layernorm.{kind}"] = hf[f"transformer.ln_f.{kind}"]
        for layer in range(COMMON["num_hidden_layers"]):
            old, new = f"transformer.h.{layer}.", f"decoder.layers.{layer}."
            ours[f"{new}self_attention.linear_qkv.{kind}"] = pack_qkv(
                *turned(hf[f"{old}attn.c_attn.{kind}"]).chunk(3), groups=4
            )
            ours[f"{new}self_attention.linear_proj.{kind}"] = turned(hf[f"{old}attn.c_proj.{kind}"])
            ours[f"{new}mlp.linear_fc1.{kind}"] = turned(hf[f"{old}mlp.c_fc.{kind}"])
            ours[f"{new}mlp.linear_fc2.{kind}"] = turned(hf[f"{old}mlp.c_proj.{kind}"])
            ours[f"{new}self_attention.linear_qkv_layernorm.{kind}"] = hf[f"{old}ln_1.{kind}"]
            ours[f"{new}mlp.linear_fc1_layernorm.{kind}"] = hf[f"{old}ln_2.{kind}"]
    return ours


def pack_neox(hf: Weights) -> Weights:
    """GPT-NeoX packs q, k, v head by head, which is Megatron's packing of one head a group."""
    pairs = {
        "attention.query_key_value": "self_attention.linear_qkv",
        "attention.dense": "self_attention.linear_proj",
        "mlp.dense_h_to_4h": "mlp.linear_fc1",
        "mlp.dense_4h_to_h": "mlp.linear_fc2",
        "input_layernorm": "self_attention.linear_qkv_layernorm",
        "post_attention_layernorm": "mlp.linear_fc1_layernorm",
    }
    ours = {
        "embedding.word_embeddings.weight": hf["gpt_neox.embed_in.weight"],
    }
    for kind in ("weight", "bias"):
        ours[f"decoder.final_layernorm.{kind}"] = hf[f"gpt_neox.final_layer_norm.{kind}"]
        for layer in range(COMMON["num_hidden_layers"]):
            for old, new in pairs.items():
                ours[f"decoder.layers.{layer}.{new}.{kind}"] = hf[f"gpt_neox.layers.{layer}.{old}.{kind}"]
    return ours


def pack_gpt_oss(hf: Weights) -> Weights:
    """GPT-OSS with one expert is a dense model; its expert keeps gate and up row by row, transposed."""
    ours = pack_llama(hf)
    for layer in range(COMMON["num_hidden_layers"]):
        old, new = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        ours[f"{new}self_attention.core_attention.softmax_offset"] = hf[f"{old}self_attn.sinks"]
        for theirs, mine in (("gate_up_proj", "weight"), ("gate_up_proj_bias", "bias")):
            rows = turned(hf[f"{old}mlp.experts.{theirs}"][0])
            ours[f"{new}mlp.linear_fc1.{mine}"] = torch.cat((rows[::2], rows[1::2]))
        ours[f"{new}mlp.linear_fc2.weight"] = hf[f"{old}mlp.experts.down_proj"][0].T
        ours[f"{new}mlp.linear_fc2.bias"] = hf[f"{old}mlp.experts.down_proj_bias"][0]
    return ours


def rope(**parameters: Any) -> dict[str, Any]:
    return {**HF_LLAMA, "rope_parameters": {"rope_theta": 10000.0, **parameters}}


OSS_YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
CASES: dict[str, tuple[type, type, dict[str, Any], Callable[[Weights], Weights], dict[str, Any]]] = {
    "llama": (T.LlamaConfig, T.LlamaForCausalLM, {**HF_LLAMA, "rms_norm_eps": 1e-5}, pack_llama, LLAMA),
    "llama 3.1": (
        T.LlamaConfig,
        T.LlamaForCausalLM,
        rope(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        )
        | {"rms_norm_eps": 1e-5},
        pack_llama,
        {**LLAMA, "use_rope_scaling": True},
    ),
    "llama, positions divided": (
        T.LlamaConfig,
        T.LlamaForCausalLM,
        rope(rope_type="linear", factor=4.0) | {"rms_norm_eps": 1e-5},
        pack_llama,
        {**LLAMA, "rotary_seq_len_interpolation_factor": 4.0},
    ),
    "llama with YaRN": (
        T.LlamaConfig,
        T.LlamaForCausalLM,
        rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=24, mscale=1.0, mscale_all_dim=0.5)
        | {"rms_norm_eps": 1e-5},
        pack_llama,
        {
            **LLAMA,
            "position_embedding_type": "yarn",
            "yarn_rotary_scaling_factor": 4.0,
            "yarn_original_max_position_embeddings": 24,
            "yarn_mscale_all_dim": 0.5,
        },
    ),
    "qwen2": (
        T.Qwen2Config,
        T.Qwen2ForCausalLM,
        {**HF_LLAMA, "rms_norm_eps": 1e-6},
        pack_llama,
        {**LLAMA, "add_qkv_bias": True, "layernorm_epsilon": 1e-6},
    ),
    "qwen3": (
        T.Qwen3Config,
        T.Qwen3ForCausalLM,
        {**HF_LLAMA, "rms_norm_eps": 1e-6},
        pack_llama,
        {**LLAMA, "qk_layernorm": True, "layernorm_epsilon": 1e-6},
    ),
    "mistral with a window": (
        T.MistralConfig,
        T.MistralForCausalLM,
        {**HF_LLAMA, "sliding_window": 6, "rms_norm_eps": 1e-5},
        pack_llama,
        {**LLAMA, "window_size": [5, 0]},
    ),
    "nemotron": (
        T.NemotronConfig,
        T.NemotronForCausalLM,
        {**HF_LLAMA, "partial_rotary_factor": 0.5},
        pack_llama,
        {
            "position_embedding_type": "rope",
            "rotary_percent": 0.5,
            "layernorm_zero_centered_gamma": True,
            "activation_func": "squared_relu",
            "add_bias_linear": False,
            "tie_word_embeddings": False,
        },
    ),
    "gpt2": (
        T.GPT2Config,
        T.GPT2LMHeadModel,
        {
            "vocab_size": 61,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_inner": 48,
            "n_positions": 96,
            "tie_word_embeddings": False,
        },
        pack_gpt2,
        {"num_query_groups": 4, "tie_word_embeddings": False},
    ),
    "gpt neox": (
        T.GPTNeoXConfig,
        T.GPTNeoXForCausalLM,
        {**COMMON, "intermediate_size": 48, "use_parallel_residual": False, "max_position_embeddings": 96},
        pack_neox,
        {
            "num_query_groups": 4,
            "position_embedding_type": "rope",
            "rotary_percent": 0.25,
            "activation_func": "gelu",
            "tie_word_embeddings": False,
        },
    ),
    "gpt-oss with one expert": (
        T.GptOssConfig,
        T.GptOssForCausalLM,
        {
            **HF_LLAMA,
            "num_local_experts": 1,
            "num_experts_per_tok": 1,
            "sliding_window": 6,
            "rope_parameters": {**OSS_YARN, "rope_theta": 150000.0, "original_max_position_embeddings": 4096},
        },
        pack_gpt_oss,
        {
            **LLAMA,
            "add_bias_linear": True,
            "activation_func": "quick_gelu",
            "activation_func_clamp_value": 0.7,
            "glu_linear_offset": 1.0,
            "softmax_type": "learnable",
            "window_size": [5, 0],
            "window_attn_skip_freq": 2,
            "position_embedding_type": "yarn",
            "rotary_base": 150000.0,
            "yarn_rotary_scaling_factor": 32.0,
            "yarn_mscale": None,
            "yarn_correction_range_round_to_int": False,
        },
    ),
}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case: str, implementation: str) -> None:
    config_class, model_class, sizes, pack, options = CASES[case]
    theirs = randomise(model_class._from_config(config_class(**sizes), attn_implementation="eager")).eval()
    for module in theirs.modules():
        if hasattr(module, "limit"):  # GPT-OSS's clamp, a field of its config only in later versions
            module.limit = options["activation_func_clamp_value"]
    ours = McoreGPTForCausalLM._from_config(tiny_config(**options), attn_implementation=implementation).eval()
    ours.model.load_state_dict(pack(theirs.state_dict()))
    ours.output_layer.load_state_dict({"weight": theirs.get_output_embeddings().weight})
    ids = tokens(2, 40)
    with torch.no_grad():
        expected, got = theirs(ids).logits, ours(ids).logits
    assert expected.abs().max() > 1, "the logits are too small to tell a right model from a wrong one"
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
