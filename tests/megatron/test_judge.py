"""The judge can be believed: sharded models equal single ones, its kinds differ, and it sees what is wrong."""

from __future__ import annotations

import os
import signal
import time
from itertools import combinations
from pathlib import Path

import pytest
import torch
from cases import EVERYDAY, FORMATS, Case, covering, met_by, possible_cases
from conftest import Judge
from kinds import KINDS
from layouts import LAYOUTS
from torch.distributed.checkpoint import FileSystemReader

from megahf.errors import Refused
from megahf.judge.pool import Failed

MAIN_AND_BEFORE = ("torch_dist:main", "torch_dist")

# Kinds that compute the same by Megatron's own word.
SAME = ({"gpt2_tanh", "gpt3_qk_scaling"}, {"llama31", "llama31_factor_ignored"})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_sharded_to_any_layout_has_the_logits_of_one_process(judge: Judge, layout: str) -> None:
    case = Case("gpt2", layout)
    saved = judge.save_case(case)  # raises if they differ
    ranks = [folder.name for folder in (saved / "iter_0000010").iterdir()]
    tensor, pipeline = (LAYOUTS[layout][f"{axis}_model_parallel_size"] for axis in ("tensor", "pipeline"))
    assert len(ranks) == tensor * pipeline


def test_transformer_engine_stand_in_has_the_logits_of_the_local_spec(judge: Judge) -> None:
    judge.save(
        "gpt_oss_dense", "tp2", "torch", "te"
    )  # windows, sinks, biases, LayerNorm's sibling; raises if they differ


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_one_that_megatron_loads_again(judge: Judge, format: str) -> None:
    case = Case("llama_tied", "tp1" if format == "torch_dcp" else "tp2_pp2", format)
    saved = judge.save_case(case)
    known = torch.load(saved / "reference.pt")
    tokens = known["input_ids"].numpy()
    found = judge.bench.logits(case.arguments, saved / "iter_0000010", format.partition(":")[0], tokens)
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
    for kind in KINDS:
        spec = "te" if KINDS[kind].get("layernorm_zero_centered_gamma") else "local"
        dtype = "bf16" if KINDS[kind].get("fp32_residual_connection") else "fp32"
        known[kind] = torch.load(judge.reference(kind, dtype, spec))
    equal = [
        {a, b}
        for a, b in combinations(known, 2)
        if known[a]["logits"].shape == known[b]["logits"].shape
        and (known[a]["logits"] - known[b]["logits"]).abs().max() < 2e-4
    ]
    assert equal == list(map(set, SAME))


def test_weights_are_not_degenerate(judge: Judge) -> None:
    state = torch.load(judge.reference("gpt2"))["state_dict"]
    assert all(value.std() > 0.05 and value.abs().min() > 0 for value in state.values())


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
    with pytest.raises(Refused, match="needs 8 processes, the judge has 4"):
        judge.bench.save({**KINDS["llama"], "tensor_model_parallel_size": 8}, tmp_path / "out", "torch")


def test_an_argument_that_megatron_does_not_have_is_refused(judge: Judge, tmp_path: Path) -> None:
    with pytest.raises(Failed, match="not an argument of Megatron's: swiglue"):
        judge.bench.save({**KINDS["llama"], "swiglue": True}, tmp_path / "out", "torch")


def test_the_everyday_cases_meet_every_pair_they_promise() -> None:
    possible = {pair for case in possible_cases() for pair in met_by(case, EVERYDAY)}
    met = {pair for case in covering(possible_cases(), EVERYDAY) for pair in met_by(case, EVERYDAY)}
    assert met == possible
