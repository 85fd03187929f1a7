"""A folder that appears whole or not at all.

Files are written into `<target>.partial`, each under a temporary name until its bytes are on the disk; the config,
without which nothing loads, comes last; one rename makes the folder. A run that was killed is taken up where it stopped
when the plan is the same; a refused one is removed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from .errors import Refused, refuse

NOTES = ".megahf"  # the state of the run, inside the staged folder until it is whole
LAST = "config.json"


class Staging:
    """The staged folder, held by one process at a time.

    Args:
        target: the folder that is to appear.
        digest: of the plan; what an earlier run staged for another plan is thrown away.
        nbytes: what the weights will take, to refuse a full disk before a byte moves.
        overwrite: replace a folder that is there.
    """

    def __init__(self, target: Path, digest: str, nbytes: int = 0, overwrite: bool = False) -> None:
        self.target, self.digest, self.nbytes, self.overwrite = target.absolute(), digest, nbytes, overwrite
        self.folder = self.target.with_name(self.target.name + ".partial")
        self.notes = self.folder / NOTES
        self.lock = -1

    def __enter__(self) -> Staging:
        if self.target.exists() and not self.overwrite:
            raise refuse("the target exists already", self.target, "choose another, or give --overwrite")
        with explained(self.target):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.take()
            self.check_space()
        return self

    def take(self) -> None:
        """Makes or takes over the staged folder."""
        self.notes.mkdir(parents=True, exist_ok=True)
        self.lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self.lock)
            self.lock = -1
            raise refuse("another conversion is writing this target", self.folder, "wait for it to end") from error
        plan = self.notes / "plan"
        if plan.exists() and plan.read_text() == self.digest:
            return
        for path in self.folder.iterdir():
            if path != self.notes:
                remove(path)
        for path in self.notes.iterdir():
            remove(path)
        plan.write_text(self.digest)

    def check_space(self) -> None:
        staged = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        free = shutil.disk_usage(self.folder).free
        if self.nbytes - staged > free:
            raise refuse(
                f"the weights take {(self.nbytes - staged) / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free",
                self.target,
            )

    def done(self, name: str) -> dict[str, Any] | None:
        """What was noted of the file `name` when it was finished, if it was."""
        record = self.notes / f"{name}.json"
        if not (record.exists() and (self.folder / name).exists()):
            return None
        note: dict[str, Any] = json.loads(record.read_text())
        return note if (self.folder / name).stat().st_size == note["nbytes"] else None

    @contextlib.contextmanager
    def writing(self, name: str, nbytes: int) -> Iterator[int]:
        """A file descriptor to write `nbytes` of the file `name` through; the file has its name once it is on disk."""
        partial = self.folder / f"{name}.part"
        fd = os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o644)
        try:
            os.truncate(fd, nbytes)
            yield fd
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(partial, self.folder / name)

    def note(self, name: str, record: Mapping[str, Any]) -> None:
        """Notes that the file `name` is finished."""
        partial = self.notes / f"{name}.json.part"
        write_synced(partial, json.dumps(record).encode())
        os.rename(partial, self.notes / f"{name}.json")

    def commit(self, small: Mapping[str, bytes]) -> None:
        """Writes the small files, the config last, and makes the folder appear under its name."""
        for name in sorted(small, key=lambda name: name == LAST):
            if name == LAST:
                shutil.rmtree(self.notes)
            write_synced(self.folder / name, small[name])
        sync_folder(self.folder)
        if self.target.exists():
            old = self.target.with_name(self.target.name + ".replaced")
            remove(old)
            os.rename(self.target, old)
            os.rename(self.folder, self.target)
            remove(old)
        else:
            os.rename(self.folder, self.target)
        sync_folder(self.target.parent)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        keep = error is None or not isinstance(error, (Refused, OSError))
        if not keep:
            shutil.rmtree(self.folder, ignore_errors=True)
        if self.lock >= 0:
            os.close(self.lock)
        if isinstance(error, OSError) and not isinstance(error, Refused):
            raise reason(error, self.target) from error


@contextlib.contextmanager
def explained(target: Path) -> Iterator[None]:
    """System errors about `target` as refusals."""
    try:
        yield
    except OSError as error:
        raise reason(error, target) from error


def reason(error: OSError, target: Path) -> Refused:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return refuse("the disk is full", target, "nothing was left behind; free some space or choose another disk")
    return refuse(f"cannot write: {os.strerror(error.errno or 0)}", error.filename or target)


def write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
