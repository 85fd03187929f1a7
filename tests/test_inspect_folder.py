"""`megahf inspect` of a Hugging Face folder prints the page that a checkpoint gets, and what stands in the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small import megahf, write_torch
from small_experts import Run, write_experts
from small_hybrid import write_hybrid

from megahf import convert


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    write_torch(folder / "gpt", tensor=2)
    write_experts(folder / "experts", "sequential", Run())
    write_hybrid(folder / "hybrid", "M*-M")
    for name in ("gpt", "experts", "hybrid"):
        convert(folder / name, folder / f"{name}_hf")
    convert(folder / "gpt_hf", folder / "llama", to="llama", max_shard_size="40KB")
    return folder


def page(path: Path) -> str:
    result = megahf("inspect", path)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def report(path: Path) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(megahf("inspect", path, "--json").stdout)
    return made


def edit(folder: Path, **changes: Any) -> None:
    made = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**made, **changes}))


@pytest.mark.parametrize("name, kind", [("llama", "llama folder, LlamaForCausalLM"),
                                        ("gpt_hf", "hf folder, McoreGPTForCausalLM")])  # fmt: skip
def test_the_page_is_that_of_a_checkpoint(folders: Path, name: str, kind: str) -> None:
    said = page(folders / name)
    files = list((folders / name).iterdir())
    for words in (
        f"a {kind}, written by transformers ",
        f": {len(files)} files, ",
        "4 layers, hidden 32, 4 heads of 8 (2 query groups), MLP 48 gated silu",
        "RMSNorm, rope (base 10000), 40 positions, untied embeddings, no biases",
        "vocabulary of 61 (the config's)",
        "decoder.layers.{l}.self_attention.linear_qkv.weight 64 x 32 by rows float32 4 32.77 KB",
        "nothing stands in the way of `megahf convert`",
    ):
        assert words in said


@pytest.mark.parametrize("name", ["gpt", "experts", "hybrid"])
def test_a_folder_and_the_checkpoint_that_it_came_from_are_one_model(folders: Path, name: str) -> None:
    ours, theirs = report(folders / f"{name}_hf"), report(folders / name)
    for key in ("config", "parameters", "bytes", "pattern"):
        assert ours[key] == theirs[key], key
    again = [{**row, "stored_again": 0} for row in theirs["weights"]]
    assert ours["weights"] == again


def test_json_names_family_and_class(folders: Path) -> None:
    made = report(folders / "llama")
    assert (made["format"], made["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert made["refused"] == []
    assert made["parameters"] == report(folders / "gpt_hf")["parameters"]
    assert made["bytes_on_disk"] == sum(path.stat().st_size for path in (folders / "llama").iterdir())


def test_a_hybrids_pattern_is_drawn(folders: Path) -> None:
    said = page(folders / "hybrid_hf")
    for words in ("a hf folder, McoreHybridForCausalLM", "pattern: M*-M", "Mamba-2: 8 heads of 4, 4 groups, state of"):
        assert words in said


def test_a_model_that_is_whole_and_no_megatrons_is_shown_with_the_reason(folders: Path, tmp_path: Path) -> None:
    """It can be converted to other folders, which the page does not promise."""
    write_torch(tmp_path / "ckpt", dtype=torch.float64)
    convert(tmp_path / "ckpt", tmp_path / "hf")
    result = megahf("inspect", tmp_path / "hf")
    assert result.exit_code == 1
    said = " ".join(result.output.split())
    assert "4 layers, hidden 32" in said
    assert "refused: Megatron trains no weights in float64" in said
    assert "nothing stands in the way" not in said


def test_what_cannot_be_read_is_shown_by_its_files(folders: Path, tmp_path: Path) -> None:
    convert(folders / "gpt_hf", tmp_path / "llama", to="llama")
    edit(tmp_path / "llama", num_hidden_layers=5, hidden_act="swoosh")
    result = megahf("inspect", tmp_path / "llama")
    assert result.exit_code == 1
    lines = result.output.splitlines()
    assert lines[1].startswith("a llama folder, LlamaForCausalLM, written by transformers ")
    assert "refused: hidden_act cannot be read: 'swoosh' is not built" in " ".join(lines[2:])


def test_a_config_of_another_kind_of_model_is_said(folders: Path, tmp_path: Path) -> None:
    convert(folders / "gpt_hf", tmp_path / "llama", to="llama")
    edit(tmp_path / "llama", model_type="[bold]odd", architectures=None, transformers_version=None)
    result = megahf("inspect", tmp_path / "llama")
    assert result.exit_code == 1
    assert "a [bold]odd folder, written by transformers of a version not noted" in result.output
    assert "refused: model_type '[bold]odd' is not among the families" in result.output


def test_another_vocabulary_is_refused(folders: Path) -> None:
    result = megahf("inspect", folders / "llama", "--true-vocab-size", "40")
    assert result.exit_code == 1
    assert "a vocabulary of 40 is asked for, config.json says 61" in " ".join(result.output.split())
