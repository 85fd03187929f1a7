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

from .checkpoint import UNFINISHED
from .errors import Refused, refuse

NOTES = UNFINISHED  # the state of the run, inside the staged folder until it is whole
CONFIG, TRACKER = "config.json", "latest_checkpointed_iteration.txt"  # without which nothing loads


class Staging:
    """The staged folder, held by one process at a time.

    Args:
        target: the folder that is to appear.
        digest: of the plan; what an earlier run staged for another plan is thrown away.
        nbytes: what the weights will take, to refuse a full disk before a byte moves.
        overwrite: replace a folder that is there.
        last: the file without which nothing loads: a model's config, or a checkpoint's tracker.
    """

    def __init__(self, target: Path, digest: str, nbytes: int = 0, overwrite: bool = False, last: str = CONFIG) -> None:
        self.last = last
        self.target, self.digest, self.nbytes, self.overwrite = target.absolute(), digest, nbytes, overwrite
        self.folder = self.target.with_name(self.target.name + ".partial")
        self.notes = self.folder / NOTES
        self.parents = [parent for parent in self.target.parents if not parent.exists()]  # ours to make, nearest first
        self.lock = -1

    def __enter__(self) -> Staging:
        try:
            with explained(self.target):
                replaceable(self.target, self.overwrite)
                self.target.parent.mkdir(parents=True, exist_ok=True)
                self.take()
                replaceable(self.target, self.overwrite)  # another run may have ended since
                self.reuse()
                self.check_space()
        except Refused:
            self.drop()
            raise
        return self

    def take(self) -> None:
        """Makes the staged folder, or takes over the one that a killed run left."""
        while self.lock < 0:
            self.folder.mkdir(exist_ok=True)
            lock = os.open(self.folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if is_at(lock, self.folder):  # else whoever held it ended just now, and the name is free again
                    stranger(self.folder)
                    self.lock = lock
            except BlockingIOError as error:
                raise refuse("another conversion is writing this target", self.folder, "wait for it to end") from error
            finally:
                if self.lock != lock:
                    os.close(lock)

    def reuse(self) -> None:
        """Keeps what was staged for the same plan; all else is thrown away."""
        self.notes.mkdir(exist_ok=True)
        plan = self.notes / "plan"
        if plan.exists() and plan.read_text() == self.digest:
            return
        for path in [*self.folder.iterdir(), *self.notes.iterdir()]:
            if path != self.notes:
                remove(path)
        plan.write_text(self.digest)

    def drop(self) -> None:
        """Leaves nothing behind."""
        if self.lock >= 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self.lock)
            self.lock = -1
        for parent in self.parents:
            with contextlib.suppress(OSError):
                parent.rmdir()

    def check_space(self) -> None:
        staged = sum(path.stat().st_blocks * 512 for path in self.folder.rglob("*") if path.is_file())
        free = shutil.disk_usage(self.folder).free
        if self.nbytes - staged > free:
            raise refuse(
                f"the weights take {(self.nbytes - staged) / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB free",
                self.target,
                "nothing was left behind; free some space or choose another disk",
            )

    def done(self, name: str) -> dict[str, Any] | None:
        """What was noted of the file `name` when it was finished, if it was."""
        record = self.notes / noted(name)
        if not (record.exists() and (self.folder / name).exists()):
            return None
        note: dict[str, Any] = json.loads(record.read_text())
        return note if (self.folder / name).stat().st_size == note["nbytes"] else None

    @contextlib.contextmanager
    def writing(self, name: str, nbytes: int) -> Iterator[int]:
        """A file descriptor to write `nbytes` of the file `name` through; the file has its name once it is on disk."""
        partial = self.folder / f"{name}.part"
        partial.parent.mkdir(parents=True, exist_ok=True)
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
        partial = self.notes / f"{noted(name)}.part"
        write_synced(partial, json.dumps({"file": name, **record}).encode())
        os.rename(partial, self.notes / noted(name))

    def commit(self, small: Mapping[str, bytes]) -> None:
        """Writes the small files, that without which nothing loads last, and has the folder appear under its name."""
        finished = {self.folder / json.loads(record.read_text())["file"] for record in self.notes.glob("*.json")}
        for path in self.folder.rglob("*"):
            if path.is_file() and path not in finished and self.notes not in path.parents:
                remove(path)
        for path in sorted(self.folder.rglob("*"), reverse=True):  # a directory after all that is in it
            if path.is_dir() and path != self.notes and not any(path.iterdir()):
                path.rmdir()
        for name, data in small.items():
            path = self.folder / (f"{name}.part" if name == self.last else name)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_synced(path, data)
        shutil.rmtree(self.notes)
        os.rename(self.folder / f"{self.last}.part", self.folder / self.last)
        for folder in (self.folder, *(path for path in self.folder.rglob("*") if path.is_dir())):
            sync_folder(folder)
        old = self.target.with_name(self.target.name + ".replaced")
        if self.target.exists():
            remove(old)
            os.rename(self.target, old)
        os.rename(self.folder, self.target)
        sync_folder(self.target.parent)
        remove(old)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, (Refused, OSError)):
            self.drop()
        else:
            os.close(self.lock)
        if isinstance(error, OSError):
            raise reason(error, self.target) from error


def replaceable(target: Path, overwrite: bool) -> None:
    """Refuses a target that is there, unless it may be overwritten and is what this writes."""
    if not target.exists():
        return
    if not overwrite:
        raise refuse("the target exists already", target, "choose another, or give --overwrite")
    written = target.is_dir() and any((target / mark).exists() for mark in (CONFIG, TRACKER))
    if not written and not (target.is_dir() and not any(target.iterdir())):
        what = f"the target is neither a model's folder nor a checkpoint: it has no {CONFIG} and no {TRACKER}"
        raise refuse(what, target, "remove it, or choose another")


def noted(name: str) -> str:
    """The file in which it is noted that the file `name` is finished."""
    return f"{name.replace('/', '%')}.json"


def is_at(fd: int, path: Path) -> bool:
    """Whether the open folder is still the one at `path`."""
    return path.exists() and os.path.samestat(os.fstat(fd), path.stat())


def stranger(folder: Path) -> None:
    """Refuses a folder that has the staged one's name and was not made here."""
    names = {path.name for path in folder.iterdir()}
    if names and not names & {NOTES, "megahf.json"}:
        raise refuse("a folder of someone else's is in the way", folder, "move it, or choose another target")


@contextlib.contextmanager
def explained(target: Path) -> Iterator[None]:
    """System errors about `target` as refusals."""
    try:
        yield
    except OSError as error:
        raise reason(error, target) from error


def reason(error: OSError, target: Path) -> Refused:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        said = "the disk is full" if error.errno == errno.ENOSPC else os.strerror(error.errno)
        return refuse(said, target, "nothing was left behind; free some space or choose another disk")
    return refuse(f"cannot write: {os.strerror(error.errno or 0)}", error.filename or target)


def write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Asks for the names in a folder to be on the disk, like the bytes they name; some network disks cannot."""
    fd = os.open(path, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.fsync(fd)
    os.close(fd)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
