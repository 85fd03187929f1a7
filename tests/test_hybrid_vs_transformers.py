"""Promise: on the same weights our hybrid gives the logits of transformers' own models, to 1e-5.

transformers' NemotronH, Mamba2, Bamba and Mamba are built small with random weights; these are packed into Megatron's
layout here, by hand and not by the project's tables. NemotronH holds time steps above `time_step_min` in a prefill,
which Megatron does not, and all of them have one epsilon for the blocks' norms and the gated norm, which is Megatron's
own 1e-5 in the latter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as T
from test_model_vs_transformers import pack_qkv
from tiny import EXPERTS, MIXER, SIZES, randomise, remember, tokens
from torch import Tensor

from megahf.models.configuration_mcore_hybrid import McoreHybridConfig
from megahf.models.modeling_mcore_hybrid import McoreHybridForCausalLM

Weights = dict[str, Tensor]
COMMON = {"vocab_size": 61, "hidden_size": 32, "tie_word_embeddings": False, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
PATTERN = "M-M*EME*-"


def pack_nemotron(hf: Weights) -> Weights:
    """A symbol of NemotronH's pattern is a layer here too."""
    ours = {"embedding.word_embeddings.weight": hf["model.embeddings.weight"]}
    ours["decoder.final_norm.weight"] = hf["model.norm_f.weight"]
    for layer, symbol in enumerate(PATTERN):
        old, new = f"model.layers.{layer}.mixer.", f"decoder.layers.{layer}."
        own = {name.removeprefix(old): weight for name, weight in hf.items() if name.startswith(old)}
        norm = hf[f"model.layers.{layer}.norm.weight"]
        if symbol == "M":
            ours |= {f"{new}mixer.{name}": weight for name, weight in own.items()}
            ours[f"{new}mixer.in_proj_layernorm.weight"] = norm
        elif symbol == "*":
            qkv = [own[f"{x}_proj.weight"] for x in "qkv"]
            ours[f"{new}self_attention.linear_qkv.weight"] = pack_qkv(*qkv, groups=2)
            ours[f"{new}self_attention.linear_proj.weight"] = own["o_proj.weight"]
            ours[f"{new}self_attention.linear_qkv_layernorm.weight"] = norm
        elif symbol == "-":
            ours[f"{new}mlp.linear_fc1.weight"] = own["up_proj.weight"]
            ours[f"{new}mlp.linear_fc2.weight"] = own["down_proj.weight"]
            ours[f"{new}mlp.linear_fc1_layernorm.weight"] = norm
        else:
            ours |= pack_experts(own, f"{new}mlp.")
            ours[f"{new}pre_mlp_layernorm.weight"] = norm
    return ours


def pack_experts(hf: Weights, prefix: str) -> Weights:
    pairs = {
        "gate.weight": "router.weight",
        "gate.e_score_correction_bias": "router.expert_bias",
        "experts.up_proj": "experts.gate_up_proj",
        "experts.down_proj": "experts.down_proj",
        "shared_experts.up_proj.weight": "shared_experts.linear_fc1.weight",
        "shared_experts.down_proj.weight": "shared_experts.linear_fc2.weight",
        "fc1_latent_proj.weight": "fc1_latent_proj.weight",
        "fc2_latent_proj.weight": "fc2_latent_proj.weight",
    }
    return {f"{prefix}{ours}": hf[theirs] for theirs, ours in pairs.items() if theirs in hf}


def pack_mamba(hf: Weights) -> Weights:
    """Mamba and Mamba2 name a mixer's weights as Megatron does."""
    ours = {"embedding.word_embeddings.weight": hf["backbone.embeddings.weight"]}
    ours["decoder.final_norm.weight"] = hf["backbone.norm_f.weight"]
    for name, weight in hf.items():
        if name.startswith("backbone.layers."):
            layer, rest = name.removeprefix("backbone.layers.").split(".", 1)
            rest = "mixer.in_proj_layernorm.weight" if rest == "norm.weight" else rest
            ours[f"decoder.layers.{layer}.{rest}"] = weight
    return ours


def pack_bamba(hf: Weights) -> Weights:
    """Bamba's layers are two of these: a mixer or attention, and an MLP."""
    ours = {"embedding.word_embeddings.weight": hf["model.embed_tokens.weight"]}
    ours["decoder.final_norm.weight"] = hf["model.final_layernorm.weight"]
    for layer in range(3):
        old, new, mlp = f"model.layers.{layer}.", f"decoder.layers.{2 * layer}.", f"decoder.layers.{2 * layer + 1}.mlp."
        if f"{old}mamba.in_proj.weight" in hf:
            own = {name: weight for name, weight in hf.items() if name.startswith(f"{old}mamba.")}
            ours |= {name.replace(f"{old}mamba.", f"{new}mixer."): weight for name, weight in own.items()}
            ours[f"{new}mixer.in_proj_layernorm.weight"] = hf[f"{old}input_layernorm.weight"]
        else:
            qkv = [hf[f"{old}self_attn.{x}_proj.weight"] for x in "qkv"]
            ours[f"{new}self_attention.linear_qkv.weight"] = pack_qkv(*qkv, groups=2)
            ours[f"{new}self_attention.linear_proj.weight"] = hf[f"{old}self_attn.o_proj.weight"]
            ours[f"{new}self_attention.linear_qkv_layernorm.weight"] = hf[f"{old}input_layernorm.weight"]
        gate, up = (hf[f"{old}feed_forward.{half}_proj.weight"] for half in ("gate", "up"))
        ours[f"{mlp}linear_fc1.weight"] = torch.cat((gate, up))
        ours[f"{mlp}linear_fc2.weight"] = hf[f"{old}feed_forward.down_proj.weight"]
        ours[f"{mlp}linear_fc1_layernorm.weight"] = hf[f"{old}pre_ff_layernorm.weight"]
    return ours


NEMOTRON = {
    **COMMON,
    **HEADS,
    "hybrid_override_pattern": PATTERN,
    "head_dim": 8,
    "ssm_state_size": 8,
    "mamba_num_heads": 10,  # not of twice the hidden size
    "mamba_head_dim": 8,
    "n_groups": 2,
    "chunk_size": 16,
    "n_routed_experts": 4,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
    "routed_scaling_factor": 2.5,
    "time_step_min": 1e-30,  # 0 fails where its own initialisation takes the logarithm
}
OURS_NEMOTRON = {
    **EXPERTS,
    "hybrid_layer_pattern": PATTERN,
    "mamba_num_heads": 10,
    "position_embedding_type": "none",
    "activation_func": "squared_relu",
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 2.5,
}
MAMBA2 = {
    **COMMON,
    "num_hidden_layers": 3,
    "num_heads": 8,
    "head_dim": 8,
    "state_size": 8,
    "n_groups": 2,
    "chunk_size": 16,
    "residual_in_fp32": False,
}
MAMBA = {**COMMON, "num_hidden_layers": 3, "state_size": 8, "residual_in_fp32": False}
BAMBA = {
    **COMMON,
    **HEADS,
    "num_hidden_layers": 3,
    "attn_layer_indices": [1],
    "mamba_n_heads": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
}
OURS_BAMBA = {
    "hybrid_layer_pattern": "M-*-M-",
    "position_embedding_type": "rope",
    "rotary_percent": 0.5,
    "activation_func": "silu",
    "gated_linear_unit": True,
}
OURS_MAMBA = {"hybrid_layer_pattern": "MMM", "position_embedding_type": "none"}
CASES: dict[str, tuple[type, type, dict[str, Any], Callable[[Weights], Weights], dict[str, Any]]] = {
    "nemotron-h": (T.NemotronHConfig, T.NemotronHForCausalLM, NEMOTRON, pack_nemotron, OURS_NEMOTRON),
    "nemotron-h with latent experts": (
        T.NemotronHConfig,
        T.NemotronHForCausalLM,
        {**NEMOTRON, "moe_latent_size": 16},
        pack_nemotron,
        {**OURS_NEMOTRON, "moe_latent_size": 16},
    ),
    "mamba2": (T.Mamba2Config, T.Mamba2ForCausalLM, MAMBA2, pack_mamba, OURS_MAMBA),
    "bamba": (T.BambaConfig, T.BambaForCausalLM, BAMBA, pack_bamba, OURS_BAMBA),
    "mamba": (T.MambaConfig, T.MambaForCausalLM, MAMBA, pack_mamba, {**OURS_MAMBA, "mamba_version": 1}),
}


def pair(case: str) -> tuple[T.PreTrainedModel, McoreHybridForCausalLM]:
    """transformers' model with random weights, and ours with the same."""
    config_class, model_class, sizes, pack, options = CASES[case]
    theirs = remember(randomise(model_class._from_config(config_class(**sizes), attn_implementation="eager"))).eval()
    for name, buffer in theirs.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(-0.3, 0.3, len(buffer)))
    plain = {"normalization": "RMSNorm", "add_bias_linear": False, "tie_word_embeddings": False}
    sizes = {name: size for name, size in {**SIZES, **MIXER}.items() if name != "num_layers"}
    ours = McoreHybridForCausalLM(McoreHybridConfig(**{**sizes, **plain, **options})).eval()
    ours.model.load_state_dict(pack(theirs.state_dict()))
    ours.output_layer.load_state_dict({"weight": theirs.get_output_embeddings().weight})
    return theirs, ours


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_equal_those_of_transformers(case: str) -> None:
    theirs, ours = pair(case)
    ids = tokens(2, 40)
    expected, got = theirs(ids).logits, ours(ids).logits
    assert expected.abs().max() > 1, "the logits are too small to tell a right model from a wrong one"
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["nemotron-h", "bamba"])
def test_what_is_generated_equals_what_transformers_generates(case: str) -> None:
    theirs, ours = pair(case)
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    assert torch.equal(ours.generate(tokens(2, 9), **options), theirs.generate(tokens(2, 9), **options))


@pytest.mark.parametrize("case", ["nemotron-h", "mamba2", "bamba"])
def test_gradients_equal_those_of_transformers(case: str) -> None:
    theirs, ours = pair(case)
    ids = tokens(2, 24)
    for model in (theirs, ours):
        model.train()
        model(ids, labels=ids).loss.backward()
    pack = CASES[case][3]
    gradients = {name: x.grad for name, x in theirs.named_parameters()}
    buffers = {name: torch.zeros_like(x) for name, x in theirs.named_buffers() if name.endswith("correction_bias")}
    expected = {name: x for name, x in pack({**gradients, **buffers}).items() if not name.endswith("expert_bias")}
    found = {name: parameter.grad for name, parameter in ours.model.named_parameters()}
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-6)
