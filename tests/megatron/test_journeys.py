"""Promise: what megahf writes, real Megatron loads in every rank, and computes what the source's Megatron did.

Megatron writes a checkpoint; megahf writes it again for another layout, format and make of layers; Megatron's own
strict loading takes that, on the ranks of its layout, by the arguments that lie in it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compare import APART, CLOSE
from conftest import Judge
from journeys import Journey, everyday

import megahf


def arrive(judge: Judge, journey: Journey, place: Path) -> float:
    """The largest difference of Megatron's fp32 logits after the journey from those of one process before it."""
    source = judge.save_case(journey.source)
    megahf.convert(source, place, to="megatron", **journey.options)
    megahf.verify(source, place)
    return judge.bench.difference(place, torch.load(source / "reference.pt"))


def allowed(judge: Judge, journey: Journey) -> float:
    known = torch.load(judge.save_case(journey.source) / "reference.pt")
    return CLOSE if known["difference"] <= CLOSE and known["args"]["spec"] is None else APART


@pytest.mark.parametrize("journey", everyday(), ids=str)
def test_megatron_loads_what_was_written_and_says_the_same(judge: Judge, journey: Journey, tmp_path: Path) -> None:
    difference = arrive(judge, journey, tmp_path / "there")
    assert difference <= allowed(judge, journey), f"logits are {difference:.2e} off"
