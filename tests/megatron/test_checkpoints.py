"""A checkpoint of any kind, layout, format, layer spec and dtype becomes a model with Megatron's weights and logits."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from cases import ALL_KINDS, Case, everyday
from compare import check, check_generation, check_logits, check_weights
from conftest import Judge

import megahf


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


@pytest.mark.parametrize("kind", [kind for kind in ALL_KINDS if "capacity" not in kind])  # of tokens seen together
def test_greedy_tokens_with_a_cache_are_those_without(judge: Judge, kind: str) -> None:
    case = next(case for case in everyday() if case.kind == kind)
    check_generation(judge.save_case(case))


@pytest.mark.parametrize("kind", ["deepseek_v3_mtp", "moe_squared_relu"])
def test_experts_held_in_any_way_convert_to_the_same_bytes(judge: Judge, kind: str, tmp_path: Path) -> None:
    ways = product(("local", "te", "local_grouped", "te_grouped"), ("torch", "torch_dist"))
    for number, (spec, format) in enumerate(ways):
        megahf.convert(judge.save(kind, "tp2_ep2_etp1", format, spec, "bf16"), tmp_path / str(number))
    first, *others = (sorted(folder.glob("*")) for folder in tmp_path.iterdir())
    for other in others:
        assert [file.name for file in other] == [file.name for file in first]
        unequal = {a.name for a, b in zip(first, other, strict=True) if a.read_bytes() != b.read_bytes()}
        assert unequal <= {"megahf.json", "README.md"}  # which says what the checkpoint was
