"""The words of lazy arrays (narrow, split, join, take, stack, swap axes, unflatten, flatten) are NumPy's own."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megahf.tiles import Tile, Tiled, join, stack, unstack

Case = tuple[Tiled, np.ndarray]


def numbered(shape: tuple[int, ...]) -> np.ndarray:
    """An array in which no number stands twice."""
    return np.arange(math.prod(shape), dtype=np.int32).reshape(shape)


def chopped(array: np.ndarray, cuts: list[list[int]]) -> Tiled:
    """The array as a grid of tiles that end wherever `cuts` says, in the middle of a row too."""
    tiles = [Tile((0,) * array.ndim, array)]
    for axis, places in enumerate(cuts):
        for place in places:
            tiles = [piece for tile in tiles for piece in halves(tile, axis, place)]
    return Tiled(array.shape, array.dtype, tuple(tiles))


def halves(tile: Tile, axis: int, place: int) -> list[Tile]:
    at = tile.start[axis]
    if not at < place < at + tile.view.shape[axis]:
        return [tile]
    left, right = np.split(tile.view, [place - at], axis)
    return [Tile(tile.start, left), Tile((*tile.start[:axis], place, *tile.start[axis + 1 :]), right)]


@st.composite
def cases(draw: st.DrawFn, dimensions: tuple[int, int] = (1, 3)) -> Case:
    """An array, and the same in tiles."""
    shape = draw(st.lists(st.integers(1, 12), min_size=dimensions[0], max_size=dimensions[1]))
    array = numbered(tuple(shape))
    if draw(st.booleans()):
        array = np.asfortranarray(array)  # strides of a file that stores the transpose
    return chopped(array, [draw(st.lists(st.integers(1, size), max_size=3)) for size in shape]), array


def assert_equals(tiled: Tiled, array: np.ndarray) -> None:
    """Same shape and numbers, every place covered by one tile and no other, and no byte copied on the way."""
    assert tiled.shape == array.shape
    covered = np.zeros(tiled.shape, int)
    for start, view in tiled.tiles:
        covered[tuple(slice(at, at + size) for at, size in zip(start, view.shape, strict=True))] += 1
    assert (covered == 1).all()
    np.testing.assert_array_equal(tiled.numpy(), array)


@given(cases())
def test_tiles_make_the_array_they_were_cut_from(case: Case) -> None:
    assert_equals(*case)
    assert case[0].nbytes == case[1].nbytes


@given(cases(), st.data())
def test_narrow_is_a_slice(case: Case, data: st.DataObject) -> None:
    tiled, array = case
    axis = data.draw(st.integers(0, array.ndim - 1))
    start = data.draw(st.integers(0, array.shape[axis]))
    length = data.draw(st.integers(0, array.shape[axis] - start))
    assert_equals(tiled.narrow(axis, start, length), array.take(range(start, start + length), axis))


@given(cases(), st.data())
def test_split_is_numpys_and_join_takes_it_back(case: Case, data: st.DataObject) -> None:
    tiled, array = case
    axis = data.draw(st.integers(0, array.ndim - 1))
    places = sorted(data.draw(st.lists(st.integers(0, array.shape[axis]), max_size=3)))
    sizes = [int(size) for size in np.diff([0, *places, array.shape[axis]])]
    parts = tiled.split(sizes, axis)
    for part, wanted in zip(parts, np.split(array, places, axis), strict=True):
        assert_equals(part, wanted)
    assert_equals(join(parts, axis), array)


@given(st.lists(cases((2, 2)), min_size=1, max_size=3), st.integers(0, 1))
def test_join_is_concatenate(parts: list[Case], axis: int) -> None:
    width = min(array.shape[1 - axis] for _, array in parts)
    tiles = [tiled.narrow(1 - axis, 0, width) for tiled, _ in parts]
    arrays = [array.take(range(width), 1 - axis) for _, array in parts]
    assert_equals(join(tiles, axis), np.concatenate(arrays, axis))


@given(cases(), st.integers(1, 4))
def test_stack_is_numpys_and_take_picks_from_it(case: Case, count: int) -> None:
    tiled, array = case
    stacked = stack([tiled] * count)
    assert_equals(stacked, np.stack([array] * count))
    assert_equals(stacked.take(count - 1), array)


@given(cases(), st.data())
def test_take_is_an_index_of_the_first_axis(case: Case, data: st.DataObject) -> None:
    tiled, array = case
    index = data.draw(st.integers(0, array.shape[0] - 1))
    assert_equals(tiled.take(index), array[index])


@given(cases())
def test_unstack_is_take_of_every_place(case: Case) -> None:
    tiled, array = case
    parts = unstack(tiled)
    assert len(parts) == array.shape[0]
    for part, wanted in zip(parts, array, strict=True):
        assert_equals(part, wanted)


@given(cases(), st.data())
def test_swapaxes_is_numpys(case: Case, data: st.DataObject) -> None:
    tiled, array = case
    a, b = (data.draw(st.integers(0, array.ndim - 1)) for _ in range(2))
    assert_equals(tiled.swapaxes(a, b), array.swapaxes(a, b))


@given(cases(), st.data())
def test_unflatten_is_a_reshape_and_flatten_takes_it_back(case: Case, data: st.DataObject) -> None:
    tiled, array = case
    axis = data.draw(st.integers(0, array.ndim - 1))
    size = array.shape[axis]
    rows = data.draw(st.sampled_from([rows for rows in range(1, size + 1) if size % rows == 0]))
    two = tiled.unflatten(axis, (rows, size // rows))
    assert_equals(two, array.reshape(*array.shape[:axis], rows, size // rows, *array.shape[axis + 1 :]))
    assert_equals(two.flatten(axis), array)


@given(cases((2, 3)), st.data())
def test_flatten_is_a_reshape(case: Case, data: st.DataObject) -> None:
    tiled, array = case
    axis = data.draw(st.integers(0, array.ndim - 2))
    shape = (*array.shape[:axis], array.shape[axis] * array.shape[axis + 1], *array.shape[axis + 2 :])
    assert_equals(tiled.flatten(axis), array.reshape(shape))


WORDS: list[Callable[[Tiled], Tiled]] = [
    lambda tiled: tiled.narrow(0, 1, 5),
    lambda tiled: tiled.unflatten(0, (3, 2)),
    lambda tiled: tiled.swapaxes(0, 1),
    lambda tiled: tiled.take(1),
    lambda tiled: tiled.take(1).take(2),
    lambda tiled: join(tiled.split([1, 3, 2], 0)[::-1], 0),
    lambda tiled: tiled.unflatten(0, (2, 3)).swapaxes(1, 2).flatten(1),
]


@pytest.mark.parametrize("word", WORDS)
def test_no_word_reads_or_copies_a_byte(word: Callable[[Tiled], Tiled]) -> None:
    array = numbered((6, 4))
    for _, view in word(chopped(array, [[2, 5], [1]])).tiles:
        assert np.shares_memory(view, array)


def test_words_follow_one_another() -> None:
    array = numbered((12, 5))
    tiled = chopped(array, [[1, 5, 7], [2]])
    steps = [tiled, lambda t: t.unflatten(0, (3, 4)), lambda t: t.swapaxes(0, 1), lambda t: t.flatten(0)]
    wanted = array.reshape(3, 4, 5).swapaxes(0, 1).reshape(12, 5)
    assert_equals(reduce(lambda value, step: step(value), steps), wanted)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda t: t.narrow(0, 3, 4), "3..7 is outside axis 0 of (6, 4)"),
        (lambda t: t.split([2, 3], 0), "pieces of [2, 3] do not make the 6 of axis 0"),
        (lambda t: t.unflatten(1, (3, 2)), "axis 1 of (6, 4) is not 3 x 2"),
        (lambda t: join([t, t.narrow(1, 0, 2)], 0), "int32[6, 2] cannot join int32[6, 4] on axis 0"),
        (lambda t: join([t, Tiled.of(np.zeros((6, 4)))], 0), "float64[6, 4] cannot join int32[6, 4] on axis 0"),
    ],
)
def test_what_does_not_fit_is_said_with_its_numbers(wrong: Callable[[Tiled], Tiled], message: str) -> None:
    with pytest.raises(ValueError) as error:
        wrong(Tiled.of(numbered((6, 4))))
    assert str(error.value) == message
