"""A Megatron checkpoint appears whole or not at all, too: of files of ranks, and of torch_dist."""

from __future__ import annotations

import random
import resource
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from killed import child, no_space
from small import fingerprint, megahf, write_torch

from megahf import convert, execute, staging
from megahf.checkpoint import open_checkpoint
from megahf.errors import Refused
from megahf.export import job_for, plan_for
from megahf.staging import NOTES, TRACKER, Staging

KILLS = 6
FORMATS: dict[str, dict[str, Any]] = {
    "torch": {"to": "megatron", "format": "torch", "tp": 2, "pp": 2},
    "torch_dist": {"to": "megatron", "format": "torch_dist", "tp": 2, "pp": 2},
}
SIZES = {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "kv_channels": 32,
    "ffn_hidden_size": 512,
    "vocab_size": 2000,
    "padded_vocab_size": 2048,
}
formats = pytest.mark.parametrize("format", FORMATS)


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 15 MB, and beside it the checkpoints that undisturbed runs make of it."""
    folder = tmp_path_factory.mktemp("big")
    write_torch(folder / "ckpt", **SIZES)
    convert(folder / "ckpt", folder / "hf")
    for name, options in FORMATS.items():
        convert(folder / "hf", folder / name, **options)
    return folder


@pytest.fixture(scope="module")
def events(big: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """How many events an undisturbed run has."""
    runs = {name: child(big / "hf", tmp_path_factory.mktemp(name) / "out", FORMATS[name]) for name in FORMATS}
    assert not any(run.returncode for run in runs.values()), runs
    return {name: int(run.stdout) for name, run in runs.items()}


@formats
@pytest.mark.parametrize("trial", range(KILLS))
def test_a_killed_run_leaves_nothing_that_loads_and_is_taken_up_again(
    big: Path, events: dict[str, int], tmp_path: Path, format: str, trial: int
) -> None:
    """Each trial dies in another sixth of the run; the last ones while the checkpoint is being finished."""
    wanted, count = fingerprint(big / format), events[format]
    last = random.Random(trial).randrange(trial * count // KILLS, (trial + 1) * count // KILLS) + 1
    died = child(big / "hf", tmp_path / "out", FORMATS[format], last)
    if died.returncode == 0 or (tmp_path / "out").exists():  # threads make the count vary a little
        assert trial == KILLS - 1
        assert fingerprint(tmp_path / "out") == wanted
        return
    assert died.returncode == -9
    staged = tmp_path / "out.partial"
    assert_does_not_load(staged, wanted)
    finished = noted(staged)
    convert(big / "hf", tmp_path / "out", **FORMATS[format])
    assert fingerprint(tmp_path / "out") == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {name: (tmp_path / "out" / name).stat().st_ino for name in finished} == finished


def assert_does_not_load(staged: Path, wanted: dict[str, str]) -> None:
    """megahf refuses it, and without a tracker Megatron does; but where all is there and only names are missing."""
    if not staged.exists():
        return
    if (staged / NOTES).exists() or not any(staged.iterdir()):
        assert not (staged / TRACKER).exists()
        with pytest.raises(Refused):
            open_checkpoint(staged)
        return
    there = fingerprint(staged)
    assert {name.removesuffix(".part"): content for name, content in there.items()} == wanted


def noted(staged: Path) -> dict[str, int]:
    """The files that were finished, by their place on the disk: they must not be written again."""
    if not (staged / NOTES / "plan").exists():
        return {}
    names = [record.name.removesuffix(".json").replace("%", "/") for record in (staged / NOTES).glob("*.json")]
    return {name: (staged / name).stat().st_ino for name in names}


@formats
def test_some_of_the_kills_find_finished_files_to_keep(
    big: Path, events: dict[str, int], tmp_path: Path, format: str
) -> None:
    assert child(big / "hf", tmp_path / "out", FORMATS[format], events[format] * 2 // 3).returncode == -9
    assert noted(tmp_path / "out.partial")


@pytest.mark.parametrize("change", [{"tp": 4}, {"dtype": "bf16"}, {"format": "torch_dist"}, {"engine": False}])
def test_what_was_staged_for_another_layout_is_not_used(
    big: Path, events: dict[str, int], tmp_path: Path, change: dict[str, Any]
) -> None:
    assert child(big / "hf", tmp_path / "out", FORMATS["torch"], events["torch"] * 2 // 3).returncode == -9
    asked = {**FORMATS["torch"], **change}
    convert(big / "hf", tmp_path / "out", **asked)
    convert(big / "hf", tmp_path / "wanted", **asked)
    assert fingerprint(tmp_path / "out") == fingerprint(tmp_path / "wanted")


@formats
def test_a_full_disk_is_said_and_nothing_is_left(big: Path, tmp_path: Path, format: str) -> None:
    limit = 2 << 20  # bytes of a file: stands for a disk that is full in the middle of one
    options = ("--to", "megatron", "--format", format, "--pp", "2")
    command = [sys.executable, "-m", "megahf.cli", "convert", big / "hf", tmp_path / "new" / "out", *options]
    done = subprocess.run(
        command, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("refused: File too large")
    assert "nothing was left behind" in done.stderr
    assert list(tmp_path.iterdir()) == []


@formats
@pytest.mark.parametrize("call", ["pwrite", "fsync", "rename", "truncate", "mkdir"])
def test_no_space_at_any_step_is_said_and_nothing_is_left(tmp_path: Path, call: str, format: str) -> None:
    write_torch(tmp_path / "ckpt")
    command = ("convert", tmp_path / "ckpt", tmp_path / "new" / "out", "--to", "megatron", "--format", format)
    for step in (0, 1, 2, 3, 5, 8, 13, 21, 34, 1000):
        with no_space(call, step):
            result = megahf(*command, "--tp", "2")
        if result.exit_code == 0:  # nothing that counts came after so many calls
            assert step > 0
            return
        assert result.exit_code == 1, result.output
        assert result.stderr.startswith("refused: the disk is full")
        assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
    raise AssertionError(f"more than 1000 calls of {call}")


def test_a_disk_that_is_too_small_is_refused_before_a_byte_moves(
    big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 1000, 20_000))
    result = megahf("convert", big / "hf", tmp_path / "out", "--to", "megatron")
    assert result.exit_code == 1
    assert "the disk has 0.00 GB free" in result.stderr
    assert list(tmp_path.iterdir()) == []


@formats
def test_of_two_converters_of_one_target_the_second_is_refused(big: Path, tmp_path: Path, format: str) -> None:
    command = ("convert", big / "hf", tmp_path / "out", "--to", "megatron", "--format", format)
    with Staging(tmp_path / "out", "another plan", last=TRACKER) as first:
        (first.folder / "weights").write_text("half")
        result = megahf(*command)
        assert result.exit_code == 1
        assert result.stderr.startswith("refused: another conversion is writing this target")
        assert sorted(path.name for path in first.folder.iterdir()) == [NOTES, "weights"]


@formats
def test_a_checkpoint_is_replaced_only_where_that_is_asked_for(tmp_path: Path, format: str) -> None:
    """Nothing of the old one stays: it had another format and more ranks."""
    write_torch(tmp_path / "a", tensor=2, pipeline=2, stages=[[0, 1], [2, 3]])
    shutil.copytree(tmp_path / "a", tmp_path / "out")
    write_torch(tmp_path / "b", seed=1)
    before = fingerprint(tmp_path / "out")
    options = ("--to", "megatron", "--format", format)
    refused = megahf("convert", tmp_path / "b", tmp_path / "out", *options)
    assert refused.exit_code == 1
    assert refused.stderr.startswith("refused: the target exists already")
    assert fingerprint(tmp_path / "out") == before
    assert megahf("convert", tmp_path / "b", tmp_path / "out", *options, "--overwrite").exit_code == 0
    assert megahf("convert", tmp_path / "b", tmp_path / "wanted", *options).exit_code == 0
    assert fingerprint(tmp_path / "out") == fingerprint(tmp_path / "wanted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out", "wanted"]


@formats
def test_a_refused_replacement_leaves_the_old_checkpoint(tmp_path: Path, format: str) -> None:
    write_torch(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "out", **FORMATS[format])
    before = fingerprint(tmp_path / "out")
    file = tmp_path / "a" / "iter_0000007" / "mp_rank_00" / "model_optim_rng.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(Refused, match=r"CRC-32 of .* is wrong"):
        convert(tmp_path / "a", tmp_path / "out", overwrite=True, **FORMATS[format])
    assert fingerprint(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "out"]


def test_the_source_itself_is_never_replaced(tmp_path: Path) -> None:
    write_torch(tmp_path / "ckpt")
    convert(tmp_path / "ckpt", tmp_path / "hf")
    before = fingerprint(tmp_path)
    for source in ("hf", "ckpt"):
        result = megahf("convert", tmp_path / source, tmp_path / source, "--to", "megatron", "--overwrite")
        assert result.exit_code == 1
        assert "the target holds the checkpoint itself" in result.stderr
    assert fingerprint(tmp_path) == before


def test_a_jobs_digest_tells_every_byte_that_is_known_beforehand(big: Path) -> None:
    plan = plan_for(big / "hf")
    changes: list[dict[str, Any]] = [{}, {"tp": 4}, {"format": "torch_dist"}, {"engine": False}, {"divisible_by": 64}]
    jobs = [job_for(plan, **{**FORMATS["torch"], **change}) for change in changes]
    assert len({job.digest for job in jobs}) == len(jobs)
    assert jobs[0].digest == job_for(plan_for(big / "hf"), **FORMATS["torch"]).digest


@formats
def test_memory_does_not_grow_with_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    """Twice the width in both directions, four times the bytes, the same number of weights, all larger than a piece."""
    monkeypatch.setattr(execute, "BUFFER", 1 << 16)
    monkeypatch.setattr(execute.boxes, "__defaults__", (1 << 16,))
    peaks = []
    for width in (256, 512):
        sizes = {"hidden_size": width, "kv_channels": width // 4, "ffn_hidden_size": 2 * width, "num_layers": 3}
        write_torch(tmp_path / f"{width}", vocab_size=4096, padded_vocab_size=4096, stages=[[0, 1, 2]], **sizes)
        tracemalloc.start()
        convert(tmp_path / f"{width}", tmp_path / f"{width} out", **{**FORMATS[format], "pp": 1})
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    written = [sum(file.stat().st_size for file in (tmp_path / f"{width} out").rglob("*")) for width in (256, 512)]
    assert written[1] > written[0] + 15_000_000
    assert peaks[1] < peaks[0] + 300_000
