"""BERT: real Megatron's checkpoints are read to the bit and say the same; what megahf writes, Megatron loads.

Inputs are pairs of sentences, some rows padded, with token types where there are any; compared are the scores of words
at every token that is no padding, and those of the binary head.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cases_bert import BOTH, BertCase, everyday
from compare import APART, CLOSE, same_bits
from conftest import Judge
from test_written_shares import (
    test_files_hold_what_megatrons_ranks_store as files_hold_what_megatrons_ranks_store,
)
from test_written_shares import (
    test_global_tensors_are_those_that_megatron_stores_piece_by_piece as tensors_are_those_that_megatron_stores,
)
from torch import Tensor

import megahf
from megahf.judge import bert
from megahf.load import canonical_state
from megahf.verification import verify_logits

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight", "output_layer.bias")
LOCAL = {  # the local spec's norms, by the names of Transformer Engine's
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def expected(known: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Canonical names, and what a file in `dtype` holds under them."""
    state = {}
    for name, value in known["state_dict"].items():
        for local, engine in LOCAL.items():
            name = name.replace(local, engine)
        kept = value[: known["args"]["vocab_size"]] if name in VOCABULARY else value
        state[name] = kept.to(dtype)
    return state


def check_weights(path: Path, known: dict[str, Any], dtype: str) -> None:
    wanted, found = expected(known, DTYPES[dtype]), canonical_state(megahf.from_megatron(path))
    assert found.keys() == wanted.keys()
    unequal = [name for name, value in wanted.items() if not same_bits(found[name], value)]
    assert not unequal, f"not Megatron's bits: {unequal}"


def check_outputs(path: Path, known: dict[str, Any]) -> None:
    model = megahf.from_megatron(path, dtype=torch.float32)
    said, size = bert.ours(model, known["input_ids"]), known["args"]["vocab_size"]
    difference = (said - known["logits"][..., :size]).abs().max().item()
    assert difference <= (CLOSE if known["difference"] <= CLOSE else APART), f"{difference:.2e} off"


@pytest.mark.parametrize("case", everyday(), ids=str)
def test_weights_are_megatrons_to_the_bit_and_outputs_within_1e_5(judge: Judge, case: BertCase) -> None:
    path = judge.save_case(case)
    known = torch.load(path / "reference.pt")
    check_weights(path, known, case.dtype)
    check_outputs(path, known)


def test_the_comparison_sees_padding_types_and_a_changed_bit(judge: Judge) -> None:
    path = judge.save_case(BertCase("bert", "tp2"))
    known = torch.load(path / "reference.pt")
    mask, types = bert.inputs(known["input_ids"])
    assert not mask.all() and types.any() and known["logits"][:, -1, :2].all()
    model = megahf.from_megatron(path)
    right = model(known["input_ids"], mask, types)
    for wrong in (model(known["input_ids"], None, types), model(known["input_ids"], mask)):
        assert (wrong.prediction_logits - right.prediction_logits).abs().max() > 1e-2
        assert (wrong.seq_relationship_logits - right.seq_relationship_logits).abs().max() > 1e-3
    known["state_dict"]["output_layer.bias"].view(torch.int32)[5] ^= 1
    with pytest.raises(AssertionError, match=r"output_layer\.bias"):
        check_weights(path, known, "fp32")


@pytest.mark.parametrize("kind", BOTH)
def test_the_class_is_the_one_that_holds_every_weight(judge: Judge, kind: str, tmp_path: Path) -> None:
    path = judge.save_case(BertCase(kind, "tp2"))
    name = "McoreBertForPreTraining" if kind == "bert" else "McoreBertForMaskedLM"
    assert type(megahf.from_megatron(path)).__name__ == name
    masked = megahf.McoreBertForMaskedLM.from_megatron(path)
    known = torch.load(path / "reference.pt")
    words = bert.ours(masked, known["input_ids"])[:, :-1]
    torch.testing.assert_close(words, known["logits"][:, :-1, : known["args"]["vocab_size"]], atol=CLOSE, rtol=0)


FILES = (
    BertCase("bert", "tp2_pp2", "torch", "te"),
    BertCase("bert_without_binary_head", "pp2_vpp2", "torch", "local"),
    BertCase("bert_modern", "tp2", "torch", "te", "bf16"),
)
TENSORS = (
    BertCase("bert", "tp2_pp2", "torch_dist", "te"),
    BertCase("bert_without_binary_head", "tp2", "torch_dist", "local"),
    BertCase("bert_untied", "pp2", "torch_dist", "te", "bf16"),
)


@pytest.mark.parametrize("case", FILES, ids=str)
def test_files_hold_what_megatrons_ranks_store(judge: Judge, case: BertCase) -> None:
    files_hold_what_megatrons_ranks_store(judge, case)


@pytest.mark.parametrize("case", TENSORS, ids=str)
def test_global_tensors_are_those_that_megatron_stores(judge: Judge, case: BertCase) -> None:
    tensors_are_those_that_megatron_stores(judge, case)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("format", ["torch", "torch_dist"])
@pytest.mark.parametrize("engine", [True, False])
def test_megatron_loads_what_was_written_and_says_the_same(
    judge: Judge, kind: str, format: str, engine: bool, tmp_path: Path
) -> None:
    other = {"torch": "torch_dist", "torch_dist": "torch"}[format]
    source = judge.save_case(BertCase(kind, "tp2_pp2" if engine else "pp2", other, "te"))
    layout = {"tp": 2, "pp": 1} if engine else {"tp": 2, "pp": 2}
    written = tmp_path / "there"
    megahf.convert(source, written, to="megatron", format=format, engine=engine, divisible_by=32, **layout)
    megahf.verify(source, written)
    known = torch.load(source / "reference.pt")
    assert judge.bench.difference(written, known) <= (CLOSE if known["difference"] <= CLOSE else APART)


def test_a_folder_goes_back_to_megatron(judge: Judge, tmp_path: Path) -> None:
    source = judge.save_case(BertCase("bert", "tp2_pp2", "torch", "te"))
    megahf.convert(source, tmp_path / "hf")
    megahf.convert(tmp_path / "hf", tmp_path / "back", tp=2, divisible_by=32)
    known = torch.load(source / "reference.pt")
    assert judge.bench.difference(tmp_path / "back", known) <= (CLOSE if known["difference"] <= CLOSE else APART)


def test_verify_compares_what_is_said_with_megatrons(judge: Judge, tmp_path: Path) -> None:
    source = judge.save_case(BertCase("bert", "tp2_pp2", "torch", "te"))
    megahf.convert(source, tmp_path / "hf")
    assert verify_logits(source, tmp_path / "hf") <= APART
