"""`megahf demo --hybrid` takes a hybrid that real Megatron saved to words, with megahf alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

import megahf
from megahf import demo
from megahf.errors import Refused

PARTS = ("z", "x", "B", "C", "dt")
COMMON = {"the", "and", "to", "of", "I", "my", "that", "you", "not", "in", "is", "his", "be", "your", "me", "with"}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a run of the demo printed, and the folder it kept."""
    keep = tmp_path_factory.mktemp("keep") / "demo"
    command = [sys.executable, "-m", "megahf.cli", "demo", "--hybrid", "--keep", str(keep)]
    path = {"PYTHONPATH": str(Path(demo.__file__).parents[1])}
    ended = subprocess.run(command, env={**os.environ, **path}, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout, keep / "hub"


def test_the_hybrid_writes_words_and_what_megatron_did(kept: tuple[str, Path]) -> None:
    printed, _ = kept
    _, greedy, sampled = printed.split("    > ")
    assert len(COMMON & set(greedy.split())) >= 3, greedy
    assert len(COMMON & set(sampled.split())) >= 3, sampled
    assert "200 greedy tokens equal" in printed
    assert "megatron-core's MambaModel" in printed


def test_every_kind_of_layer_is_in_the_sample() -> None:
    config = megahf.from_megatron(demo.HYBRID, device_map="meta").config
    assert set(config.hybrid_layer_pattern) == set("M*-E")


def test_another_prompt_takes_the_place_of_the_second_one() -> None:
    recorded, usual = demo.sample(None, "hybrid").questions
    assert demo.sample("JULIET:\n", "hybrid").questions == [recorded, "JULIET:\n"]
    assert usual != recorded


def test_a_text_that_is_not_megatron_s_is_refused() -> None:
    subject = demo.sample(None, "hybrid")
    _, said = demo.load_spoken(demo.HYBRID / "spoken.safetensors")
    demo.compare(said, subject)
    other = said._replace(input_ids=np.append(said.input_ids[:-1], 7))
    with pytest.raises(Refused, match="megatron-core's MambaModel"):
        demo.compare(other, subject)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_the_mixer_s_matrix_is_what_torch_itself_reads_of_its_five_parts(kept: tuple[str, Path]) -> None:
    checkpoint = FileSystemReader(demo.HYBRID / "iter_0000010")
    at, metadata = "decoder.layers.0.mixer.in_proj.weight", checkpoint.read_metadata().state_dict_metadata
    parts = {key: torch.empty(metadata[key].size, dtype=torch.bfloat16) for key in (f"{at}.{part}" for part in PARTS)}
    assert [len(metadata[key].chunks) for key in parts] == [2] * 5  # a half of each on either rank
    dcp.load(parts, storage_reader=checkpoint)
    assert torch.equal(load_file(kept[1] / "model.safetensors")[at], torch.cat(list(parts.values())))
