"""The folder appears whole or not at all: killed, interrupted, refused, out of space, or two at once."""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import killed
import pytest
from small import fingerprint, megahf, rewrite, write_torch

from megahf import convert, staging
from megahf.errors import Refused
from megahf.staging import NOTES, Staging

SHARD = "3MB"
KILLS = 20
SIZES = {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "kv_channels": 64,
    "ffn_hidden_size": 768,
    "vocab_size": 8190,
    "padded_vocab_size": 8192,
}


def child(source: Path, target: Path, last: int = -1) -> subprocess.CompletedProcess[str]:
    return killed.child(source, target, {"max_shard_size": SHARD}, last)


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 62 MB on two ranks, and beside it the folder that an undisturbed run makes."""
    folder = tmp_path_factory.mktemp("big")
    write_torch(folder / "ckpt", tensor=2, **SIZES)
    convert(folder / "ckpt", folder / "hf", max_shard_size=SHARD)
    return folder


@pytest.fixture(scope="module")
def wanted(big: Path) -> dict[str, str]:
    return fingerprint(big / "hf")


@pytest.fixture(scope="module")
def events(big: Path, tmp_path_factory: pytest.TempPathFactory) -> int:
    """How many events an undisturbed run has."""
    done = child(big / "ckpt", tmp_path_factory.mktemp("events") / "hf")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("trial", range(KILLS))
def test_a_killed_run_leaves_nothing_that_loads_and_is_taken_up_again(
    big: Path, wanted: dict[str, str], events: int, tmp_path: Path, trial: int
) -> None:
    """Each trial dies in another twentieth of the run; the last ones while the folder is being finished."""
    last = random.Random(trial).randrange(trial * events // KILLS, (trial + 1) * events // KILLS) + 1
    died = child(big / "ckpt", tmp_path / "hf", last)
    if died.returncode == 0:  # threads make the count vary a little: it was finished before the event came
        assert trial == KILLS - 1
        assert fingerprint(tmp_path / "hf") == wanted
        return
    assert died.returncode == -9
    staged = tmp_path / "hf.partial"
    if (tmp_path / "hf").exists():  # killed after the rename
        assert fingerprint(tmp_path / "hf") == wanted
        return
    assert_does_not_load(staged, wanted)
    finished = noted(staged)
    convert(big / "ckpt", tmp_path / "hf", max_shard_size=SHARD)
    assert fingerprint(tmp_path / "hf") == wanted
    assert not staged.exists()
    assert {name: (tmp_path / "hf" / name).stat().st_ino for name in finished} == finished


def assert_does_not_load(staged: Path, wanted: dict[str, str]) -> None:
    """No config, so no loader takes it; or all is there and only the last rename is missing."""
    if (staged / "config.json").exists():
        assert fingerprint(staged) == wanted
    elif staged.exists():
        import transformers

        with pytest.raises((OSError, ValueError), match=r"config\.json"):
            transformers.AutoConfig.from_pretrained(staged)


def noted(staged: Path) -> dict[str, int]:
    """The files that were finished, by their place on the disk: they must not be written again."""
    if not (staged / NOTES / "plan").exists():
        return {}
    names = [record.name.removesuffix(".json") for record in (staged / NOTES).glob("*.json")]
    return {name: (staged / name).stat().st_ino for name in names}


def test_some_of_the_kills_find_finished_files_to_keep(big: Path, events: int, tmp_path: Path) -> None:
    assert child(big / "ckpt", tmp_path / "hf", events * 2 // 3).returncode == -9
    assert len(noted(tmp_path / "hf.partial")) >= 3


def test_what_was_staged_for_another_plan_is_not_used(big: Path, events: int, tmp_path: Path) -> None:
    assert child(big / "ckpt", tmp_path / "hf", events * 2 // 3).returncode == -9
    convert(big / "ckpt", tmp_path / "hf", max_shard_size=SHARD, dtype="bf16")
    convert(big / "ckpt", tmp_path / "wanted", max_shard_size=SHARD, dtype="bf16")
    assert fingerprint(tmp_path / "hf") == fingerprint(tmp_path / "wanted")


def test_a_staged_file_that_lost_bytes_is_written_again(
    big: Path, wanted: dict[str, str], events: int, tmp_path: Path
) -> None:
    assert child(big / "ckpt", tmp_path / "hf", events * 2 // 3).returncode == -9
    file = tmp_path / "hf.partial" / next(iter(noted(tmp_path / "hf.partial")))
    os.truncate(file, file.stat().st_size - 1)
    convert(big / "ckpt", tmp_path / "hf", max_shard_size=SHARD)
    assert fingerprint(tmp_path / "hf") == wanted


def test_a_source_that_changed_since_the_kill_is_read_anew(tmp_path: Path) -> None:
    write_torch(tmp_path / "ckpt")
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "ckpt", tmp_path / "hf", max_shard_size="9KB", progress=interrupt(3))
    assert noted(tmp_path / "hf.partial")
    shutil.rmtree(tmp_path / "ckpt")
    write_torch(tmp_path / "ckpt", seed=1)
    convert(tmp_path / "ckpt", tmp_path / "hf", max_shard_size="9KB")
    convert(tmp_path / "ckpt", tmp_path / "wanted", max_shard_size="9KB")
    assert fingerprint(tmp_path / "hf") == fingerprint(tmp_path / "wanted")


def interrupt(after: int) -> Callable[[int], None]:
    """A progress callback that interrupts, as Ctrl-C does, when it was called `after` times."""
    calls = iter(range(after))

    def progress(_: int) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt

    return progress


def test_an_interrupted_run_says_that_it_can_be_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_torch(tmp_path / "ckpt")
    command = ("convert", tmp_path / "ckpt", tmp_path / "hf", "--max-shard-size", "9KB")
    with monkeypatch.context() as patch:
        sync = iter(range(3))
        patch.setattr(staging.os, "fsync", lambda fd: next(sync, None) is None and interrupt(0)(0))
        stopped = megahf(*command)
    assert stopped.exit_code == 130
    assert "the same command takes up where this one stopped" in stopped.stderr
    assert not (tmp_path / "hf").exists()
    assert noted(tmp_path / "hf.partial")
    assert megahf(*command).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "hf"]


def beside(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir())


def test_a_full_disk_is_said_and_nothing_is_left(big: Path, tmp_path: Path) -> None:
    limit = 2 << 20  # bytes of a file: stands for a disk that is full in the middle of one
    command = [sys.executable, "-m", "megahf.cli", "convert", str(big / "ckpt"), str(tmp_path / "hf")]
    done = subprocess.run(
        command, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("refused: File too large")
    assert "nothing was left behind" in done.stderr
    assert beside(tmp_path / "hf") == []


@pytest.mark.parametrize("call", ["pwrite", "fsync", "rename", "truncate", "mkdir"])
def test_no_space_at_any_step_is_said_and_nothing_is_left(tmp_path: Path, call: str) -> None:
    write_torch(tmp_path / "ckpt")
    for step in range(40):
        with killed.no_space(call, step):
            result = megahf("convert", tmp_path / "ckpt", tmp_path / "new" / "hf", "--max-shard-size", "40KB")
        if result.exit_code == 0:  # nothing that counts came after so many calls
            assert step > 0
            return
        assert result.exit_code == 1, result.output
        assert result.stderr.startswith("refused: the disk is full")
        assert beside(tmp_path / "ckpt") == ["ckpt"]


def test_a_disk_that_is_too_small_is_refused_before_a_byte_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_torch(tmp_path / "ckpt")
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 1000, 20_000))
    result = megahf("convert", tmp_path / "ckpt", tmp_path / "hf")
    assert result.exit_code == 1
    assert "the disk has 0.00 GB free" in result.stderr
    assert beside(tmp_path / "hf") == ["ckpt"]


def test_a_small_file_system_is_full_for_real(big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1 << 40))
        result = megahf("convert", big / "ckpt", disk / "hf", "--max-shard-size", SHARD)
        assert result.exit_code == 1
        assert result.stderr.startswith("refused: the disk is full")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_two_converters_of_one_target_one_wins(big: Path, wanted: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "megahf.cli", "convert", big / "ckpt", tmp_path / "hf", "--max-shard-size", SHARD]
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) for _ in range(3)]
    said = [run.communicate()[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 1, 1], said
    for run, words in zip(runs, said, strict=True):
        if run.returncode:
            assert words.startswith(("refused: another conversion is writing", "refused: the target exists already"))
    assert fingerprint(tmp_path / "hf") == wanted
    assert beside(tmp_path / "hf") == ["hf"]


def test_the_second_converter_does_not_touch_what_the_first_has_staged(tmp_path: Path) -> None:
    write_torch(tmp_path / "ckpt")
    with Staging(tmp_path / "hf", "another plan") as first:
        (first.folder / "weights").write_text("half")
        result = megahf("convert", tmp_path / "ckpt", tmp_path / "hf")
        assert result.exit_code == 1
        assert result.stderr.startswith("refused: another conversion is writing this target")
        assert sorted(path.name for path in first.folder.iterdir()) == [NOTES, "weights"]
        assert sorted(path.name for path in first.notes.iterdir()) == ["plan"]


def test_a_converter_that_waited_for_its_turn_finds_the_finished_folder(tmp_path: Path) -> None:
    """The first run ends between the second one's look at the target and its lock."""
    write_torch(tmp_path / "ckpt")
    second = Staging(tmp_path / "hf", "a plan")
    real = second.take

    def late() -> None:
        convert(tmp_path / "ckpt", tmp_path / "hf")
        real()

    second.take = late  # type: ignore[method-assign]
    with pytest.raises(Refused, match="the target exists already"):
        second.__enter__()
    assert beside(tmp_path / "hf") == ["ckpt", "hf"]
    assert (tmp_path / "hf" / "config.json").exists()


def test_a_target_that_exists_is_left_alone_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    write_torch(tmp_path / "a")
    write_torch(tmp_path / "b", seed=1)
    convert(tmp_path / "a", tmp_path / "hf")
    before = fingerprint(tmp_path / "hf")
    refused = megahf("convert", tmp_path / "b", tmp_path / "hf")
    assert refused.exit_code == 1
    assert refused.stderr.startswith("refused: the target exists already")
    assert fingerprint(tmp_path / "hf") == before
    assert megahf("convert", tmp_path / "b", tmp_path / "hf", "--overwrite").exit_code == 0
    convert(tmp_path / "b", tmp_path / "wanted")
    assert fingerprint(tmp_path / "hf") == fingerprint(tmp_path / "wanted")
    assert beside(tmp_path / "hf") == ["a", "b", "hf", "wanted"]


def test_a_refused_replacement_leaves_the_old_folder(tmp_path: Path) -> None:
    write_torch(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "hf")
    before = fingerprint(tmp_path / "hf")
    write_torch(tmp_path / "b", seed=1)
    file = tmp_path / "b" / "iter_0000007" / "mp_rank_00" / "model_optim_rng.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert megahf("convert", tmp_path / "b", tmp_path / "hf", "--overwrite").exit_code == 1
    assert fingerprint(tmp_path / "hf") == before
    assert beside(tmp_path / "hf") == ["a", "b", "hf"]


@pytest.mark.parametrize("inside", ["", "iter_0000007"])
def test_the_checkpoint_itself_is_never_replaced(tmp_path: Path, inside: str) -> None:
    write_torch(tmp_path / "ckpt")
    (tmp_path / "ckpt" / inside / "config.json").write_text("{}")
    before = fingerprint(tmp_path / "ckpt")
    result = megahf("convert", tmp_path / "ckpt", tmp_path / "ckpt" / inside, "--overwrite")
    assert result.exit_code == 1
    assert "the target holds the checkpoint itself" in result.stderr
    assert fingerprint(tmp_path / "ckpt") == before


def test_overwrite_replaces_models_and_nothing_else(tmp_path: Path) -> None:
    write_torch(tmp_path / "ckpt")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("more work")
    for name in ("home", "file"):
        result = megahf("convert", tmp_path / "ckpt", tmp_path / name, "--overwrite")
        assert result.exit_code == 1
        assert result.stderr.startswith("refused: the target is neither a model's folder nor a checkpoint")
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"
    assert (tmp_path / "file").read_text() == "more work"


def test_a_folder_that_only_has_the_staged_ones_name_is_not_emptied(tmp_path: Path) -> None:
    write_torch(tmp_path / "ckpt")
    (tmp_path / "hf.partial").mkdir()
    (tmp_path / "hf.partial" / "thesis.tex").write_text("years of work")
    result = megahf("convert", tmp_path / "ckpt", tmp_path / "hf")
    assert result.exit_code == 1
    assert "a folder of someone else's is in the way" in result.stderr
    assert (tmp_path / "hf.partial" / "thesis.tex").read_text() == "years of work"


def test_small_files_of_an_earlier_try_do_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_torch(tmp_path / "ckpt")
    with monkeypatch.context() as patch:
        patch.setattr(staging.shutil, "rmtree", lambda path: interrupt(0)(0))  # when the notes would go
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "ckpt", tmp_path / "hf")
    (tmp_path / "hf.partial" / "tokenizer.json").write_text("of another run")
    convert(tmp_path / "ckpt", tmp_path / "hf")
    convert(tmp_path / "ckpt", tmp_path / "wanted")
    assert fingerprint(tmp_path / "hf") == fingerprint(tmp_path / "wanted")


def test_folders_on_the_way_to_the_target_are_made_and_taken_away_again(tmp_path: Path) -> None:
    write_torch(tmp_path / "ckpt")
    rewrite(tmp_path / "ckpt", lambda content: content["model"]["output_layer.weight"].fill_(float("nan")))
    target = tmp_path / "a" / "b" / "hf"
    assert megahf("convert", tmp_path / "ckpt", target, "--refuse-nonfinite").exit_code == 1
    assert not (tmp_path / "a").exists()
    assert megahf("convert", tmp_path / "ckpt", target).exit_code == 0


def test_no_thread_goes_on_after_an_interrupt(tmp_path: Path) -> None:
    write_torch(tmp_path / "ckpt")
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "ckpt", tmp_path / "hf", progress=interrupt(2))
    assert threading.active_count() == before
