"""Carries out a plan: its weights to the files of a target, staged, checked, taken up where a killed run stopped."""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint.output import Known, Output
from .errors import refuse
from .execute import Checks, Ledger, run, settle
from .plan import Copy, Plan
from .staging import CONFIG, Staging, explained, replaceable

Progress = Callable[[int], None]
Digests = Mapping[str, Mapping[str, str]]  # file -> weight -> blake3 of its bytes there


@dataclass(frozen=True)
class Job:
    """Everything that will be written.

    Attributes:
        outputs: the files with weights.
        small: all others, from the digests of what was written.
        last: which of them makes the target load.
        afterwards: what to say, in lines, when it is written to a place.
    """

    outputs: Sequence[Output[Copy]]
    small: Callable[[Digests], dict[str, bytes]]
    last: str = CONFIG
    afterwards: Callable[[Path], list[str]] = lambda place: []

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)

    @property
    def digest(self) -> str:
        """Of the files' names and of every byte that is known beforehand."""
        text = hashlib.sha256()
        for output in self.outputs:
            text.update(repr((output.file, output.nbytes)).encode())
            for offset, data in output.known:
                text.update(b"%d %d " % (offset, len(data)))
                text.update(data)
        return text.hexdigest()


def check(plan: Plan, target: Path, overwrite: bool) -> None:
    """Refuses what can be refused before a byte moves."""
    with explained(target):
        source, place = plan.checkpoint.path.resolve(), target.resolve()
        if place == source or place in source.parents:
            raise refuse("the target holds the checkpoint itself", target, "choose another folder")
        replaceable(target, overwrite)


def carry_out(plan: Plan, job: Job, target: Path, checks: Checks, overwrite: bool, progress: Progress) -> None:
    """Writes `job` to `target`, taking up what an earlier run of the same plan staged."""
    check(plan, target, overwrite)
    ledger, digests = Ledger(), dict[str, Mapping[str, str]]()
    with Staging(target, f"{plan.digest} {job.digest} {checks}", job.nbytes, overwrite, job.last) as staging:
        for output in job.outputs:
            record = staging.done(output.file)
            if record is None:
                record = write(output, staging, plan, checks, progress)
                staging.note(output.file, record)
            else:
                progress(sum(copy.nbytes for copy in output.weights))
            ledger.load(record["ledger"])
            digests[output.file] = record["digests"]
        if checks.checksums:
            settle(plan.checkpoint.files, plan.copies, ledger)
        staging.commit(job.small(digests))


def write(output: Output[Copy], staging: Staging, plan: Plan, checks: Checks, progress: Progress) -> dict[str, Any]:
    """One file; what to remember of it."""
    ledger, crcs = Ledger(), dict.fromkeys(output.offsets, 0)
    with explained(staging.target), staging.writing(output.file, output.nbytes) as fd:
        turn = threading.Lock()  # the kernel takes one write at a time into a file; threads that wait there burn a core

        def sink(copy: Copy, offset: int, data: np.ndarray) -> None:
            if output.finish:
                crcs[copy.name] = zlib.crc32(data, crcs[copy.name])  # a weight's pieces come in order
            place = output.offsets[copy.name] + offset
            with turn:
                write_all(fd, data, place)
            start_writeback(fd, place, data.nbytes)

        write_known(fd, output.known)
        digests = run(output.weights, plan.checkpoint.files, sink, checks, ledger, progress)
        write_known(fd, output.finish(crcs) if output.finish else ())
    return {"nbytes": output.nbytes, "digests": digests, "ledger": ledger.dump()}


def write_known(fd: int, known: Iterable[Known]) -> None:
    for offset, data in known:
        write_all(fd, np.frombuffer(data, np.uint8), offset)


def write_all(fd: int, data: np.ndarray, offset: int) -> None:
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def start_writeback(fd: int, offset: int, size: int) -> None:
    """Has the disk begin with these bytes while the next ones are read, so that little is left for the sync at the end.

    Linux answers "not needed" about unwritten pages by starting to write them, and keeps them; other systems may not.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, size, os.POSIX_FADV_DONTNEED)
