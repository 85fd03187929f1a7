"""Files mapped into memory, read-only: an array on them is a place on disk, and the way back from array to place."""

from __future__ import annotations

import errno
import mmap
import os
from bisect import bisect_right, insort
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from megahf.errors import refuse

Opened = TypeVar("Opened")


class Entry(NamedTuple):
    """One stored run of bytes: a storage inside a file."""

    name: str
    offset: int  # bytes from the start of the file
    size: int  # bytes
    crc: int | None  # zlib.crc32 of the bytes as the writer noted it; None where the format notes none


class MappedFile:
    """A file mapped read-only; not a byte is read before someone looks.

    Attributes:
        path, size (bytes), mtime_ns: the file as it was when it was mapped.
        map: the mapping, which slices and searches like bytes.
        base: address of its first byte.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        descriptor = open_descriptor(self.path)
        try:
            status = os.fstat(descriptor)
            self.size, self.mtime_ns = status.st_size, status.st_mtime_ns
            if self.size == 0:
                raise refuse("the file is empty", path, "copy it again from where it was saved")
            self.map = with_files(path, lambda: mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
        finally:
            os.close(descriptor)
        self.base: int = np.frombuffer(self.map, np.uint8).__array_interface__["data"][0]
        self.entries: list[Entry] = []  # sorted by offset
        self._offsets: list[int] = []
        self._descriptor: int | None = None

    def view(
        self, offset: int, shape: tuple[int, ...], dtype: np.dtype, strides: tuple[int, ...] | None = None
    ) -> np.ndarray:
        """A read-only array on the bytes from `offset`; `strides` in bytes. ValueError outside the file."""
        return np.ndarray(shape, dtype, buffer=self.map, offset=offset, strides=strides)

    def note(self, entry: Entry) -> None:
        """Remembers a stored run of bytes, so that whoever copies it can check it against its checksum."""
        at = bisect_right(self._offsets, entry.offset)
        if at and self.entries[at - 1] == entry:
            return
        self.entries.insert(at, entry)
        self._offsets.insert(at, entry.offset)

    def entry_at(self, offset: int) -> Entry | None:
        """The stored run that byte `offset` of the file belongs to."""
        at = bisect_right(self._offsets, offset) - 1
        if at < 0 or offset >= self.entries[at].offset + self.entries[at].size:
            return None
        return self.entries[at]

    def fileno(self) -> int:
        """A descriptor for os.pread and os.copy_file_range, opened at the first call.

        It refuses a file that is no longer the one that was mapped.
        """
        if self._descriptor is None:
            self._descriptor = open_descriptor(self.path)
            status = os.fstat(self._descriptor)
            if (status.st_size, status.st_mtime_ns) != (self.size, self.mtime_ns):
                raise refuse(
                    "the file changed while it was read", self.path, "wait until it is written, then start again"
                )
        return self._descriptor

    def forget(self) -> None:
        """Gives back the pages that were looked at: parsing a storage's header maps 64 KB of the file around it."""
        self.map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Gives the descriptor back. The mapping itself lives on until the last array on it is gone."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class Files:
    """All mapped files of a checkpoint, each mapped once."""

    def __init__(self) -> None:
        self._by_path: dict[Path, MappedFile] = {}
        self._by_base: list[tuple[int, Path]] = []  # sorted by address

    def open(self, path: str | Path) -> MappedFile:
        """The file at `path`, mapped now or before."""
        path = Path(path)
        if path not in self._by_path:
            file = MappedFile(path)
            self._by_path[path] = file
            insort(self._by_base, (file.base, path))
        return self._by_path[path]

    def join(self, others: Files) -> None:
        """Knows the files of `others`, too."""
        for path, file in others._by_path.items():
            if path not in self._by_path:
                self._by_path[path] = file
            insort(self._by_base, (file.base, path))

    def __iter__(self) -> Iterator[MappedFile]:
        return iter(self._by_path.values())

    def __len__(self) -> int:
        return len(self._by_path)

    def locate(self, view: np.ndarray) -> tuple[MappedFile, int]:
        """The file and the byte offset in it of the view's first element; LookupError for an array in memory."""
        address = view.__array_interface__["data"][0]
        at = bisect_right(self._by_base, address, key=lambda row: row[0]) - 1
        if at >= 0:
            base, path = self._by_base[at]
            file = self._by_path[path]
            if address - base < file.size or (view.size == 0 and address - base == file.size):
                return file, address - base
        raise LookupError("the array is not on a mapped file")

    def close(self) -> None:
        for file in self:
            file.close()


def open_descriptor(path: Path) -> int:
    """A read-only descriptor."""
    return with_files(path, lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def with_files(path: str | Path, call: Callable[[], Opened]) -> Opened:
    """What `call` gives, which takes a descriptor; a checkpoint may have more files than the soft limit allows."""
    try:
        return call()
    except OSError as error:
        if error.errno == errno.EMFILE and raise_file_limit():
            return with_files(path, call)
        raise refuse(f"the file cannot be opened: {error.strerror}", path, limit_remedy(error)) from error


def raise_file_limit() -> bool:
    """Raises the soft limit on open files to the hard one; False when it is there already."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return False
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return True


def limit_remedy(error: OSError) -> str:
    if error.errno == errno.EMFILE:
        return "allow more open files: `ulimit -n 65536`, or have an administrator raise the hard limit"
    return "check that it exists and that you may read it"
