"""A checkpoint of any kind, layout, format, layer spec and dtype becomes a model with Megatron's weights and logits."""

from __future__ import annotations

import pytest
import torch
from cases import Case, everyday
from compare import check, check_generation, check_logits, check_weights
from conftest import Judge
from kinds import KINDS


@pytest.mark.parametrize("case", everyday(), ids=str)
def test_weights_are_megatrons_to_the_bit_and_logits_within_1e_5(judge: Judge, case: Case) -> None:
    check(judge.save_case(case))


def test_the_comparison_sees_one_changed_bit_and_one_changed_option(judge: Judge) -> None:
    path = judge.save("gpt_oss_dense", "tp2_pp2")
    known = torch.load(path / "reference.pt")
    check_weights(path, known)
    weight = known["state_dict"]["decoder.layers.3.mlp.linear_fc2.bias"]
    weight.view(torch.int32)[5] ^= 1
    with pytest.raises(AssertionError, match=r"decoder\.layers\.3\.mlp\.linear_fc2\.bias"):
        check_weights(path, known)
    other = torch.load(judge.save("window", "tp2_pp2") / "reference.pt")
    with pytest.raises(AssertionError, match="logits are"):
        check_logits(judge.save("window_skip_list", "tp2_pp2"), other)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_with_a_cache_are_those_without(judge: Judge, kind: str) -> None:
    case = next(case for case in everyday() if case.kind == kind)
    check_generation(judge.save_case(case))
