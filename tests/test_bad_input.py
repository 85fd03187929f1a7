"""Bad input is refused in words, with exit code 1 and nothing left behind."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import bad_experts
import bad_hybrids
import pytest
import torch
from bad import ROWS as OF_DENSE
from bad import Bad, add, every, hostile, hostile_zip
from small import fingerprint, megahf, write_torch, write_torch_dist
from small_experts import Run, write_experts
from small_hybrid import write_hybrid

ROWS = {**OF_DENSE, **bad_experts.ROWS, **bad_hybrids.ROWS}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    write_torch(folder / "legacy", tensor=2, pipeline=2, stages=[[0, 1], [2, 3]])
    write_torch_dist(folder / "dist")
    write_experts(folder / "sequential", "sequential", Run(tensor=2, expert=2))
    write_experts(folder / "grouped", "legacy-grouped", Run(tensor=2, expert=2))
    write_hybrid(folder / "hybrid", "M*-M", Run(tensor=2))
    return folder


@pytest.fixture
def here(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the good checkpoints, in the current directory."""
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("base", ["legacy", "dist", "sequential", "grouped", "hybrid"])
def test_without_damage_the_checkpoints_convert(here: Path, base: str) -> None:
    result = megahf("convert", base, "hf", "--strict", "--refuse-nonfinite")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("bad", ROWS.values(), ids=list(ROWS))
def test_bad_input_is_refused_in_words_and_leaves_nothing(here: Path, bad: Bad) -> None:
    bad.damage(here / bad.base)
    before = fingerprint(here)
    result = megahf("convert", bad.base, "hf", *bad.options)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("refused: ")
    for words in bad.says:
        assert words in result.stderr
    lines = result.stderr.splitlines()
    assert "Traceback" not in result.output
    assert all(line.strip() for line in lines)
    assert len(lines) == bad.reasons or (bad.reasons < 0 and len(lines) < 40)
    assert fingerprint(here) == before


@pytest.mark.parametrize("name", [name for name, bad in ROWS.items() if not bad.options])
def test_inspect_says_what_convert_would_refuse(here: Path, name: str) -> None:
    """All that is seen without reading the weights; the rest is an inspection that succeeds."""
    bad = ROWS[name]
    bad.damage(here / bad.base)
    result = megahf("inspect", bad.base, "--json")
    assert result.exit_code in (0, 1)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    while_copying = ("CRC-32", "is wrong", "stored twice and not equal", "the file is damaged")
    if bad.says[0].startswith(while_copying):
        assert result.exit_code == 0
    else:
        assert result.exit_code == 1
        assert bad.says[0] in result.output


def test_nothing_in_a_hostile_pickle_runs(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(os, "system", ran.append)
    for damage in (hostile_zip, hostile):
        damage(here / "legacy")
        assert megahf("convert", "legacy", "hf").exit_code == 1
    assert ran == []
    assert not (here / "was_here").exists()


def test_forty_unknown_weights_are_one_line(here: Path) -> None:
    more = {f"decoder__layers__0__mlp__odd_{number}": torch.ones(1) for number in range(40)}
    add("mp_rank_00_000", **more)(here / "legacy")
    result = megahf("convert", "legacy", "hf")
    (line,) = result.stderr.splitlines()
    assert line.startswith("refused: unknown weights (decoder.layers.0.mlp.odd_0 in mp_rank_00_000")
    assert "and 35 more" in line


def test_several_reasons_are_all_said(here: Path) -> None:
    every(mtp_hsm=True, normalization="L2Norm")(here / "legacy")
    result = megahf("convert", "legacy", "hf")
    assert len(result.stderr.splitlines()) == 2


def test_an_unwritable_target_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As anyone but root sees it: root may write everywhere, so the system call is made to say no."""
    real = os.mkdir

    def mkdir(path: Any, *arguments: Any, **options: Any) -> None:
        if str(path).startswith(str(here / "locked")):
            raise PermissionError(13, "Permission denied", str(path))
        real(path, *arguments, **options)

    (here / "locked").mkdir()
    monkeypatch.setattr(os, "mkdir", mkdir)
    result = megahf("convert", "legacy", "locked/hf")
    assert result.exit_code == 1
    assert result.stderr.startswith("refused: cannot write: Permission denied")
    assert str(here / "locked") in result.stderr


@pytest.mark.parametrize("target", ["file/hf", "/proc/hf", "x" * 300])
def test_a_target_that_cannot_be_is_refused(here: Path, target: str) -> None:
    (here / "file").write_text("a file, not a folder")
    before = fingerprint(here)
    result = megahf("convert", "legacy", target)
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("refused: ")
    assert len(result.stderr.splitlines()) == 1
    assert fingerprint(here) == before


@pytest.mark.parametrize("rank", ["mp_rank_00_000", "mp_rank_01_001"])
def test_a_source_that_may_not_be_read_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch, rank: str) -> None:
    real = os.open

    def denied(path: Any, *arguments: Any, **options: Any) -> int:
        if rank in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", denied)
    result = megahf("convert", "legacy", "hf")
    assert result.exit_code == 1
    assert "Permission denied" in result.stderr
    assert rank in result.stderr
