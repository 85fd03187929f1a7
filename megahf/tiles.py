"""Arrays made of tiles: how a weight that lies in many files is one array before a byte of it is read.

A tile is a NumPy view, as a rule on a mapped file, at a place in a larger array. The view words (narrow, take, join,
stack, swap axes, unflatten, flatten) only move places and views, so a cut or a pack is written once, runs on real
arrays in tests and on mapped files in plans, and the tiles that are left at the end *are* the regions to copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np


class Tile(NamedTuple):
    start: tuple[int, ...]  # where in the whole it lies
    view: np.ndarray


@dataclass(frozen=True)
class Tiled:
    """An array of `shape` and `dtype`, covered exactly once by its tiles."""

    shape: tuple[int, ...]
    dtype: np.dtype
    tiles: tuple[Tile, ...]

    @classmethod
    def of(cls, array: np.ndarray) -> Tiled:
        """The whole array as one tile."""
        return cls(array.shape, array.dtype, (Tile((0,) * array.ndim, array),))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def narrow(self, axis: int, start: int, length: int) -> Tiled:
        """Places `start .. start + length` along `axis`."""
        if not 0 <= start <= start + length <= self.shape[axis]:
            raise ValueError(f"{start}..{start + length} is outside axis {axis} of {self.shape}")
        return Tiled(
            replaced(self.shape, axis, length), self.dtype, tuple(narrowed(self.tiles, axis, start, start + length))
        )

    def split(self, sizes: Sequence[int], axis: int) -> list[Tiled]:
        """Consecutive pieces of `sizes` along `axis`; the sizes must add up to the whole."""
        if sum(sizes) != self.shape[axis]:
            raise ValueError(f"pieces of {list(sizes)} do not make the {self.shape[axis]} of axis {axis}")
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        return [self.narrow(axis, start, size) for start, size in zip(starts, sizes, strict=True)]

    def take(self, index: int) -> Tiled:
        """Place `index` of the first axis, without that axis: layer `index` of stacked layers."""
        tiles = narrowed(self.tiles, 0, index, index + 1)
        return Tiled(self.shape[1:], self.dtype, tuple(Tile(tile.start[1:], tile.view[0, ...]) for tile in tiles))

    def swapaxes(self, a: int, b: int) -> Tiled:
        """The same array with axes `a` and `b` exchanged."""
        tiles = tuple(Tile(swapped(tile.start, a, b), tile.view.swapaxes(a, b)) for tile in self.tiles)
        return Tiled(swapped(self.shape, a, b), self.dtype, tiles)

    def unflatten(self, axis: int, sizes: tuple[int, int]) -> Tiled:
        """Axis `axis` as two, the second of them the faster one; tiles that end inside a row of it are split there.

        One of the two sizes may be -1: what is left.
        """
        rows, row = (-self.shape[axis] // (sizes[0] * sizes[1]) if size == -1 else size for size in sizes)
        if rows * row != self.shape[axis]:
            raise ValueError(f"axis {axis} of {self.shape} is not {rows} x {row}")
        tiles = [cut for tile in self.tiles for cut in unflattened(tile, axis, row)]
        return Tiled((*self.shape[:axis], rows, row, *self.shape[axis + 1 :]), self.dtype, tuple(tiles))

    def flatten(self, axis: int) -> Tiled:
        """Axes `axis` and `axis + 1` as one: the inverse of `unflatten`."""
        row = self.shape[axis + 1]
        tiles = [cut for tile in self.tiles for cut in flattened(tile, axis, row)]
        shape = (*self.shape[:axis], self.shape[axis] * row, *self.shape[axis + 2 :])
        return Tiled(shape, self.dtype, tuple(tiles))

    def numpy(self) -> np.ndarray:
        """The whole as one array in memory: for tests and for weights known to be small."""
        whole = np.empty(self.shape, self.dtype)
        for start, view in self.tiles:
            whole[tuple(slice(at, at + size) for at, size in zip(start, view.shape, strict=True))] = view
        return whole


def join(parts: Sequence[Tiled], axis: int) -> Tiled:
    """The parts end to end along `axis`; dtypes and all other sizes must agree."""
    first, size, tiles = parts[0], 0, []
    for part in parts:
        if part.dtype != first.dtype or replaced(part.shape, axis, 0) != replaced(first.shape, axis, 0):
            theirs, ours = f"{part.dtype}{list(part.shape)}", f"{first.dtype}{list(first.shape)}"
            raise ValueError(f"{theirs} cannot join {ours} on axis {axis}")
        tiles += [Tile(replaced(tile.start, axis, tile.start[axis] + size), tile.view) for tile in part.tiles]
        size += part.shape[axis]
    return Tiled(replaced(first.shape, axis, size), first.dtype, tuple(tiles))


def stack(parts: Sequence[Tiled]) -> Tiled:
    """The parts along a new first axis."""
    return join([add_axis(part) for part in parts], 0)


def unstack(array: Tiled) -> list[Tiled]:
    """Every place of the first axis on its own, without that axis: `take` of each, in one walk over the tiles."""
    tiles: list[list[Tile]] = [[] for _ in range(array.shape[0])]
    for start, view in array.tiles:
        for index in range(view.shape[0]):
            tiles[start[0] + index].append(Tile(start[1:], view[index, ...]))
    return [Tiled(array.shape[1:], array.dtype, tuple(of)) for of in tiles]


NOTHING = np.zeros(16, np.uint8)  # what padding is made of


def zeros(shape: tuple[int, ...], dtype: np.dtype) -> Tiled:
    """Zeros that take no memory: padding, which lies in no file."""
    return Tiled.of(np.ndarray(shape, dtype, NOTHING, strides=(0,) * len(shape)))


def is_padding(view: np.ndarray) -> bool:
    """Whether it is one of `zeros`, or a part of it."""
    place: int = NOTHING.__array_interface__["data"][0]
    return view.__array_interface__["data"][0] == place


def add_axis(part: Tiled) -> Tiled:
    return Tiled((1, *part.shape), part.dtype, tuple(Tile((0, *start), view[None]) for start, view in part.tiles))


def replaced(values: tuple[int, ...], axis: int, value: int) -> tuple[int, ...]:
    return (*values[:axis], value, *values[axis + 1 :])


def swapped(values: tuple[int, ...], a: int, b: int) -> tuple[int, ...]:
    order = list(values)
    order[a], order[b] = order[b], order[a]
    return tuple(order)


def narrowed(tiles: Sequence[Tile], axis: int, start: int, stop: int) -> Iterator[Tile]:
    for tile in tiles:
        at, size = tile.start[axis], tile.view.shape[axis]
        first, last = max(at, start), min(at + size, stop)
        if first < last:
            inside = (slice(None),) * axis + (slice(first - at, last - at),)
            yield Tile(replaced(tile.start, axis, first - start), tile.view[inside])


def unflattened(tile: Tile, axis: int, row: int) -> Iterator[Tile]:
    """A tile with `axis` as (rows, row): a partial first row, the whole rows, a partial last row."""
    at, size = tile.start[axis], tile.view.shape[axis]
    whole_from, whole_to = -(-at // row) * row, (at + size) // row * row
    ends = sorted({at, min(max(whole_from, at), at + size), max(min(whole_to, at + size), at), at + size})
    for first, last in pairwise(ends):
        view = tile.view[(slice(None),) * axis + (slice(first - at, last - at),)]
        width = min(row, last - first)
        shape = (*view.shape[:axis], (last - first) // width, width, *view.shape[axis + 1 :])
        start = (*tile.start[:axis], first // row, first % row, *tile.start[axis + 1 :])
        yield Tile(start, reshaped(view, axis, shape))


def reshaped(view: np.ndarray, axis: int, shape: tuple[int, ...]) -> np.ndarray:
    """`view` with `axis` as two axes of `shape`: strides only, never a copy."""
    stride = view.strides[axis]
    strides = (*view.strides[:axis], stride * shape[axis + 1], stride, *view.strides[axis + 1 :])
    return np.lib.stride_tricks.as_strided(view, shape, strides, writeable=False)


def flattened(tile: Tile, axis: int, row: int) -> Iterator[Tile]:
    """A tile with two axes as one: whole when its rows are whole and evenly spaced, else a tile a row."""
    rows, width = tile.view.shape[axis : axis + 2]
    strides = tile.view.strides[axis : axis + 2]
    start = (*tile.start[:axis], tile.start[axis] * row + tile.start[axis + 1], *tile.start[axis + 2 :])
    if rows == 1 or (width == row and (width == 1 or strides[0] == width * strides[1])):
        shape = (*tile.view.shape[:axis], rows * width, *tile.view.shape[axis + 2 :])
        step = strides[0] if width == 1 else strides[1]
        flat = (*tile.view.strides[:axis], step, *tile.view.strides[axis + 2 :])
        yield Tile(start, np.lib.stride_tricks.as_strided(tile.view, shape, flat, writeable=False))
        return
    for index in range(rows):
        view = tile.view[(slice(None),) * axis + (index,)]
        yield Tile(replaced(start, axis, start[axis] + index * row), view)
