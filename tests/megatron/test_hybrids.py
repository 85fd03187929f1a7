"""Hybrids: the judge builds and saves them as Megatron does, and megahf reads every one of them right.

Megatron's own side comes first: what is in its files, that the stand-in for mamba_ssm can be believed, and that its
state would show a mistake. Then its checkpoints through megahf: weights, logits, greedy tokens, gradients.
"""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import ENGINE
from cases_hybrid import HybridCase, everyday
from compare import check, check_generation, check_weights
from conftest import Judge
from kinds_hybrid import KINDS
from test_training_step import PLAIN, check_step
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from megahf.judge.bench import common
from megahf.judge.hybrid import BEFORE, MAIN, MEGATRON
from megahf.judge.mamba_ssm import RMSNorm, scan
from megahf.judge.pool import Failed

# Megatron's second path convolves and gates by its own code; it computes what the stand-in does for the first.
SAME = ({"mamba_attention_mlp", "second_path"},)


def reference(judge: Judge, kind: str) -> dict[str, Any]:
    arguments = HybridCase(kind, "tp1").arguments
    known: dict[str, Any] = torch.load(judge.bench.reference({**arguments, **common(arguments)}) / "reference.pt")
    return known


def stored(path: Path, rank: str = "mp_rank_00") -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path / "iter_0000010" / rank / "model_optim_rng.pt", weights_only=False)
    return state


def keys(path: Path) -> set[str]:
    return set(FileSystemReader(path / "iter_0000010").read_metadata().state_dict_metadata)


def test_the_scan_of_the_stand_in_is_the_sum_over_all_earlier_tokens() -> None:
    generator = torch.Generator().manual_seed(1)
    x, dt = (torch.rand(2, 9, *size, generator=generator, dtype=torch.float64) for size in ((6, 4), (6,)))
    B, C = (torch.randn(2, 9, 3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    A = -torch.arange(1.0, 7.0, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for t in range(9):
        for s in range(t + 1):
            for head in range(6):
                kept = torch.exp(A[head] * dt[:, s + 1 : t + 1, head].sum(dim=1))  # [b]
                seen = (C[:, t, head // 2] * B[:, s, head // 2]).sum(dim=-1)  # [b]
                expected[:, t, head] += (kept * seen * dt[:, s, head])[:, None] * x[:, s, head]
    torch.testing.assert_close(scan(x, dt, A, B, C), expected, rtol=1e-12, atol=1e-12)


def test_the_norm_of_the_stand_in_is_one_of_each_group_after_the_gate() -> None:
    norm = RMSNorm(12, eps=1e-5, group_size=4, norm_before_gate=False)
    torch.nn.init.normal_(norm.weight)
    x, z = torch.randn(2, 12), torch.randn(2, 12)
    groups = torch.nn.functional.rms_norm((x * torch.sigmoid(z) * z).view(2, 3, 4), (4,), eps=1e-5)
    torch.testing.assert_close(norm(x, z), groups.view(2, 12) * norm.weight)


def test_no_two_kinds_with_the_same_weights_have_the_same_logits(judge: Judge) -> None:
    """But the two that are the same by Megatron's own word, one of which has none of the stand-in's convolution."""
    known = {kind: reference(judge, kind)["logits"] for kind in KINDS}
    equal = [
        {a, b}
        for a, b in combinations(known, 2)
        if known[a].shape == known[b].shape and (known[a] - known[b]).abs().max() < 2e-4
    ]
    assert equal == list(SAME)
    assert (known["mamba_attention_mlp"] - known["second_path"]).abs().max() < 1e-5


def test_a_state_neither_dies_nor_explodes(judge: Judge) -> None:
    """In pure Mamba, the last of 64 tokens still sees the first, and no more of it than is reasonable."""
    case = HybridCase("mamba2", "tp1")
    saved = judge.save_case(case) / "iter_0000010"
    input_ids = torch.randint(0, 101, (1, 64), generator=torch.Generator().manual_seed(3))
    one, other = (
        judge.bench.logits(case.arguments, saved, "torch", tokens.numpy())
        for tokens in (input_ids, torch.cat([(input_ids[:, :1] + 1) % 101, input_ids[:, 1:]], dim=1))
    )
    assert 1e-4 < abs(one[:, -1] - other[:, -1]).max() < 1


def test_weights_of_a_mixer_are_not_degenerate(judge: Judge) -> None:
    state = reference(judge, "nemotron3")["state_dict"]
    assert all(value.std() > 0.05 and value.abs().min() > 0 for value in state.values())


def test_args_are_those_of_the_version(judge: Judge) -> None:
    before, main = (
        vars(stored(judge.save_case(HybridCase("nemotron_h", "tp1", format, "te")))["args"])
        for format in ("torch", "torch:main")
    )
    assert before["hybrid_override_pattern"] == main["hybrid_layer_pattern"] == "M-M*-M"
    assert before["spec"] == MEGATRON and main["spec"] == MAIN
    assert set(before) - set(main) == set(BEFORE) and set(main) - set(before) == {"hybrid_layer_pattern"}
    assert main["hybrid_override_pattern"] is None


def test_ratios_become_a_pattern_in_the_form_of_main(judge: Judge) -> None:
    before, main = (
        vars(stored(judge.save_case(HybridCase("hybrid_ratios", "tp1", format, "te")))["args"])
        for format in ("torch", "torch:main")
    )
    assert [before[name] for name in BEFORE] == [0.3, 0.3] and before["hybrid_override_pattern"] is None
    assert main["hybrid_layer_pattern"] == "M*-M*-"


def test_names_are_fused_unfused_or_mains(judge: Judge) -> None:
    fused, unfused, main = (
        stored(judge.save_case(HybridCase("nemotron_h", "tp1", format, spec)))["model"]
        for format, spec in (("torch", "te"), ("torch", "local"), ("torch:main", "te"))
    )
    layer = "decoder.layers.0"
    assert f"{layer}.mixer.in_proj.layer_norm_weight" in fused and f"{layer}.norm.weight" in unfused
    moved = {f"{layer}.mixer.conv1d.{name}" for layer in ("decoder.layers.0", "decoder.layers.2", "decoder.layers.5")
             for name in ("weight", "bias")}  # fmt: skip
    assert set(fused) - set(main) == moved
    assert set(main) - set(fused) == {name.replace("conv1d.", "conv1d_") for name in moved}


@pytest.mark.parametrize("format", ["torch_dist", "torch_dist:main"])
def test_a_distributed_checkpoint_has_the_parts_of_packed_weights_and_the_numbers_of_all_layers(
    judge: Judge, format: str
) -> None:
    found = keys(judge.save_case(HybridCase("nemotron_h", "tp2_pp2_last1", format, "te")))
    layer = "decoder.layers.5.mixer"
    assert {f"{layer}.in_proj.weight.{part}" for part in ("z", "x", "B", "C", "dt")} <= found
    assert {f"{layer}.conv1d.{name}.{part}" for name in ("weight", "bias") for part in "xBC"} <= found
    assert f"{layer}.in_proj.weight" not in found and "decoder.final_norm.weight" in found


def test_stages_end_at_bars_and_may_be_empty(judge: Judge) -> None:
    path = judge.save_case(HybridCase("nemotron_h", "pp4_bars_empty"))
    counts = [
        len({name.split(".")[2] for name in stored(path, f"mp_rank_00_{rank:03d}")["model"] if ".layers." in name})
        for rank in range(4)
    ]
    assert counts == [2, 0, 3, 1]
    assert stored(path, "mp_rank_00_000")["args"].hybrid_layer_pattern == "M-||M*-|M"


def test_four_stages_on_two_ranks_are_two_chunks_each(judge: Judge) -> None:
    path = judge.save_case(HybridCase("nemotron_h", "pp2_vpp2_bars"))
    chunks = [stored(path, f"mp_rank_00_{rank:03d}") for rank in range(2)]
    found = [
        len({key.split(".")[2] for key in chunk[name] if ".layers." in key})
        for name in ("model0", "model1")
        for chunk in chunks
    ]
    assert found == [1, 2, 2, 1]


@pytest.mark.parametrize("format", ["torch", "torch_dist", "torch_dist:main"])
def test_what_is_saved_is_what_megatron_loads_again(judge: Judge, format: str) -> None:
    case = HybridCase("nemotron3", "tp2_pp2", format, "te")
    saved = judge.save_case(case)
    known = torch.load(saved / "reference.pt")
    tokens = known["input_ids"].numpy()
    found = judge.bench.logits(case.arguments, saved / "iter_0000010", format.partition(":")[0], tokens)
    assert abs(found - known["logits"].numpy()).max() < 1e-5


def test_what_megatron_refuses_of_a_mixer_is_refused(judge: Judge, tmp_path: Path) -> None:
    for kind, sizes, why in (
        ("one_group", {"tensor_model_parallel_size": 2}, "ngroups must be evenly divisible by tp_size"),
        ("mamba2", {"mamba_num_heads": 6}, "nheads must be evenly divisible by ngroups"),
        ("nemotron_h", {"hybrid_override_pattern": "M-M*"}, "pattern is the wrong length"),
    ):
        with pytest.raises(Failed, match=why):
            judge.bench.save({**KINDS[kind], "transformer_impl": "local", **sizes}, tmp_path / kind)


@pytest.mark.parametrize("case", everyday(), ids=str)
def test_weights_are_megatrons_to_the_bit_and_logits_within_3e_5(judge: Judge, case: HybridCase) -> None:
    check(judge.save_case(case))


def test_the_comparison_sees_rows_of_a_packed_matrix_in_another_order(judge: Judge) -> None:
    path = judge.save_case(HybridCase("nemotron_h", "tp2", "torch", "te"))
    known = torch.load(path / "reference.pt")
    check_weights(path, known)
    packed: Tensor = known["state_dict"]["decoder.layers.0.mixer.in_proj.weight"]
    packed[:256] = packed[:256].roll(128, dims=0)  # x | z
    with pytest.raises(AssertionError, match=r"decoder\.layers\.0\.mixer\.in_proj\.weight"):
        check_weights(path, known)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_with_a_cache_are_those_without(judge: Judge, kind: str) -> None:
    case = next(case for case in everyday() if case.kind == kind)
    check_generation(judge.save_case(case))


CLOSE = 1e-4  # of the largest gradient of a weight: the judge scans in fp64, megahf in fp32
STEPS: dict[str, dict[str, Any]] = {
    "mamba2": {},
    "nemotron_h": {},
    "nemotron3": {"moe_aux_loss_coeff": 0.2},
    "channel_d": {},
    "ungated_norm": {},
    "heads_given": {},
    "long": {},
    "hybrid_swiglu": {},
    "hybrid_layernorm_zero_centered": ENGINE,
    "hybrid_tied": {},
}


@pytest.mark.parametrize("kind", STEPS)
def test_loss_and_every_gradient_of_a_training_step_are_megatrons(judge: Judge, kind: str, tmp_path: Path) -> None:
    check_step(judge, {**HybridCase(kind, "tp1").arguments, **PLAIN, **STEPS[kind]}, tmp_path / "checkpoint", CLOSE)
