"""LLaVA: real Megatron's checkpoints are read to the bit and say the same; what megahf writes, Megatron loads.

Inputs are rows with one image, several in a row, none, and at both ends, and each of these on its own; compared are
the logits at every place of text and of images.
"""

from __future__ import annotations

from argparse import Namespace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from cases_llava import LlavaCase, everyday, everyday_journeys
from compare_llava import allowed, check, check_weights, differences, model_of
from conftest import Judge
from journeys import Journey
from kinds_llava import KINDS
from test_written_shares import (
    test_files_hold_what_megatrons_ranks_store as files_hold_what_megatrons_ranks_store,
)
from test_written_shares import (
    test_global_tensors_are_those_that_megatron_stores_piece_by_piece as tensors_are_those_that_megatron_stores,
)

import megahf
from megahf.judge import llava
from megahf.judge.bench import common
from megahf.judge.multimodal import SIZES, defaults
from megahf.verification import verify_logits

QKV = "vision_model.decoder.layers.1.self_attention.linear_qkv.weight"
Q_NORM = "vision_model.decoder.layers.1.self_attention.q_layernorm.weight"


def stored(path: Path, rank: str = "mp_rank_00") -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path / "iter_0000010" / rank / "model_optim_rng.pt", weights_only=False)
    return state


def reference(judge: Judge, case: LlavaCase) -> dict[str, Any]:
    known: dict[str, Any] = torch.load(
        judge.bench.reference({**case.arguments, **common(case.arguments)}) / "reference.pt"
    )
    return known


def test_the_encoder_and_the_projection_are_on_the_first_stage_and_the_args_are_the_scripts(judge: Judge) -> None:
    path = judge.save_case(LlavaCase("radio_llama", "tp2_pp2"))
    first, last = (stored(path, f"mp_rank_00_{stage:03d}") for stage in range(2))
    assert {name.split(".")[0] for name in first["model"]} == {"vision_model", "vision_projection", "language_model"}
    assert {name.split(".")[0] for name in last["model"]} == {"language_model"}
    args = vars(first["args"])
    assert set(defaults()) <= set(args) and not set(args) & set(SIZES)
    assert (args["seq_length"], args["decoder_seq_length"]) == (4, 88)  # of the encoder after its shuffle, of the text


def test_internvit_has_heads_of_zeros_where_ranks_could_not_share_its_own(judge: Judge) -> None:
    whole = torch.load(judge.save_case(LlavaCase("intern_6b_kept", "tp1")) / "reference.pt")["state_dict"]
    path = judge.save_case(LlavaCase("intern_6b_kept", "tp2"))
    parts = [stored(path, f"mp_rank_{rank:02d}")["model"] for rank in range(2)]
    rows, norm = (torch.cat([part[name] for part in parts]) for name in (QKV, Q_NORM))
    assert torch.equal(rows[: 25 * 12], whole[QKV]) and rows.shape[0] == 26 * 12 and not rows[25 * 12 :].any()
    assert torch.equal(norm[: 25 * 4], whole[Q_NORM]) and norm.shape[0] == 26 * 4 and not norm[25 * 4 :].any()


def test_weights_are_not_degenerate_and_no_two_kinds_say_the_same(judge: Judge) -> None:
    known = {kind: reference(judge, LlavaCase(kind, "tp1")) for kind in KINDS}
    for each in known.values():
        assert all(value.std() > 0.01 and value.any(dim=-1).all() for value in each["state_dict"].values())
    same = [
        (a, b)
        for a, b in combinations(known, 2)
        if known[a]["logits"].shape == known[b]["logits"].shape
        and (known[a]["logits"] - known[b]["logits"]).abs().max() < 1e-3
    ]
    assert not same


@pytest.mark.parametrize("case", everyday(), ids=str)
def test_weights_are_megatrons_to_the_bit_and_logits_within_1e_5(judge: Judge, case: LlavaCase) -> None:
    check(judge.save_case(case))


def test_the_comparison_sees_a_changed_bit_and_images_in_another_order(judge: Judge) -> None:
    path = judge.save_case(LlavaCase("intern_shuffled", "tp2"))
    known = torch.load(path / "reference.pt")
    model = model_of(path, known, dtype=torch.float32)
    said = llava.ours(model, Namespace(**known["args"]), known["input_ids"])
    args = Namespace(**known["args"])
    padded, mask = llava.expanded(args, known["input_ids"])
    images = llava.pixels(args, int(llava.tiles(args, known["input_ids"]).sum()))
    with torch.no_grad():
        other = model(input_ids=padded, attention_mask=mask, pixel_values=images.flip(0)).logits * mask[..., None]
    assert (said - other).abs().max() > 1e-2
    known["state_dict"][QKV].view(torch.int32)[5, 5] ^= 1
    with pytest.raises(AssertionError, match="vision_model"):
        check_weights(model, known)


FILES = (
    LlavaCase("clip_kept", "tp2_pp2", "torch", "te"),
    LlavaCase("intern_6b_tagged", "tp2", "torch", "te", "bf16"),
    LlavaCase("radio_g_mixture", "tp2_ep2_etp1", "torch", "te_grouped"),
    LlavaCase("radio_hybrid", "tp2_pp2", "torch", "te"),
)
TENSORS = (
    LlavaCase("siglip_qwen", "tp2_pp2", "torch_dist", "te"),
    LlavaCase("intern_6b_kept", "tp2", "torch_dist"),
    LlavaCase("radio_g", "tp2_pp2", "torch_dist", "local"),
    LlavaCase("radio_g_mixture", "tp2", "torch_dist", "te"),
    LlavaCase("intern_hybrid", "tp2", "torch_dist", "te", "bf16"),
)


@pytest.mark.parametrize("case", FILES, ids=str)
def test_files_hold_what_megatrons_ranks_store(judge: Judge, case: LlavaCase) -> None:
    files_hold_what_megatrons_ranks_store(judge, case)


@pytest.mark.parametrize("case", TENSORS, ids=str)
def test_global_tensors_are_those_that_megatron_stores(judge: Judge, case: LlavaCase) -> None:
    tensors_are_those_that_megatron_stores(judge, case)


@pytest.mark.parametrize("journey", everyday_journeys()[::3], ids=str)
def test_megatron_loads_what_was_written_and_says_the_same(judge: Judge, journey: Journey, tmp_path: Path) -> None:
    source, there = judge.save_case(journey.source), tmp_path / "there"
    megahf.convert(source, there, to="megatron", **journey.options)
    megahf.verify(source, there)
    known = torch.load(source / "reference.pt")
    difference = judge.bench.difference(there, known)
    assert difference <= allowed(known), f"logits are {difference:.2e} off"


@pytest.mark.parametrize("kind", ["intern_6b_kept", "siglip_mixture", "clip_affine"])
def test_a_folder_says_the_same_and_goes_back_to_megatron(judge: Judge, kind: str, tmp_path: Path) -> None:
    engine = kind != "clip_affine"
    source = judge.save_case(LlavaCase(kind, "tp2_pp2", "torch_dist", "te" if engine else "local"))
    megahf.convert(source, tmp_path / "hf")
    megahf.convert(tmp_path / "hf", tmp_path / "back", tp=2, divisible_by=32, engine=engine)
    known = torch.load(source / "reference.pt")
    assert judge.bench.difference(tmp_path / "back", known) <= allowed(known)
    model = megahf.McoreLlavaForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    assert max(differences(model, known).values()) <= allowed(known)


def test_verify_compares_what_is_said_with_megatrons(judge: Judge, tmp_path: Path) -> None:
    source = judge.save_case(LlavaCase("intern_6b_kept", "tp2_pp2", "torch_dist", "te"))
    megahf.convert(source, tmp_path / "hf")
    assert verify_logits(source, tmp_path / "hf") <= 3e-5
