"""Promise: the router chooses and weighs as its options say, as a plain reading of them in float64 does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import LLAMA, tiny, tiny_config, tokens
from torch import Tensor

from megahf.models.modeling_mcore_gpt import McoreGPTForCausalLM
from megahf.models.router import TopKRouter, even_out

MOE: dict[str, Any] = {**LLAMA, "num_layers": 1, "num_experts": 8, "moe_ffn_hidden_size": 24}
BIASED = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}


def router(**options: Any) -> TopKRouter:
    torch.manual_seed(0)
    made = TopKRouter(tiny_config(**{**MOE, **options})).eval()
    torch.nn.init.normal_(made.weight, std=0.3)
    if made.expert_bias is not None:
        made.expert_bias.normal_()
    return made


def best(scores: dict[int, float], count: int) -> list[int]:
    return sorted(scores, key=lambda expert: -scores[expert])[:count]


def token_weights(logits: list[float], bias: list[float], options: dict[str, Any]) -> dict[int, float]:
    """Experts of one token and their weights, as one would do it by hand."""
    function, k = options["moe_router_score_function"], options["moe_router_topk"]
    everyone = dict(enumerate(logits))
    if function == "softmax" and options["moe_router_pre_softmax"]:
        scores = {e: math.exp(x) / sum(map(math.exp, logits)) for e, x in everyone.items()}
    elif function == "softmax":
        scores = everyone
    elif function == "sigmoid":
        scores = {e: 1 / (1 + math.exp(-x)) for e, x in everyone.items()}
    else:
        scores = {e: math.sqrt(math.log1p(math.exp(x))) for e, x in everyone.items()}
    ranks = {e: score + bias[e] for e, score in scores.items()}
    if options["moe_router_group_topk"]:
        groups, kept = options["moe_router_num_groups"], options["moe_router_group_topk"]
        size = len(logits) // groups
        members = {g: {e: ranks[e] for e in range(g * size, (g + 1) * size)} for g in range(groups)}
        sums = {g: sum(members[g][e] for e in best(members[g], k // kept)) for g in range(groups)}
        ranks = {e: rank for g in best(sums, kept) for e, rank in members[g].items()}
    weights = {e: scores[e] for e in best(ranks, k)}
    if function == "softmax" and not options["moe_router_pre_softmax"]:
        weights = {e: math.exp(x) / sum(map(math.exp, weights.values())) for e, x in weights.items()}
    elif function != "softmax" and k > 1:
        weights = {e: x / (sum(weights.values()) + 1e-20) for e, x in weights.items()}
    return {e: x * (options["moe_router_topk_scaling_factor"] or 1.0) for e, x in weights.items()}


@st.composite
def routers(draw: st.DrawFn) -> dict[str, Any]:
    groups, size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kept = draw(st.integers(1, groups))
    grouped, function = draw(st.booleans()), draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"]))
    return {
        "num_experts": groups * size,
        "moe_router_topk": draw(st.integers(kept, kept * size)) if grouped else draw(st.integers(1, groups * size)),
        "moe_router_num_groups": groups if grouped else None,
        "moe_router_group_topk": kept if grouped else None,
        "moe_router_score_function": function,
        "moe_router_pre_softmax": draw(st.booleans()),
        "moe_router_enable_expert_bias": function != "softmax" and draw(st.booleans()),
        "moe_router_topk_scaling_factor": draw(st.sampled_from([None, 2.5])),
    }


@given(options=routers(), seed=st.integers(0, 1000))
def test_every_option_chooses_and_weighs_as_it_says(options: dict[str, Any], seed: int) -> None:
    made = router(**options)
    logits = torch.randn(6, options["num_experts"], generator=torch.Generator().manual_seed(seed)).double()
    weights, experts = made.route(logits)
    bias = [0.0] * options["num_experts"] if made.expert_bias is None else made.expert_bias.tolist()
    for token in range(6):
        got = dict(zip(experts[token].tolist(), weights[token].tolist(), strict=True))
        assert got == pytest.approx(token_weights(logits[token].tolist(), bias, options), rel=1e-5)


def test_an_experts_bias_chooses_but_does_not_weigh() -> None:
    made = router(**BIASED)
    assert made.expert_bias is not None
    made.expert_bias[:] = torch.tensor([0, 0, 0, 0, 0, 0, 5.0, 5.0])
    weights, experts = made.route(torch.zeros(1, 8))
    assert sorted(experts[0].tolist()) == [6, 7]
    torch.testing.assert_close(weights, torch.full((1, 2), 0.5))


def test_a_router_of_a_dtype_of_its_own_multiplies_in_it() -> None:
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).bfloat16()
    for name, dtype in (("fp32", torch.float32), ("fp64", torch.float64), (None, torch.bfloat16)):
        made = router(moe_router_dtype=name, moe_router_bias=True).bfloat16()
        assert made.bias is not None
        torch.nn.init.normal_(made.bias)
        logits, weights, _ = made(hidden)
        exact = hidden.flatten(0, 1).double() @ made.weight.double().T + made.bias.double()
        assert logits.dtype == weights.dtype == dtype
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
        torch.testing.assert_close(logits.double(), exact, atol=tolerance, rtol=tolerance)
        with torch.autocast("cpu", torch.bfloat16):
            assert made(hidden)[0].dtype == dtype


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_no_expert_takes_tokens_beyond_its_capacity(policy: str) -> None:
    made = router(moe_expert_capacity_factor=0.5, moe_token_drop_policy=policy)
    _, weights, experts = made(torch.randn(4, 16, 32))
    capacity = math.ceil(4 * 16 * 2 / 8 * 0.5)
    taken = torch.bincount(experts[weights > 0], minlength=8)
    asked = torch.bincount(experts.flatten(), minlength=8)
    assert taken.max() <= capacity < asked.max()
    if policy == "probs":
        assert torch.equal(taken, asked.clamp(max=capacity))


def test_the_least_probable_tokens_are_dropped() -> None:
    made = router(moe_router_topk=1, moe_router_pre_softmax=True, moe_expert_capacity_factor=1.0)
    logits = torch.zeros(8, 8)
    logits[:, 3] = torch.arange(8) + 1.0  # all want expert 3, the last most of all; one place
    weights, _ = made.route(logits)
    assert weights[:, 0].count_nonzero() == 1
    assert weights[7, 0] > 0


def test_sinkhorn_gives_each_expert_its_share_in_training_alone() -> None:
    made = router(moe_router_load_balancing_type="sinkhorn", moe_router_topk=1)
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    logits[:, 0] += 3  # everyone's favourite
    assert torch.bincount(made.eval().route(logits)[1].flatten(), minlength=8).max() > 24
    assert torch.bincount(made.train().route(logits)[1].flatten(), minlength=8).max() <= 16
    share = even_out(logits)
    torch.testing.assert_close(share.sum(dim=0), torch.full((8,), 1 / 8), atol=1e-3, rtol=0)
    torch.testing.assert_close(share.sum(dim=1), torch.full((64,), 1 / 64), atol=1e-3, rtol=0)


def test_jitter_shakes_what_the_router_sees_in_evaluation_too() -> None:
    hidden = torch.randn(2, 5, 32)
    made = router(moe_input_jitter_eps=0.1)
    ratio = made.jitter(hidden) / hidden
    assert ((ratio >= 0.9 - 1e-5) & (ratio <= 1.1 + 1e-5)).all()
    assert ratio.std() > 0.03
    assert not torch.equal(made(hidden)[0], made(hidden)[0])


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.bfloat16)])
def test_expert_biases_stay_float32_to_the_last_bit_when_a_model_is_cast(cast: Any) -> None:
    model = with_biases()
    known = bias_of(model).clone()
    cast(model)
    assert model.model.decoder.layers[0].mlp.router.weight.dtype != torch.float32
    assert torch.equal(bias_of(model), known)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_expert_biases_stay_float32_to_the_last_bit_through_a_folder(tmp_path: Path, dtype: torch.dtype) -> None:
    model = with_biases()
    model.to(dtype).save_pretrained(tmp_path)
    for asked in (dtype, "auto", torch.bfloat16):
        again = McoreGPTForCausalLM.from_pretrained(tmp_path, dtype=asked)
        assert torch.equal(bias_of(again), bias_of(model))
        assert again.dtype == (dtype if asked == "auto" else asked)


def with_biases() -> McoreGPTForCausalLM:
    model = tiny(**{**MOE, **BIASED})
    bias_of(model).copy_(torch.randn(8, generator=torch.Generator().manual_seed(3)))
    return model


def bias_of(model: McoreGPTForCausalLM) -> Tensor:
    bias = model.model.decoder.layers[0].mlp.router.expert_bias
    assert bias is not None
    assert bias.dtype == torch.float32
    return bias


def test_router_logits_are_returned_if_asked_for() -> None:
    model = tiny(**{**MOE, "num_layers": 2, "moe_layer_freq": [0, 1]})
    assert model(tokens(2, 5)).router_logits is None
    (logits,) = model(tokens(2, 5), output_router_logits=True).router_logits
    assert logits.shape == (10, 8)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"moe_router_topk": 9}, "9 .*of 8 experts"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"moe_router_score_function": "relu"}, "'relu'.*softmax, sigmoid, sqrtsoftplus"),
        ({"moe_router_load_balancing_type": "auxloss"}, "'auxloss'.*seq_aux_loss"),
        ({"moe_router_dtype": "bf16"}, "'bf16'.*fp32, fp64"),
        ({"moe_token_drop_policy": "last"}, "'last'.*probs, position"),
        ({"moe_router_enable_expert_bias": True}, "sigmoid or sqrtsoftplus"),
        ({"moe_apply_probs_on_input": True}, "moe_router_topk must be 1"),
        ({"moe_shared_expert_gate": True}, "no shared experts"),
        ({"moe_shared_expert_intermediate_size": 0}, "moe_shared_expert_intermediate_size is 0"),
        ({"moe_expert_capacity_factor": -1.0}, "moe_expert_capacity_factor is -1.0"),
        ({"moe_router_group_topk": 2}, "moe_router_num_groups None"),
        ({"moe_router_group_topk": 2, "moe_router_num_groups": 3}, "share out 8 experts"),
        ({"moe_router_group_topk": 1, "moe_router_num_groups": 8}, "from 1, .* to 1"),
        ({"moe_router_load_balancing_type": ["aux_loss"], "moe_aux_loss_coeff": 0.1}, "one coefficient a type"),
        ({"moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": 0.1}, "no moe_aux_loss_coeff"),
        ({"moe_router_load_balancing_type": ["sinkhorn"], "moe_aux_loss_coeff": [0.0]}, "no other type"),
    ],
)
def test_what_cannot_be_routed_is_refused_in_words(options: dict[str, Any], words: str) -> None:
    with pytest.raises(Exception, match=words):  # transformers wraps the ValueError in one of its own
        tiny_config(**{**MOE, **options})
