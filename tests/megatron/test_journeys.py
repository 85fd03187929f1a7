"""Promise: what megahf writes, real Megatron loads in every rank, and computes what the source's Megatron did.

Megatron writes a checkpoint; megahf writes it again for another layout, format and make of layers; Megatron's own
strict loading takes that, on the ranks of its layout, by the arguments that lie in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compare import APART, CLOSE
from conftest import Judge
from journeys import Journey, everyday

import megahf
from megahf.export import plan_for


def arrive(judge: Judge, journey: Journey, place: Path) -> float:
    """The largest difference of Megatron's fp32 logits after the journey from those of one process before it."""
    source = judge.save_case(journey.source)
    megahf.convert(source, place, to="megatron", **journey.options)
    megahf.verify(source, place)
    return judge.bench.difference(place, torch.load(source / "reference.pt"))


def allowed(judge: Judge, journey: Journey) -> float:
    known = torch.load(judge.save_case(journey.source) / "reference.pt")
    return CLOSE if known["difference"] <= CLOSE and known["args"]["spec"] is None else APART


def home(journey: Journey) -> dict[str, Any]:
    """What `megahf.convert` is told to write as the source is."""
    source = journey.source
    return Journey(source, source.layout, source.format.partition(":")[0], source.spec).options


@pytest.mark.parametrize("journey", everyday(), ids=str)
def test_megatron_loads_what_was_written_and_says_the_same(judge: Judge, journey: Journey, tmp_path: Path) -> None:
    difference = arrive(judge, journey, tmp_path / "there")
    assert difference <= allowed(judge, journey), f"logits are {difference:.2e} off"


@pytest.mark.parametrize("journey", everyday()[::3], ids=str)
def test_there_and_back_again_gives_the_same_bits(judge: Judge, journey: Journey, tmp_path: Path) -> None:
    """By another layout, and by a folder of Hugging Face's: as written from the source itself, file by file."""
    source = judge.save_case(journey.source)
    megahf.convert(source, tmp_path / "there", to="megatron", **journey.options)
    megahf.convert(source, tmp_path / "folder", to="hf")
    ways = {"straight": source, "back": tmp_path / "there", "by folder": tmp_path / "folder"}
    for name, start in ways.items():
        megahf.convert(start, tmp_path / name, to="megatron", **home(journey))
        megahf.verify(source, tmp_path / name)
    bits = {name: tensors(tmp_path / name, journey.source.arguments["vocab_size"]) for name in ways}
    assert bits["back"] == bits["straight"]
    assert bits["by folder"] == bits["straight"]


def tensors(place: Path, vocabulary: int) -> dict[str, bytes]:
    """Every weight, whole, as bytes; rows of padding left out."""
    return {copy.name: copy.array.numpy().tobytes() for copy in plan_for(place, true_vocab_size=vocabulary).copies}
