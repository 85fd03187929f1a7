"""What cannot become a Megatron checkpoint is refused in words, with exit code 1 and nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from bad_folders import FOLDERS, LAYOUTS, ROWS, Bad
from small import fingerprint, megahf, write_torch
from small_experts import Run, write_experts
from small_hybrid import write_hybrid

from megahf import convert


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of each kind."""
    folder = tmp_path_factory.mktemp("good")
    write_torch(folder / "megatron", tensor=2, pipeline=2, stages=[[0, 1], [2, 3]])
    write_torch(folder / "narrow.megatron", ffn_hidden_size=42)
    write_torch(folder / "grouped.megatron", num_attention_heads=12, num_query_groups=6)
    write_experts(folder / "experts.megatron", "te-grouped", Run())
    write_hybrid(folder / "hybrid.megatron", "M*-M")
    convert(folder / "megatron", folder / "ours")
    for kind in ("narrow", "grouped", "experts", "hybrid"):
        convert(folder / f"{kind}.megatron", folder / kind)
        shutil.rmtree(folder / f"{kind}.megatron")
    convert(folder / "ours", folder / "llama", to="llama")
    convert(folder / "ours", folder / "sharded", to="llama", max_shard_size="40KB")
    return folder


def source(good: Path, base: str, here: Path) -> Path:
    """A copy of a good source."""
    return Path(shutil.copytree(good / base, here / base))


@pytest.mark.parametrize("base", ["llama", "sharded", "ours", "hybrid", "experts", "megatron"])
def test_without_damage_the_sources_convert(good: Path, base: str, tmp_path: Path) -> None:
    options = ("--to", "megatron", "--strict", "--refuse-nonfinite", "--dtype", "bf16")
    result = megahf("convert", good / base, tmp_path / "out", *options)
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("bad", ROWS.values(), ids=list(ROWS))
def test_what_is_bad_is_refused_in_words_and_leaves_nothing(
    good: Path, bad: Bad, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bad.damage(source(good, bad.base, tmp_path))
    before = fingerprint(tmp_path)
    result = megahf("convert", bad.base, "new/out", *bad.options)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("refused: ")
    for words in bad.says:
        assert words in result.stderr
    assert len(result.stderr.splitlines()) == bad.reasons
    assert "Traceback" not in result.output
    assert fingerprint(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == [bad.base]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_dry_run_refuses_what_the_run_would_refuse(good: Path, name: str, tmp_path: Path) -> None:
    bad = LAYOUTS[name]
    result = megahf("convert", good / bad.base, tmp_path / "out", *bad.options, "--dry-run")
    assert result.exit_code == 1
    assert bad.says[0] in result.stderr


@pytest.mark.parametrize("name", [name for name, bad in FOLDERS.items() if bad.options == ("--to", "megatron")])
def test_inspect_says_what_convert_would_refuse(good: Path, name: str, tmp_path: Path) -> None:
    """All that is seen without reading the weights."""
    bad = FOLDERS[name]
    folder = source(good, bad.base, tmp_path)
    bad.damage(folder)
    result = megahf("inspect", folder, "--json")
    if bad.says[0] == "stored twice and not equal":
        assert result.exit_code == 0
        return
    assert result.exit_code == 1
    said = "\n".join(json.loads(result.stdout)["refused"]) if result.stdout else result.stderr
    for words in bad.says:
        assert words in said


def test_a_number_format_that_megatron_does_not_train_in_is_wrong_usage(good: Path, tmp_path: Path) -> None:
    result = megahf("convert", good / "llama", tmp_path / "out", "--to", "megatron", "--dtype", "fp8")
    assert result.exit_code == 2
    assert "'fp8' is not one of 'bf16', 'fp16', 'fp32'" in result.stderr
    assert list(tmp_path.iterdir()) == []
