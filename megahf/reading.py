"""A tile's bytes from its file into memory, also where they lie scattered in it: transposed, or block by block."""

from __future__ import annotations

import math
import os

import numpy as np

from .checkpoint.mapped import MappedFile
from .errors import refuse

BLOCK = 256  # rows and columns that are turned at a time: a core's cache holds both sides
LONG = 16 << 10  # bytes in one run that are worth a read of their own
GAP = 64  # bytes between runs in memory: lengths of a power of two would crowd into a few lines of the cache


def pread(file: MappedFile, offset: int, into: np.ndarray) -> np.ndarray:
    """Fills `into` with the bytes at `offset`."""
    view, done = memoryview(into), 0
    while done < len(view):
        try:
            got = os.preadv(file.fileno(), [view[done:]], offset + done)
        except OSError as error:
            raise refuse(f"cannot be read at byte {offset + done}: {error.strerror}", file.path) from error
        if got == 0:
            raise refuse(f"the file ends at byte {offset + done}", file.path, "it was cut short while it was read")
        done += got
    return into


def expect(file: MappedFile, offset: int, size: int) -> None:
    """Has the system read these bytes ahead, in order."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_WILLNEED)


def span(view: np.ndarray) -> int:
    """Bytes from the first element of `view` to the end of its last."""
    steps = sum((size - 1) * stride for size, stride in zip(view.shape, view.strides, strict=True))
    return steps + view.itemsize if view.size else 0


def scattered(view: np.ndarray) -> bool:
    """Whether the bytes of `view` are not one run of its file, or not in the order of its elements."""
    return not view.flags.c_contiguous


def turned(view: np.ndarray) -> bool:
    """Whether neighbours along the last axis are not neighbours in the file."""
    return view.shape[-1:] > (1,) and view.strides[-1] != view.itemsize


def memory_of(view: np.ndarray) -> int:
    """Bytes of memory that `read_scattered` needs beside the target."""
    if whole(view):
        return span(view)
    runs, length = runs_of(view)
    return math.prod(runs.shape) * (length + GAP)


def whole(view: np.ndarray) -> bool:
    """Whether it is cheapest to read all that lies between, too: little does, or the runs are very short."""
    _, length = runs_of(view)
    return length < LONG and span(view) <= 2 * view.nbytes


def runs_of(view: np.ndarray) -> tuple[np.ndarray, int]:
    """Where the runs of bytes of `view` begin, counted from its first element, and how long each is.

    The array has an axis for each of the view's outer ones, the widest step first.
    """
    order = by_step(view)
    steps = view.transpose(order)
    inner, length = view.ndim, view.itemsize
    while inner and (steps.shape[inner - 1] == 1 or steps.strides[inner - 1] == length):
        inner -= 1
        length *= steps.shape[inner]
    starts = np.zeros(steps.shape[:inner], np.int64)
    for axis in range(inner):
        place = [1] * inner
        place[axis] = steps.shape[axis]
        starts = starts + (np.arange(steps.shape[axis]) * steps.strides[axis]).reshape(place)
    return starts, length


def by_step(view: np.ndarray) -> list[int]:
    """The axes of `view` from the widest step to the narrowest."""
    return sorted(range(view.ndim), key=lambda axis: (view.shape[axis] == 1, view.strides[axis]), reverse=True)


def read_scattered(file: MappedFile, offset: int, view: np.ndarray, memory: np.ndarray, target: np.ndarray) -> None:
    """The elements of `view`, whose first is at `offset`, into `target`; by way of `memory`."""
    if whole(view):
        raw = pread(file, offset, memory[: span(view)])
        turn(np.ndarray(view.shape, view.dtype, raw, strides=view.strides), target)
        return
    starts, length = runs_of(view)
    pitch = length + GAP
    for number, start in enumerate(starts.ravel().tolist()):
        pread(file, offset + start, memory[number * pitch : number * pitch + length])
    order = by_step(view)
    outer = starts.ndim
    strides = [pitch * math.prod(starts.shape[axis + 1 :]) for axis in range(outer)]
    strides += [view.strides[axis] for axis in order[outer:]]
    ordered = np.ndarray([view.shape[axis] for axis in order], view.dtype, memory, strides=strides)
    turn(ordered.transpose(np.argsort(order)), target)


def turn(source: np.ndarray, target: np.ndarray) -> None:
    """Copies `source` in blocks, since its neighbours and the target's lie along other axes."""
    last, fast = source.ndim - 1, by_step(source)[-1] if source.ndim else 0
    if fast == last or source.ndim < 2:
        np.copyto(target, source)
        return
    place = [slice(None)] * source.ndim
    for start in range(0, source.shape[fast], BLOCK):
        place[fast] = slice(start, start + BLOCK)
        for column in range(0, source.shape[last], BLOCK):
            place[last] = slice(column, column + BLOCK)
            target[tuple(place)] = source[tuple(place)]
