"""The staged folder with names of several levels: what is noted, kept, thrown away, and there in the end."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from small import megahf, write_torch

from megahf import convert, staging
from megahf.errors import Refused
from megahf.staging import NOTES, TRACKER, Staging

FIRST, SECOND = "iter_0000007/mp_rank_00/model_optim_rng.pt", "iter_0000007/mp_rank_01/model_optim_rng.pt"


def put(staged: Staging, name: str, data: bytes) -> None:
    with staged.writing(name, len(data)) as fd:
        os.write(fd, data)
    staged.note(name, {"nbytes": len(data), "digests": {}, "ledger": []})


def below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def stopped(target: Path, *names: str) -> None:
    """A run that finished these files and was stopped."""
    with pytest.raises(KeyboardInterrupt), Staging(target, "a plan", last=TRACKER) as staged:
        for name in names:
            put(staged, name, name.encode())
        raise KeyboardInterrupt


def test_files_of_one_name_in_two_folders_are_two_files(tmp_path: Path) -> None:
    with Staging(tmp_path / "out", "a plan", last=TRACKER) as staged:
        put(staged, FIRST, b"one")
        assert staged.done(SECOND) is None
        put(staged, SECOND, b"three")
        assert [staged.done(name)["nbytes"] for name in (FIRST, SECOND)] == [3, 5]
        staged.commit({"iter_0000007/common.pt": b"common", TRACKER: b"7"})
    assert below(tmp_path / "out") == [
        "iter_0000007", "iter_0000007/common.pt", "iter_0000007/mp_rank_00", FIRST, "iter_0000007/mp_rank_01", SECOND,
        TRACKER,
    ]  # fmt: skip
    assert [(tmp_path / "out" / name).read_bytes() for name in (FIRST, SECOND)] == [b"one", b"three"]


def test_what_a_stopped_run_finished_in_folders_is_kept(tmp_path: Path) -> None:
    stopped(tmp_path / "out", FIRST, SECOND)
    before = (tmp_path / "out.partial" / FIRST).stat().st_ino
    with Staging(tmp_path / "out", "a plan", last=TRACKER) as staged:
        assert staged.done(FIRST) and staged.done(SECOND)
        staged.commit({TRACKER: b"7"})
    assert (tmp_path / "out" / FIRST).stat().st_ino == before


@pytest.mark.parametrize("change", ["shorter", "gone"])
def test_a_file_that_is_not_as_it_was_noted_is_not_kept(tmp_path: Path, change: str) -> None:
    stopped(tmp_path / "out", FIRST, SECOND)
    file = tmp_path / "out.partial" / FIRST
    file.write_bytes(b"x") if change == "shorter" else file.unlink()
    with Staging(tmp_path / "out", "a plan", last=TRACKER) as staged:
        assert staged.done(FIRST) is None
        assert staged.done(SECOND)


def test_another_plan_finds_no_file_and_no_folder(tmp_path: Path) -> None:
    stopped(tmp_path / "out", FIRST)
    with Staging(tmp_path / "out", "another plan", last=TRACKER) as staged:
        assert staged.done(FIRST) is None
        assert below(staged.folder) == [NOTES, f"{NOTES}/plan"]


def test_files_and_folders_that_nobody_noted_are_not_in_the_target(tmp_path: Path) -> None:
    stopped(tmp_path / "out", FIRST)
    odd = tmp_path / "out.partial" / "iter_0000007" / "odd"
    (odd / "deeper" / "still").mkdir(parents=True)
    (odd / "deeper" / "file.part").write_bytes(b"half of a file")
    with Staging(tmp_path / "out", "a plan", last=TRACKER) as staged:
        staged.commit({TRACKER: b"7"})
    assert below(tmp_path / "out") == ["iter_0000007", "iter_0000007/mp_rank_00", FIRST, TRACKER]


@pytest.mark.parametrize("last", [TRACKER, "config.json"])
def test_that_by_which_it_loads_gets_its_name_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str) -> None:
    named: list[str] = []
    real = os.rename

    def rename(old: Path, new: Path) -> None:
        real(old, new)
        named.append(Path(new).name)

    monkeypatch.setattr(staging.os, "rename", rename)
    with Staging(tmp_path / "out", "a plan", last=last) as staged:
        put(staged, FIRST, b"one")
        staged.commit({last: b"7", "iter_0000007/.metadata": b"m", "megahf.json": b"{}"})
    assert named[-2:] == [last, "out"]


def test_every_folder_is_on_the_disk_before_the_target_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = staging.sync_folder
    monkeypatch.setattr(staging, "sync_folder", lambda path: (synced.append(path.name), real(path)))
    with Staging(tmp_path / "out", "a plan", last=TRACKER) as staged:
        put(staged, FIRST, b"one")
        staged.commit({TRACKER: b"7"})
    assert synced == ["out.partial", "iter_0000007", "mp_rank_00", tmp_path.name]


def test_folders_inside_a_refused_target_are_taken_away_with_it(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="a reason"), Staging(tmp_path / "a" / "out", "a plan", last=TRACKER) as staged:
        put(staged, FIRST, b"one")
        raise Refused(staging.refuse("a reason").problems[0])
    assert below(tmp_path) == []


def test_a_target_that_was_replaced_and_not_renamed_is_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the two renames: the old one is aside, the new one is whole and has not its name yet."""
    write_torch(tmp_path / "ckpt")
    options = {"to": "megatron", "format": "torch"}
    convert(tmp_path / "ckpt", tmp_path / "out", dtype="bf16", **options)
    real = os.rename

    def killed(old: Path, new: Path) -> None:
        if Path(new).name == "out":
            raise KeyboardInterrupt
        real(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(staging.os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            convert(tmp_path / "ckpt", tmp_path / "out", overwrite=True, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "out.partial", "out.replaced"]
    convert(tmp_path / "ckpt", tmp_path / "out", overwrite=True, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "out"]
    assert not (tmp_path / "out" / NOTES).exists()


def test_what_a_stopped_run_left_is_no_source(tmp_path: Path) -> None:
    """Files of ranks alone would be taken for a checkpoint."""
    write_torch(tmp_path / "ckpt")
    with Staging(tmp_path / "kept", "a plan", last=TRACKER) as staged:
        convert(tmp_path / "ckpt", tmp_path / "whole", to="megatron", format="torch")
        os.rename(tmp_path / "whole" / "iter_0000007", staged.folder / "iter_0000007")
        result = megahf("convert", staged.folder, tmp_path / "hf")
    assert result.exit_code == 1
    assert result.stderr.startswith("refused: this is what a conversion left that was stopped")
    assert len(result.stderr.splitlines()) == 1


def test_what_is_noted_says_which_file_it_is_of(tmp_path: Path) -> None:
    stopped(tmp_path / "out", FIRST)
    (record,) = (tmp_path / "out.partial" / NOTES).glob("*.json")
    assert json.loads(record.read_text())["file"] == FIRST
