"""The judge can be believed: sharded models equal single ones, its kinds differ, and it sees what is wrong."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path

import pytest
import torch
from cases import (
    ALL_KINDS,
    EVERYDAY,
    EVERYDAY_MIXTURES,
    FORMATS,
    Case,
    everyday,
    met_by,
    possible_cases,
    possible_mixtures,
    refused,
)
from conftest import Judge
from kinds import KINDS
from layouts import EXPERT_LAYOUTS, LAYOUTS
from torch.distributed.checkpoint import FileSystemReader

from megahf.errors import Refused
from megahf.judge.pool import Failed

MAIN_AND_BEFORE = ("torch_dist:main", "torch_dist")

# Kinds that compute the same by Megatron's own word: in evaluation Sinkhorn is nothing but its activation, padding to
# the capacity adds tokens of no weight, YaRN without a factor is RoPE.
SAME = (
    {"gpt2_tanh", "gpt3_qk_scaling"},
    {"llama31", "llama31_factor_ignored"},
    {"mixtral_pre_softmax", "sinkhorn"},
    {"mixtral_pre_softmax", "router_fp64"},
    {"sinkhorn", "router_fp64"},
    {"top_1_sigmoid", "sinkhorn_top_1"},
    {"capacity_by_probs", "capacity_padded"},
    {"mla_plain_yarn", "mla_rope"},
)

# Files of layouts in which tensor ranks and expert ranks are not a grid.
FILES = {
    "tp2_ep2_etp1": ["00_000", "01_001"],
    "tp2_ep2_etp1_dp2": ["00_000", "01_001"],
    "tp4_ep2_etp1": ["00_000", "01_001", "02_000", "03_001"],
    "tp4_ep2_etp2": ["00_000", "01_000", "02_001", "03_001"],
    "tp2_pp2_ep2_etp1": ["00_000_000", "00_001_000", "01_000_001", "01_001_001"],
}

# What Megatron refuses, one case a reason.
REFUSED = (
    Case("llama_zero_centered", "tp1"),
    Case("moe_biases", "tp2"),
    Case("mla", "ep2"),
    Case("mtp", "string_pp2_vpp2_mtp"),
    Case("mtp_tied", "pp2"),
    Case("mtp_gpt2", "pp2"),
    Case("moe_biases", "tp1", "torch", "local_grouped"),
    Case("latent_experts", "tp1", "torch", "local_grouped"),
    Case("moe_quick_geglu", "tp1", "torch", "local_grouped"),
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_sharded_to_any_layout_has_the_logits_of_one_process(judge: Judge, layout: str) -> None:
    case = Case("gpt2", layout)
    saved = judge.save_case(case)  # raises if they differ
    ranks = [folder.name for folder in (saved / "iter_0000010").iterdir()]
    tensor, pipeline = (LAYOUTS[layout][f"{axis}_model_parallel_size"] for axis in ("tensor", "pipeline"))
    assert len(ranks) == tensor * pipeline


@pytest.mark.parametrize("layout", EXPERT_LAYOUTS)
def test_experts_shared_out_in_any_layout_have_the_logits_of_one_process(judge: Judge, layout: str) -> None:
    kind = "deepseek_v3_mtp" if "mtp" in layout else "mixtral"
    saved = judge.save_case(Case(kind, layout))  # raises if they differ
    files = sorted(folder.name.removeprefix("mp_rank_") for folder in (saved / "iter_0000010").iterdir())
    sizes = EXPERT_LAYOUTS[layout]
    count = 1
    for axis in ("tensor", "pipeline", "expert"):
        count *= sizes[f"{axis}_model_parallel_size"]
    assert files == FILES[layout] if layout in FILES else len(files) == count


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_is_no_case_is_what_megatron_refuses(judge: Judge, case: Case, tmp_path: Path) -> None:
    reason = refused(case.arguments, case.format)
    assert reason
    with pytest.raises(Failed) as failed:
        judge.bench.save(case.arguments, tmp_path / "out", case.format)
    assert reason in str(failed.value).replace("ERROR: ", "")


def test_grouped_experts_have_the_logits_of_experts_one_by_one(judge: Judge) -> None:
    judge.save("gpt_oss", "tp2_ep2_etp1", "torch", "te_grouped")  # with biases; raises if they differ
    judge.save("moe_squared_relu", "tp2_ep2", "torch", "local_grouped")


def test_a_repeated_token_takes_the_same_experts_wherever_it_stands(judge: Judge) -> None:
    logits = torch.load(judge.reference("mixtral"))["prompts"]["repeated"]["logits"]  # [b, s, vocabulary]
    assert (logits - logits[:, :1]).abs().max() < 1e-4 < (logits[0, 0] - logits[1, 0]).abs().max()


def test_transformer_engine_stand_in_has_the_logits_of_the_local_spec(judge: Judge) -> None:
    judge.save(
        "gpt_oss_dense", "tp2", "torch", "te"
    )  # windows, sinks, biases, LayerNorm's sibling; raises if they differ


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_one_that_megatron_loads_again(judge: Judge, format: str) -> None:
    loads_again(judge, Case("llama_tied", "tp1" if format == "torch_dcp" else "tp2_pp2", format))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("spec", ["local", "local_grouped", "te_grouped"])
def test_every_format_of_experts_is_one_that_megatron_loads_again(judge: Judge, format: str, spec: str) -> None:
    layout = "tp1" if format == "torch_dcp" else "ep2" if format == "torch_dist:singleton" else "tp2_pp2_ep2_etp1"
    loads_again(judge, Case("deepseek_v3_mtp", layout, format, spec))


def loads_again(judge: Judge, case: Case) -> None:
    saved = judge.save_case(case)
    known = torch.load(saved / "reference.pt")
    tokens = known["input_ids"].numpy()
    found = judge.bench.logits(case.arguments, saved / "iter_0000010", case.format.partition(":")[0], tokens)
    assert abs(found - known["logits"].numpy()).max() < 1e-5


def test_the_form_of_megatrons_main_keeps_the_common_state_in_the_files(judge: Judge) -> None:
    main, before = (judge.save("llama_tied", "tp2_pp2", format) / "iter_0000010" for format in MAIN_AND_BEFORE)
    keys, known = (set(FileSystemReader(folder).read_metadata().state_dict_metadata) for folder in (main, before))
    assert keys - known == {"common_state/shard_0_1"}
    assert known <= keys
    assert not (main / "common.pt").exists()


def test_a_changed_weight_is_seen(judge: Judge, tmp_path: Path) -> None:
    case = Case("llama", "tp2")
    saved = judge.save_case(case) / "iter_0000010"
    known = torch.load(saved.parent / "reference.pt")
    for rank in ("mp_rank_00", "mp_rank_01"):
        state = torch.load(saved / rank / "model_optim_rng.pt", weights_only=False)
        if rank == "mp_rank_01":
            qkv = state["model"]["decoder.layers.2.self_attention.linear_qkv.weight"]
            qkv[:8] = qkv[:8].flip(0)
        (tmp_path / rank).mkdir()
        torch.save(state, tmp_path / rank / "model_optim_rng.pt")
    found = judge.bench.logits(case.arguments, tmp_path, "torch", known["input_ids"].numpy())
    assert abs(found - known["logits"].numpy()).max() > 1e-2


def test_no_two_kinds_with_the_same_weights_have_the_same_logits(judge: Judge) -> None:
    """All kinds draw from the same seed, so those with equal shapes differ by their option alone."""
    known = {}
    for kind, arguments in ALL_KINDS.items():
        spec = "te" if arguments.get("layernorm_zero_centered_gamma") else "local"
        dtype = "bf16" if arguments.get("fp32_residual_connection") else "fp32"
        told = torch.load(judge.reference(kind, dtype, spec))
        known[kind] = torch.cat([told["logits"], *told.get("mtp_logits", [])])
    equal = [
        sorted((a, b))
        for a, b in combinations(known, 2)
        if known[a].shape == known[b].shape and (known[a] - known[b]).abs().max() < 2e-4
    ]
    assert sorted(equal) == sorted(map(sorted, SAME))


@pytest.mark.parametrize("kind", ["gpt2", "gpt_oss", "deepseek_v3_mtp"])
def test_weights_are_not_degenerate(judge: Judge, kind: str) -> None:
    state = torch.load(judge.reference(kind))["state_dict"]
    assert all(value.std() > 0.04 and value.abs().min() > 0 for value in state.values())


def test_a_failing_case_says_why_and_the_next_one_runs(judge: Judge, tmp_path: Path) -> None:
    arguments = Case("llama", "tp4").arguments
    six = {**arguments, "num_attention_heads": 6, "num_query_groups": 2, "kv_channels": 8}
    with pytest.raises(Failed, match="must be a multiple of tensor_model_parallel_size"):
        judge.bench.save(six, tmp_path / "six", "torch")
    judge.bench.save(arguments, tmp_path / "eight", "torch")


def test_a_hanging_or_dying_case_is_ended_and_the_next_one_runs(judge: Judge, tmp_path: Path) -> None:
    arguments = Case("llama", "tp2").arguments
    reference = judge.bench.reference(arguments)
    os.kill(judge.bench.pool.pids[1], signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(Failed, match="died or gave no answer"):
        judge.bench.pool.run(
            "save", 2, arguments=arguments, source=reference, out=tmp_path / "a", format="torch", extra_state="tensor"
        )
    assert time.monotonic() - began < 30
    judge.bench.save(arguments, tmp_path / "b", "torch")


def test_a_case_with_more_ranks_than_processes_is_refused(judge: Judge, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="needs 16 processes, the judge has 8"):
        judge.bench.save({**KINDS["llama"], "tensor_model_parallel_size": 16}, tmp_path / "out", "torch")


def test_an_argument_that_megatron_does_not_have_is_refused(judge: Judge, tmp_path: Path) -> None:
    with pytest.raises(Failed, match="not an argument of Megatron's: swiglue"):
        judge.bench.save({**KINDS["llama"], "swiglue": True}, tmp_path / "out", "torch")


@pytest.mark.parametrize(("cases", "pairs"), [(possible_cases, EVERYDAY), (possible_mixtures, EVERYDAY_MIXTURES)])
def test_the_everyday_cases_meet_every_pair_they_promise(
    cases: Callable[[], Iterator[Case]], pairs: tuple[tuple[str, str], ...]
) -> None:
    kinds = {case.kind for case in cases()}
    possible = {pair for case in cases() for pair in met_by(case, pairs)}
    assert possible == {pair for case in everyday() if case.kind in kinds for pair in met_by(case, pairs)} & possible
    assert all(refused(case.arguments, case.format) == "" for case in everyday())
