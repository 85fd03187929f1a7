"""Promise: on the same weights our mixtures of experts are transformers' where the mathematics agree, else Megatron's.

Mixtral, Qwen3-MoE, Qwen2-MoE and DeepSeek's layers are built small with random weights, packed into ours by hand. Where
Megatron's routing differs, its own function says what is right, and theirs must be seen to say something else.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from test_model_vs_transformers import HF_LLAMA, Weights, pack_llama
from tiny import LLAMA, randomise, tiny_config, tokens
from torch import Tensor
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from megahf.models.modeling_mcore_gpt import McoreGPTForCausalLM
from megahf.models.moe import MoELayer
from megahf.models.router import TopKRouter

IMPLEMENTATIONS = ["megahf", "eager", "batched_mm", "grouped_mm"]
MOE: dict[str, Any] = {**LLAMA, "num_experts": 8, "moe_ffn_hidden_size": 24}
QWEN = {**HF_LLAMA, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "rms_norm_eps": 1e-6}
OURS_QWEN = {**MOE, "moe_router_topk": 3, "layernorm_epsilon": 1e-6}
MIXTRAL = {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
CASES: dict[str, tuple[type, type, dict[str, Any], dict[str, Any]]] = {
    "mixtral": (
        T.MixtralConfig,
        T.MixtralForCausalLM,
        {**HF_LLAMA, "intermediate_size": 24, "num_local_experts": 8, "sliding_window": None, **MIXTRAL},
        MOE,
    ),
    "qwen3, weights of those chosen normalised": (
        T.Qwen3MoeConfig,
        T.Qwen3MoeForCausalLM,
        {**QWEN, "norm_topk_prob": True},
        {**OURS_QWEN, "qk_layernorm": True},
    ),
    "qwen3, weights left as they are": (
        T.Qwen3MoeConfig,
        T.Qwen3MoeForCausalLM,
        {**QWEN, "norm_topk_prob": False},
        {**OURS_QWEN, "qk_layernorm": True, "moe_router_pre_softmax": True},
    ),
    "qwen3, every other layer dense": (
        T.Qwen3MoeConfig,
        T.Qwen3MoeForCausalLM,
        {**QWEN, "norm_topk_prob": True, "mlp_only_layers": [1]},
        {**OURS_QWEN, "qk_layernorm": True, "moe_layer_freq": 2},
    ),
    "qwen2": (
        T.Qwen2MoeConfig,
        T.Qwen2MoeForCausalLM,
        {**QWEN, "norm_topk_prob": False, "shared_expert_intermediate_size": 40},
        {
            **OURS_QWEN,
            "add_qkv_bias": True,
            "moe_router_pre_softmax": True,
            "moe_shared_expert_intermediate_size": 40,
            "moe_shared_expert_gate": True,
        },
    ),
}


def pack_mlp(hf: Weights, theirs: str) -> Weights:
    """Router, experts and shared experts of one layer, by our names."""
    names = {
        "gate.weight": "router.weight",
        "gate.e_score_correction_bias": "router.expert_bias",
        "experts.gate_up_proj": "experts.gate_up_proj",
        "experts.down_proj": "experts.down_proj",
        "shared_expert_gate.weight": "shared_experts.gate_weight",
        "shared_expert.down_proj.weight": "shared_experts.linear_fc2.weight",
        "shared_experts.down_proj.weight": "shared_experts.linear_fc2.weight",
    }
    ours = {mine: hf[theirs + name] for name, mine in names.items() if theirs + name in hf}
    for shared in ("shared_expert.", "shared_experts."):
        if f"{theirs}{shared}up_proj.weight" in hf:
            both = [hf[f"{theirs}{shared}{part}_proj.weight"] for part in ("gate", "up")]
            ours["shared_experts.linear_fc1.weight"] = torch.cat(both)
    return ours


def pack(hf: Weights) -> Weights:
    ours = pack_llama(hf)
    for layer in range(2):
        new = f"decoder.layers.{layer}."
        experts = pack_mlp(hf, f"model.layers.{layer}.mlp.")
        if experts:
            ours[f"{new}pre_mlp_layernorm.weight"] = ours.pop(f"{new}mlp.linear_fc1_layernorm.weight")
            ours.update({f"{new}mlp.{name}": weight for name, weight in experts.items()})
    return ours


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case: str, implementation: str) -> None:
    config_class, model_class, sizes, options = CASES[case]
    theirs = randomise(model_class._from_config(config_class(**sizes), experts_implementation="eager")).eval()
    config = tiny_config(**options)
    ours = McoreGPTForCausalLM._from_config(config, experts_implementation=implementation).eval()
    ours.model.load_state_dict(pack(theirs.state_dict()))
    ours.output_layer.load_state_dict({"weight": theirs.get_output_embeddings().weight})
    ids = tokens(2, 40)
    with torch.no_grad():
        expected, got = theirs(ids).logits, ours(ids).logits
    assert ours.config._experts_implementation == implementation
    assert expected.abs().max() > 1, "the logits are too small to tell a right model from a wrong one"
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def deepseek(version: int, **options: Any) -> torch.nn.Module:
    """DeepSeek's layer of 16 experts in 4 groups, 2 of which are kept, and one shared expert."""
    sizes = {
        "hidden_size": 32,
        "moe_intermediate_size": 24,
        "n_routed_experts": 16,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.5,
    }
    kind = {2: (T.DeepseekV2Config, DeepseekV2Moe), 3: (T.DeepseekV3Config, DeepseekV3MoE)}[version]
    config = kind[0](**{**sizes, **({"topk_method": "group_limited_greedy"} if version == 2 else {}), **options})
    config._experts_implementation = "eager"
    layer = randomise(kind[1](config)).eval()
    if version == 3:
        layer.gate.e_score_correction_bias.copy_(0.2 * torch.randn(16, generator=torch.Generator().manual_seed(5)))
    return layer


def megahf_options(version: int, topk: int) -> dict[str, Any]:
    scores = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    return {
        **MOE,
        **(scores if version == 3 else {"moe_router_pre_softmax": True}),
        "num_experts": 16,
        "moe_router_topk": topk,
        "moe_router_num_groups": 4,
        "moe_router_group_topk": 2,
        "moe_router_topk_scaling_factor": 2.5,
        "moe_shared_expert_intermediate_size": 24,
        "moe_router_dtype": "fp32",
    }


@pytest.mark.parametrize(("version", "topk"), [(2, 2), (3, 4)])
def test_deepseeks_layers_are_ours_where_they_rank_groups_as_megatron_does(version: int, topk: int) -> None:
    theirs = deepseek(version, num_experts_per_tok=topk)
    ours = MoELayer(tiny_config(**megahf_options(version, topk))).eval()
    ours.load_state_dict(pack_mlp(theirs.state_dict(), ""))
    hidden = torch.randn(2, 20, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(hidden), theirs(hidden), atol=1e-5, rtol=1e-5)


MEGATRON = """
import sys, torch
from megahf.judge import cpu
cpu.patch()
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function as route
cases = torch.load(sys.argv[1])
torch.save({name: route(**case)[0] for name, case in cases.items()}, sys.argv[2])
"""
LOGITS = torch.randn(200, 16, generator=torch.Generator().manual_seed(2))
BIAS = 0.1 * torch.randn(16, generator=torch.Generator().manual_seed(3))
SIGMOID = {"score_function": "sigmoid", "scaling_factor": 2.5}
IN_GROUPS = {"num_groups": 4, "group_topk": 2}
DIFFERENCES: dict[str, dict[str, Any]] = {
    "fill": {**SIGMOID, **IN_GROUPS, "topk": 4, "expert_bias": BIAS - 3.0},
    "normalisation": {**SIGMOID, "topk": 1, "expert_bias": BIAS},
    "no normalisation before softmax": {"topk": 3, "use_pre_softmax": True},
    "top of groups": {**SIGMOID, **IN_GROUPS, "topk": 6, "expert_bias": BIAS},
    "top of groups, version 2": {**IN_GROUPS, "topk": 6, "use_pre_softmax": True, "scaling_factor": 2.5},
}


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Weights `[t, E]` that megatron-core's own routing gives the experts in each case."""
    if importlib.util.find_spec("megatron") is None:
        pytest.skip("megatron-core is not installed")
    folder = tmp_path_factory.mktemp("routing")
    torch.save({name: {"logits": LOGITS, **case} for name, case in DIFFERENCES.items()}, folder / "cases.pt")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", MEGATRON, str(folder / "cases.pt"), str(folder / "results.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "results.pt")


def our_weights(case: dict[str, Any]) -> Tensor:
    """Weights `[t, E]` of our router on the same logits."""
    fields = {
        "num_experts": 16,
        "moe_router_topk": case["topk"],
        "moe_router_score_function": case.get("score_function", "softmax"),
        "moe_router_pre_softmax": case.get("use_pre_softmax", False),
        "moe_router_num_groups": case.get("num_groups"),
        "moe_router_group_topk": case.get("group_topk"),
        "moe_router_topk_scaling_factor": case.get("scaling_factor"),
        "moe_router_enable_expert_bias": "expert_bias" in case,
    }
    router = TopKRouter(tiny_config(**{**MOE, **fields}))
    if router.expert_bias is not None:
        router.expert_bias.copy_(case["expert_bias"])
    weights, experts = router.route(LOGITS)
    return torch.zeros_like(LOGITS).scatter(1, experts, weights).detach()


def their_weights(layer: torch.nn.Module, bias: Tensor | None = None) -> Tensor:
    """Weights `[t, E]` of a router of transformers' that sees the logits through a matrix that is 1."""
    gate = layer.gate
    gate.hidden_dim, gate.weight = 16, torch.nn.Parameter(torch.eye(16))
    if bias is not None:
        gate.e_score_correction_bias.copy_(bias)
    _, weights, experts = gate(LOGITS[None])
    return torch.zeros_like(LOGITS).scatter(1, experts, weights).detach()


def follows_megatron(name: str, megatron: dict[str, Tensor], theirs: Tensor) -> None:
    """Ours is Megatron's, and theirs is another."""
    torch.testing.assert_close(our_weights(DIFFERENCES[name]), megatron[name], atol=1e-6, rtol=1e-6)
    assert (theirs - megatron[name]).abs().amax(dim=1).gt(0.05).sum() > 5


def test_experts_of_other_groups_are_out_even_where_a_zero_would_beat_those_inside(megatron: dict[str, Tensor]) -> None:
    case = DIFFERENCES["fill"]
    scores = LOGITS.sigmoid()
    ranks = (scores + case["expert_bias"]).unflatten(1, (4, 4))  # all negative
    kept = torch.zeros(200, 4).scatter(1, ranks.topk(2).values.sum(dim=-1).topk(2).indices, 1)
    filled = (ranks * kept[..., None]).flatten(1)  # as transformers' DeepSeek-V3 was first written
    experts = filled.topk(4).indices
    weights = scores.gather(1, experts)
    weights = weights / weights.sum(dim=-1, keepdim=True) * 2.5
    follows_megatron("fill", megatron, torch.zeros_like(scores).scatter(1, experts, weights))


def test_the_weight_of_a_single_expert_is_not_normalised(megatron: dict[str, Tensor]) -> None:
    layer = deepseek(3, num_experts_per_tok=1, n_group=2, topk_group=2)
    follows_megatron("normalisation", megatron, their_weights(layer, BIAS))


def test_weights_of_a_softmax_over_all_experts_are_not_normalised(megatron: dict[str, Tensor]) -> None:
    config = T.Qwen3MoeConfig(**{**QWEN, "num_experts": 16, "norm_topk_prob": True})
    layer = T.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock(config)
    follows_megatron("no normalisation before softmax", megatron, their_weights(layer))


def test_groups_are_ranked_by_as_many_experts_as_they_are_to_give_not_by_two(megatron: dict[str, Tensor]) -> None:
    layer = deepseek(3, num_experts_per_tok=6)
    follows_megatron("top of groups", megatron, their_weights(layer, BIAS))


def test_groups_are_ranked_by_as_many_experts_as_they_are_to_give_not_by_the_best(megatron: dict[str, Tensor]) -> None:
    layer = deepseek(2, num_experts_per_tok=6)
    follows_megatron("top of groups, version 2", megatron, their_weights(layer))
