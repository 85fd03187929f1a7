"""Megatron's arguments of experts and of latent attention become the config of the model that was trained."""

from __future__ import annotations

from typing import Any

import pytest
from test_arguments import BARE, SMALL, plain

from megahf.arguments import config, fields, notes
from megahf.errors import Refused
from megahf.judge import model, namespace

EXPERTS: dict[str, Any] = {"num_experts": 8, "moe_ffn_hidden_size": 16, "add_bias_linear": False, "swiglu": True}
EXPERT_CASES: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "width by default": {"moe_ffn_hidden_size": None},
    "every second layer": {"moe_layer_freq": 2},
    "layers by list": {"moe_layer_freq": [0, 1, 1, 0]},
    "shared": {"moe_shared_expert_intermediate_size": 24, "moe_shared_expert_gate": True},
    "pre-softmax": {"moe_router_pre_softmax": True, "moe_router_topk": 4},
    "groups": {"moe_router_num_groups": 4, "moe_router_group_topk": 2, "moe_router_topk": 4},
    "sigmoid": {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    "scaled": {"moe_router_topk_scaling_factor": 2.5, "moe_router_dtype": "fp32"},
    "sinkhorn": {"moe_router_load_balancing_type": "sinkhorn", "moe_router_topk": 1},
    "losses": {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 0.01, "moe_z_loss_coeff": 1e-3},
    "capacity": {"moe_expert_capacity_factor": 1.5, "moe_token_drop_policy": "position"},
    "no capacity": {"moe_expert_capacity_factor": -1.0},
    "jitter": {"moe_input_jitter_eps": 0.1},
    "probabilities first": {"moe_apply_probs_on_input": True, "moe_router_topk": 1, "moe_router_pre_softmax": True},
    "further tokens": {"mtp_num_layers": 2, "mtp_loss_scaling_factor": 0.3},
}
SAME_EXPERTS = {
    "num_experts": "num_moe_experts",
    "mtp_num_layers": "mtp_num_layers",
    "mtp_loss_scaling_factor": "mtp_loss_scaling_factor",
} | {
    name: name
    for name in (
        "moe_layer_freq", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_shared_expert_gate",
        "moe_router_topk", "moe_router_score_function", "moe_router_pre_softmax", "moe_router_num_groups",
        "moe_router_group_topk", "moe_router_topk_scaling_factor", "moe_router_enable_expert_bias", "moe_router_dtype",
        "moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_input_jitter_eps",
        "moe_apply_probs_on_input", "moe_expert_capacity_factor", "moe_token_drop_policy",
    )
}  # fmt: skip


@pytest.mark.parametrize("changes", EXPERT_CASES.values(), ids=list(EXPERT_CASES))
def test_every_field_of_experts_is_the_one_megatron_builds_its_model_with(changes: dict[str, Any]) -> None:
    args = namespace.namespace({**SMALL, **EXPERTS, **changes})
    theirs, ours = model.config(args), fields(vars(args))
    for field, name in SAME_EXPERTS.items():
        assert ours[field] == plain(getattr(theirs, name)), field


LATENT: dict[str, Any] = {"multi_latent_attention": True, "add_bias_linear": False}
LATENT_CASES: dict[str, dict[str, Any]] = {
    "megatron's defaults": {},
    "low-rank queries": {"q_lora_rank": 24, "kv_lora_rank": 40, "qk_head_dim": 6, "v_head_dim": 10},
    "rope": {"rope_type": "rope", "qk_pos_emb_head_dim": 8},
    "yarn": {"rotary_scaling_factor": 40.0, "mscale": 0.7, "mscale_all_dim": 0.9},
}
SAME_LATENT = {name: name for name in ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim")} | {
    "v_head_dim": "v_head_dim",
    "rope_type": "rope_type",
    "yarn_rotary_scaling_factor": "rotary_scaling_factor",
    "yarn_original_max_position_embeddings": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
    "yarn_mscale": "mscale",
    "yarn_mscale_all_dim": "mscale_all_dim",
}


@pytest.mark.parametrize("changes", LATENT_CASES.values(), ids=list(LATENT_CASES))
def test_every_field_of_latent_attention_is_the_one_megatron_builds_its_model_with(changes: dict[str, Any]) -> None:
    args = namespace.namespace({**SMALL, **LATENT, **changes})
    theirs, ours = model.config(args), fields(vars(args))
    for field, name in SAME_LATENT.items():
        assert ours[field] == getattr(theirs, name), field


MOE = {**BARE, "num_experts": 4}


@pytest.mark.parametrize(
    "old, field, value",
    [
        ({"moe_router_topk_limited_devices": 2, "expert_model_parallel_size": 4}, "moe_router_num_groups", 4),
        ({"moe_router_topk_limited_devices": 2, "expert_model_parallel_size": 4}, "moe_router_group_topk", 2),
        ({"moe_layer_freq": "([0]*1+[1]*1)"}, "moe_layer_freq", [0, 1]),
        ({"moe_layer_freq": "2"}, "moe_layer_freq", 2),
        ({"moe_expert_capacity_factor": -1.0}, "moe_expert_capacity_factor", None),
        ({"moe_router_load_balancing_type": ["aux_loss"]}, "moe_router_load_balancing_type", "aux_loss"),
        ({"moe_aux_loss_coeff": [0.5]}, "moe_aux_loss_coeff", 0.5),
        ({}, "moe_ffn_hidden_size", 128),
        ({}, "moe_router_bias", True),
        ({"add_bias_linear": False}, "moe_router_bias", False),
        ({"num_experts": 0, "moe_layer_freq": "[1]"}, "moe_layer_freq", 1),
        ({"num_experts": 0}, "num_experts", None),
        ({"mtp_num_layers": 0}, "mtp_num_layers", None),
    ],
)
def test_experts_of_older_files(old: dict[str, Any], field: str, value: Any) -> None:
    assert fields({**MOE, **old})[field] == value


def test_yarn_of_latent_attention_before_there_was_a_rope_type_starts_from_the_positions_of_the_model() -> None:
    """Numbers by hand from MLATransformerConfig of core_v0.10.0, 0.12.0 and 0.14.0."""
    first = {**BARE, "multi_latent_attention": True}
    made = fields(first)
    assert (made["yarn_original_max_position_embeddings"], made["yarn_mscale"], made["rope_type"]) == (
        16,
        0.707,
        "yarn",
    )
    made = fields({**first, "mscale": 1.0, "mscale_all_dim": 1.0})
    assert (made["yarn_original_max_position_embeddings"], made["yarn_mscale_all_dim"]) == (16, 1.0)
    made = fields({**first, "rope_type": None, "mscale": 1.0, "mscale_all_dim": 0.0})
    assert (made["yarn_original_max_position_embeddings"], made["yarn_mscale_all_dim"]) == (4096, 0.0)
    assert any("no rope_type" in note for note in notes(first))


@pytest.mark.parametrize(
    "args, says",
    [
        ({"moe_layer_freq": [1]}, "1 flags for 2 layers"),
        ({"moe_layer_freq": 0}, "a frequency is 1 or more"),
        ({"moe_layer_freq": "every second"}, "moe_layer_freq"),
        ({"num_experts": "many"}, "num_experts is 'many'"),
        ({"num_experts": -2}, "num_experts is -2"),
        ({"moe_router_topk": 2.0}, "moe_router_topk is 2.0"),
        ({"mtp_num_layers": -1}, "mtp_num_layers is -1"),
        ({"kv_lora_rank": 0}, "kv_lora_rank is 0"),
    ],
)
def test_experts_that_are_no_numbers_are_refused_with_the_argument(args: dict[str, Any], says: str) -> None:
    with pytest.raises(Refused) as error:
        fields({**MOE, **args})
    assert says in str(error.value)


@pytest.mark.parametrize(
    "args, says",
    [
        ({"moe_router_topk": 5}, "a token cannot go to 5 (moe_router_topk) of 4 experts"),
        ({"moe_router_enable_expert_bias": True}, "moe_router_score_function must be sigmoid or sqrtsoftplus"),
        ({"moe_router_group_topk": 2, "moe_router_num_groups": 3}, "share out 4 experts evenly"),
    ],
)
def test_experts_that_no_model_class_takes_are_refused_before_a_byte_moves(args: dict[str, Any], says: str) -> None:
    with pytest.raises(Refused) as error:
        config({**MOE, **args}, 8)
    assert says in str(error.value)
