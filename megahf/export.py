"""Megatron to Hugging Face: a checkpoint becomes a folder that `AutoModelForCausalLM` loads; no model is built."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import open_checkpoint
from .checkpoint.safetensors import INDEX, Shard, index, parse_size, shards
from .errors import refuse
from .execute import Checks, Ledger, run, settle
from .folder import small_files, tokenizer_size
from .plan import Copy, Plan, build
from .staging import Staging, explained, replaceable
from .weights import weights

Progress = Callable[[int], None]
MAX_SHARD_SIZE = "5GB"


def convert(
    source: str | Path,
    target: str | Path,
    *,
    dtype: str | None = None,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    true_vocab_size: int | None = None,
    tokenizer: str | Path | None = None,
    strict: bool = False,
    refuse_nonfinite: bool = False,
    checksums: bool = True,
    overwrite: bool = False,
    progress: Progress = lambda size: None,
) -> Plan:
    """Converts the checkpoint at `source` into the folder `target`; gives the plan that was carried out.

    Args:
        dtype: `bf16`, `fp16` or `fp32` for the weights; as stored by default.
        max_shard_size: of a safetensors file, like `5GB`.
        true_vocab_size: rows of the vocabulary to keep; else the tokenizer's size, else what the args say.
        tokenizer: a folder with a saved tokenizer, whose files go along.
        strict: refuse arguments that are not known to leave the function as it is.
        refuse_nonfinite: refuse NaN and infinity.
        checksums: check the source's CRCs and digest every weight.
        overwrite: replace `target`.
        progress: called with the number of bytes each time some were written.

    Raises:
        Refused: with every reason found; nothing is left behind.
    """
    plan = plan_for(source, dtype, true_vocab_size, tokenizer, strict)
    carry_out(plan, Path(target), max_shard_size, tokenizer, Checks(checksums, refuse_nonfinite), overwrite, progress)
    return plan


def plan_for(
    source: str | Path,
    dtype: str | None = None,
    true_vocab_size: int | None = None,
    tokenizer: str | Path | None = None,
    strict: bool = False,
) -> Plan:
    """What `convert` would do."""
    size = tokenizer_size(Path(tokenizer)) if tokenizer else None
    plan = build(open_checkpoint(source), dtype=dtype, true_vocab_size=true_vocab_size, tokenizer_size=size)
    if strict and plan.unknown_arguments:
        raise refuse(
            f"{len(plan.unknown_arguments)} arguments are not known to leave the function as it is",
            ", ".join(plan.unknown_arguments),
            "leave --strict out to have them only reported",
        )
    return plan


def carry_out(
    plan: Plan,
    target: Path,
    max_shard_size: str | int,
    tokenizer: str | Path | None,
    checks: Checks,
    overwrite: bool,
    progress: Progress,
) -> None:
    """Executes `plan` into `target`, taking up what an earlier run of the same plan staged."""
    files = dry_run_of(plan, target, max_shard_size, overwrite)
    ledger, digests = Ledger(), dict[str, str]()
    headers = hashlib.sha256(b"".join(shard.header for shard in files)).hexdigest()
    recipe = f"{plan.digest} {headers} {checks}"
    with Staging(target, recipe, sum(shard.nbytes for shard in files), overwrite) as staging:
        for shard in files:
            record = staging.done(shard.file)
            if record is None:
                record = write(shard, staging, plan, checks, progress)
                staging.note(shard.file, record)
            else:
                progress(sum(copy.nbytes for copy in shard.weights))
            ledger.load(record["ledger"])
            digests.update(record["digests"])
        if checks.checksums:
            settle(plan.checkpoint.files, plan.copies, ledger)
        small = small_files(plan, digests, Path(tokenizer) if tokenizer else None)
        if len(files) > 1:
            small[INDEX] = index(files, {weight.name for weight in weights(plan.config) if weight.row.float32})
        staging.commit(small)


def dry_run_of(plan: Plan, target: Path, max_shard_size: str | int, overwrite: bool) -> list[Shard[Copy]]:
    """The files that `plan` would be written to; refuses what can be refused before a byte moves."""
    with explained(target):
        source, place = plan.checkpoint.path.resolve(), target.resolve()
        if place == source or place in source.parents:
            raise refuse("the target holds the checkpoint itself", target, "choose another folder")
        replaceable(target, overwrite)
    return shards(sorted(plan.copies, key=lambda copy: natural(copy.runtime)), parse_size(max_shard_size))


def write(shard: Shard[Copy], staging: Staging, plan: Plan, checks: Checks, progress: Progress) -> dict[str, Any]:
    """One safetensors file; what to remember of it."""
    ledger = Ledger()
    with explained(staging.target), staging.writing(shard.file, shard.nbytes) as fd:
        turn = threading.Lock()  # the kernel takes one write at a time into a file; threads that wait there burn a core

        def sink(copy: Copy, offset: int, data: np.ndarray) -> None:
            place = shard.offsets[copy.name] + offset
            with turn:
                write_all(fd, data, place)
            start_writeback(fd, place, data.nbytes)

        write_all(fd, np.frombuffer(shard.header, np.uint8), 0)
        digests = run(shard.weights, plan.checkpoint.files, sink, checks, ledger, progress)
    return {"nbytes": shard.nbytes, "digests": digests, "ledger": ledger.dump()}


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


def natural(name: str) -> list[tuple[int, int] | tuple[int, str] | tuple[int, str, int]]:
    """Sort key that puts layer 2 before layer 10: the order of `save_pretrained` (transformers' `dot_natural_key`)."""
    return [natural_part(part) for part in name.split(".")]


def natural_part(part: str) -> tuple[int, int] | tuple[int, str] | tuple[int, str, int]:
    if part.isdigit():
        return 0, int(part)
    text = part.rstrip("0123456789")
    return (1, text, int(part[len(text) :])) if text != part else (1, text)
