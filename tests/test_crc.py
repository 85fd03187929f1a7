"""The CRC of a whole from the CRCs of its pieces is zlib's."""

from __future__ import annotations

import zlib

from hypothesis import given
from hypothesis import strategies as st

from megahf.crc import combine, multiply, zeros


@given(st.lists(st.binary(max_size=300), max_size=6))
def test_pieces_combine_to_the_crc_of_the_whole(pieces: list[bytes]) -> None:
    crc = 0
    for piece in pieces:
        crc = combine(crc, zlib.crc32(piece), len(piece))
    assert crc == zlib.crc32(b"".join(pieces))


@given(st.binary(min_size=1, max_size=50), st.integers(0, 1 << 22))
def test_long_runs_of_zeros_shift_a_crc(start: bytes, length: int) -> None:
    run = bytes(length)
    assert combine(zlib.crc32(start), zlib.crc32(run), length) == zlib.crc32(start + run)


@given(st.binary(max_size=50), st.binary(max_size=50), st.binary(max_size=50))
def test_the_order_of_combining_does_not_matter(a: bytes, b: bytes, c: bytes) -> None:
    left = combine(combine(zlib.crc32(a), zlib.crc32(b), len(b)), zlib.crc32(c), len(c))
    right = combine(zlib.crc32(a), combine(zlib.crc32(b), zlib.crc32(c), len(c)), len(b) + len(c))
    assert left == right


@given(*[st.integers(0, (1 << 32) - 1)] * 3)
def test_multiplication_is_that_of_a_field(a: int, b: int, c: int) -> None:
    assert multiply(a, b) == multiply(b, a)
    assert multiply(a, b ^ c) == multiply(a, b) ^ multiply(a, c)
    assert multiply(a, zeros(0)) == a  # x^0 is one


def test_shifts_add_up_beyond_four_gigabytes() -> None:
    assert multiply(zeros(5 << 30), zeros(123)) == zeros((5 << 30) + 123)
