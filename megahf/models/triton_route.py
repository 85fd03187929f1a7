# mypy: disable-error-code="no-untyped-def"
"""Which rows an expert gets, found on the GPU in two launches that nothing waits for: no count is read back.

Rows are the places of `experts` `[t, k]`, token by token. Sorted by expert they keep their order, so that the same
choice gives the same sums. Blocks of `block` sorted rows, none with rows of two experts, are the kernels' tiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .kernel_choice import jit, launch, tl

LEAST = 16  # rows of a tile
MOST_PROGRAMS = 128  # each reads what all have counted
CELLS = 16384  # comparisons of rows with experts that a program makes at once
BATCH = 16  # programs whose counts are read at once
WARPS = 8


class Route(NamedTuple):
    """Where rows go. Rows of experts beyond the last, which are another process's, come after all others.

    Args:
        order: `[t k]` int32, the row that is at a sorted place.
        token: `[t k]` int32, its token.
        inverse: `[t k]` int32, the sorted place of a row.
        ends: `[e]` int32, after which sorted row each expert's end.
        tile_expert: `[room]` int32, the expert of a tile; -1: there is no such tile. After `most_tiles` undefined.
        tile_row: `[room]` int32, the first sorted row of a tile.
    """

    order: Tensor
    token: Tensor
    inverse: Tensor
    ends: Tensor
    tile_expert: Tensor
    tile_row: Tensor


@jit
def counted(expert, group):
    """How many of `expert` `[r]` are each of `group` `[g]`."""
    return tl.sum((expert[:, None] == group[None, :]).to(tl.int32), axis=0)


@jit
def looked_up(table, group, wanted):
    """`table` `[g]` at `wanted` `[r]`, 0 where there is none."""
    return tl.sum(tl.where(wanted[:, None] == group[None, :], table[None, :], 0), axis=1)


@jit
def count_kernel(experts, counts, rows, length, groups, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """How many of a program's `length` rows each expert gets."""
    group, first = tl.arange(0, GROUPS), tl.program_id(0) * length
    total = tl.zeros((GROUPS,), dtype=tl.int32)
    for start in range(first, first + length, ROWS):
        row = start + tl.arange(0, ROWS)
        total += counted(tl.load(experts + row, mask=row < rows, other=-1).to(tl.int32), group)
    tl.store(counts + tl.program_id(0) * groups + group, total, mask=group < groups)


@jit
def place_kernel(
    experts, counts, order, token, inverse, ends, tile_expert, tile_row, rows, length, tiles, groups, topk,
    ROWS: tl.constexpr, GROUPS: tl.constexpr, BATCH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Puts a program's rows where those of all experts and programs before it end, and cuts its part of the tiles."""
    program, group = tl.program_id(0), tl.arange(0, GROUPS)
    before, total = tl.zeros((GROUPS,), dtype=tl.int32), tl.zeros((GROUPS,), dtype=tl.int32)
    for first in range(0, tl.num_programs(0), BATCH):
        other = first + tl.arange(0, BATCH)[:, None]
        inside = (other < tl.num_programs(0)) & (group[None, :] < groups)
        count = tl.load(counts + other * groups + group[None, :], mask=inside, other=0)
        total += tl.sum(count, axis=0)
        before += tl.sum(tl.where(other < program, count, 0), axis=0)
    end = tl.cumsum(total, axis=0)
    tl.store(ends + group, end, mask=(group < groups) & (program == 0))
    held, first = tl.sum(total, axis=0), program * length
    for start in range(first, tl.minimum(first + length, rows), ROWS):
        row = start + tl.arange(0, ROWS)
        expert = tl.load(experts + row, mask=row < rows, other=-1).to(tl.int32)
        expert = tl.where(expert < groups, expert, GROUPS)
        earlier = (expert[:, None] == expert[None, :]) & (row[:, None] > row[None, :])
        elsewhere = held + start - tl.sum(before, axis=0)  # after all that are held, and earlier ones of its kind
        place = tl.where(expert < GROUPS, looked_up(end - total + before, group, expert), elsewhere)
        place += tl.sum(earlier.to(tl.int32), axis=1)
        tl.store(inverse + row, place, mask=row < rows)
        tl.store(order + place, row, mask=row < rows)
        tl.store(token + place, row // topk, mask=row < rows)
        before += counted(expert, group)
    cut(tile_expert, tile_row, end - total, total, tiles, ROWS, GROUPS, BLOCK)


@jit
def cut(tile_expert, tile_row, start, count, tiles, ROWS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Stores the tiles of experts that start at the rows `start` and have `count`; programs take turns."""
    group, many = tl.arange(0, GROUPS), tl.cdiv(count, BLOCK)
    end = tl.cumsum(many, axis=0)
    for first in range(tl.program_id(0) * ROWS, tiles, tl.num_programs(0) * ROWS):
        tile = first + tl.arange(0, ROWS)
        expert = tl.sum((end[None, :] <= tile[:, None]).to(tl.int32), axis=1)
        row = looked_up(start - (end - many) * BLOCK, group, expert) + tile * BLOCK
        there = tile < tl.sum(many, axis=0)
        tl.store(tile_expert + tile, tl.where(there, expert, -1), mask=tile < tiles)
        tl.store(tile_row + tile, tl.where(there, row, 0), mask=tile < tiles)


@jit
def cut_kernel(
    ends, tile_expert, tile_row, tiles, groups, ROWS: tl.constexpr, GROUPS: tl.constexpr, BLOCK: tl.constexpr
):
    group = tl.arange(0, GROUPS)
    start = tl.load(ends + group - 1, mask=(group > 0) & (group < groups), other=0)
    end = tl.load(ends + group, mask=group < groups, other=0)
    cut(tile_expert, tile_row, start, tl.where(group < groups, end - start, 0), tiles, ROWS, GROUPS, BLOCK)


def most_tiles(rows: int, groups: int, block: int) -> int:
    """How many tiles there are at most, whatever rows the groups have."""
    return min(rows, rows // block + groups)


def room(rows: int, groups: int) -> int:
    """For how many tiles there is memory, whatever `block`: a compiled graph need not know it."""
    return rows // LEAST + groups


def sizes(groups: int) -> tuple[int, int]:
    """Rows that a program compares at once, and groups, each a power of 2."""
    padded = max(16, 1 << (groups - 1).bit_length())
    return max(16, min(128, CELLS // padded)), padded


def route(experts: Tensor, groups: int, block: int) -> Route:
    """Sorts `experts` `[t, k]`, numbers of which `groups` are here, and cuts what each has into tiles of `block`."""
    experts, rows = experts.contiguous(), experts.numel()
    at_once, padded = sizes(groups)
    length = at_once * -(-rows // (at_once * MOST_PROGRAMS))
    programs, tiles = -(-rows // length), most_tiles(rows, groups, block)
    counts = torch.empty(programs, groups, dtype=torch.int32, device=experts.device)
    order, token, inverse, ends, tile_expert, tile_row = (
        counts.new_empty(many) for many in (rows, rows, rows, groups, *[room(rows, groups)] * 2)
    )
    options = {"ROWS": at_once, "GROUPS": padded, "num_warps": WARPS}
    launch(count_kernel, (programs,), experts, counts, rows, length, groups, **options)
    where, numbers = Route(order, token, inverse, ends, tile_expert, tile_row), (rows, length, tiles, groups)
    options |= {"BATCH": BATCH, "BLOCK": block}
    launch(place_kernel, (programs,), experts, counts, *where, *numbers, experts.shape[1], **options)
    return where


def cut_tiles(ends: Tensor, rows: int, block: int) -> tuple[Tensor, Tensor]:
    """The tiles alone, of `rows` sorted already."""
    groups = len(ends)
    at_once, padded = sizes(groups)
    tiles = most_tiles(rows, groups, block)
    tile_expert, tile_row = ends.new_empty(2, tiles)
    programs = -(-tiles // at_once)
    options = {"ROWS": at_once, "GROUPS": padded, "BLOCK": block, "num_warps": WARPS}
    launch(cut_kernel, (programs,), ends, tile_expert, tile_row, tiles, groups, **options)
    return tile_expert, tile_row


def fake_route(experts: Tensor, groups: int) -> tuple[Tensor, ...]:
    """Tensors of the shapes that `route` gives."""
    rows = experts.numel()
    sizes = (rows, rows, rows, groups, *[room(rows, groups)] * 2)
    return tuple(experts.new_empty(many, dtype=torch.int32) for many in sizes)
