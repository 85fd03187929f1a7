"""Promise: the route's kernels sort rows by expert as a stable sort does, and cut them into tiles of one expert each.

The oracle is Python's own sort.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from without_gpu import SHARED_MEMORY, compiled, interpreted

from megahf.models import triton_route
from megahf.models.triton_route import cut_tiles, most_tiles, room, route


@pytest.fixture
def small() -> Iterator[pytest.MonkeyPatch]:
    """The interpreter, with programs of 16 rows at once, and memory that holds what is no row until it is stored."""
    with interpreted(triton_route) as patch:
        patch.setattr(triton_route, "CELLS", 16)
        patch.setattr(triton_route, "BATCH", 2)
        torch.use_deterministic_algorithms(True)
        yield patch
        torch.use_deterministic_algorithms(False)


def check(experts: Tensor, groups: int, block: int) -> None:
    where, (_, topk) = route(experts, groups, block), experts.shape
    flat = experts.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda row: min(flat[row], groups))  # Python's sort is stable
    assert where.order.tolist() == order
    assert where.token.tolist() == [row // topk for row in order]
    assert where.inverse.cpu()[torch.tensor(order)].tolist() == list(range(len(flat)))
    ends = [sum(expert <= group for expert in flat) for group in range(groups)]
    assert where.ends.tolist() == ends
    tiles = most_tiles(len(flat), groups, block)
    cut = cut_tiles(where.ends, len(flat), block)
    for numbers, rows in ((where.tile_expert, where.tile_row), cut):
        assert pairs(numbers[:tiles], rows[:tiles]) == written_down(ends, block, tiles)
    assert len(where.tile_expert) == len(where.tile_row) == room(len(flat), groups) >= tiles


def written_down(ends: list[int], block: int, tiles: int) -> list[tuple[int, int]]:
    """Expert and first row of each tile, and of those that are not there."""
    starts = [0, *ends[:-1]]
    found = [(group, row) for group, start in enumerate(starts) for row in range(start, ends[group], block)]
    return found + [(-1, 0)] * (tiles - len(found))


def pairs(numbers: Tensor, rows: Tensor) -> list[tuple[int, int]]:
    return list(zip(numbers.tolist(), rows.tolist(), strict=True))


CASES = [(1, 1, 1, 16), (1, 8, 128, 16), (3, 2, 5, 16), (17, 1, 3, 16), (40, 2, 17, 32), (65, 3, 7, 16)]


@pytest.mark.parametrize(("tokens", "topk", "groups", "block"), CASES)
@pytest.mark.parametrize("programs", [1, 3])
def test_it_is_a_stable_sort(
    small: pytest.MonkeyPatch, tokens: int, topk: int, groups: int, block: int, programs: int
) -> None:
    small.setattr(triton_route, "MOST_PROGRAMS", programs)
    generator = torch.Generator().manual_seed(tokens)
    check(torch.rand(tokens, groups, generator=generator).topk(min(topk, groups))[1], groups, block)


UNEVEN = [
    torch.full((37, 1), 2),  # all to one
    torch.tensor([[3, 3, 3]] * 11),  # an expert more than once in a row
    torch.tensor([[0, 4], [5, 4], [9, 0]] * 9),  # some of them elsewhere
    torch.full((20, 2), 5),  # all of them elsewhere
    torch.tensor([[1, 0]] * 16).int(),
    torch.arange(40).remainder(5).view(2, 20).t(),  # not contiguous
]


@pytest.mark.parametrize("experts", UNEVEN)
@pytest.mark.usefixtures("small")
def test_empty_full_and_foreign_experts(experts: Tensor) -> None:
    check(experts, 5, 16)


def test_with_the_sizes_of_a_gpu(small: pytest.MonkeyPatch) -> None:
    small.setattr(triton_route, "CELLS", 16384)
    check(torch.randint(0, 130, (300, 2), generator=torch.Generator().manual_seed(0)), 128, 64)


def test_a_compiled_graph_is_told_the_shapes(small: pytest.MonkeyPatch) -> None:
    experts = torch.randint(0, 6, (7, 2))
    for real, fake in zip(route(experts, 6, 16), triton_route.fake_route(experts, 6), strict=True):
        assert real.shape == fake.shape and real.dtype == fake.dtype


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_compiled_for_a_gpu_nothing_spills_and_nothing_waits_for_another(architecture: int) -> None:
    with compiled(architecture, triton_route) as launched:
        for groups in (8, 512):
            route(torch.zeros(4096, 8, dtype=torch.int64), groups, 128)
        cut_tiles(torch.zeros(256, dtype=torch.int32), 4096, 64)
    names = [kernel.name for kernel in launched.values()]
    assert sorted(names) == [*["count_kernel"] * 2, "cut_kernel", *["place_kernel"] * 2]  # two launches a route
    assert all(kernel.fits for kernel in launched.values()), launched
