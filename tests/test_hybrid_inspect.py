"""`megahf inspect` draws a hybrid: its pattern by pipeline stages, its kinds of layers, the sizes of its mixers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from small import megahf, write_torch
from small_experts import Run
from small_hybrid import Mixer, write_hybrid


def page(path: Path) -> str:
    result = megahf("inspect", path)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def report(path: Path) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(megahf("inspect", path, "--json").stdout)["pattern"]
    return made


def test_the_page_draws_the_stages_in_the_order_they_run(tmp_path: Path) -> None:
    run = Run(tensor=2, pipeline=2, stages=((0, 1), (2,), (), (3, 4, 5)))
    bars = {"hybrid_override_pattern": None, "hybrid_layer_pattern": "M*|-||ME-"}
    write_hybrid(tmp_path / "ckpt", "M*-ME-", run, num_experts=4, **bars)
    said = page(tmp_path / "ckpt")
    for words in (
        "written by TP2 PP2 VPP2",
        "6 layers, hidden 16, 4 heads of 4 (multi-head), MLP 24 gated silu",
        "4 experts of 12 in 1 of 6 layers",
        "pattern: pp0 M* | pp1 - | pp0 none | pp1 ME-",
        "2 Mamba, 2 MLP, 1 attention, 1 experts",
        "Mamba-2: 8 heads of 4, 4 groups, state of 6, convolution over 4",
        "decoder.layers.{l}.mixer.in_proj.weight 120 x 16 by rows float32 2",
        "nothing stands in the way of `megahf convert`",
    ):
        assert words in said
    assert "stages:" not in said


def test_json_has_the_drawing(tmp_path: Path) -> None:
    run = Run(pipeline=2, stages=((0, 1), (2, 3)))
    write_hybrid(tmp_path / "ckpt", "M*-M", run, mixer=Mixer(window=3), mamba_num_heads=12)
    assert report(tmp_path / "ckpt") == {
        "stages": [{"pipeline": 0, "chunk": 0, "layers": "M*"}, {"pipeline": 1, "chunk": 0, "layers": "-M"}],
        "layers": {"Mamba": 2, "attention": 1, "MLP": 1},
        "heads": None,
        "mixer": {
            "version": 2, "channels": 48, "heads": 12, "head_channels": 4, "groups": 4, "state": 6, "convolution": 3,
        },
    }  # fmt: skip


def test_heads_for_further_tokens_are_drawn(tmp_path: Path) -> None:
    words = {"hybrid_override_pattern": None, "hybrid_layer_pattern": "M-/*-/*-", "mtp_num_layers": 2}
    write_hybrid(tmp_path / "ckpt", "M-", heads="*-", **words)
    said = page(tmp_path / "ckpt")
    assert "pattern: M- / *- in each head for further tokens" in said
    assert "2 heads for further tokens" in said


def test_mamba_1_is_said(tmp_path: Path) -> None:
    write_hybrid(tmp_path / "ckpt", "MM", mixer=Mixer(version=1), hybrid_override_pattern=None)
    said = page(tmp_path / "ckpt")
    assert "Mamba-1: 32 channels, state of 6, convolution over 4" in said
    assert "heads of" not in said and "MLP" not in said


def test_a_stack_without_mixers_has_none(tmp_path: Path) -> None:
    write_hybrid(tmp_path / "ckpt", "*-*-")
    assert report(tmp_path / "ckpt")["mixer"] is None
    assert "pattern: *-*-" in page(tmp_path / "ckpt")


def test_a_gpt_has_no_pattern(tmp_path: Path) -> None:
    write_torch(tmp_path / "ckpt")
    assert report(tmp_path / "ckpt") is None
    said = page(tmp_path / "ckpt")
    assert "pattern:" not in said
    assert "one stage with layers 0-3" in said
