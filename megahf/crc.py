"""CRC-32 of a zip entry from the CRCs of its pieces, read in any order by any thread.

CRC-32 is linear: crc(A + B) is crc(A) shifted by len(B) zero bytes, plus crc(B). Shifting is a multiplication by
x^(8 len(B)) modulo the CRC's polynomial (zlib's crc32_combine, which Python does not expose).
"""

from __future__ import annotations

from functools import lru_cache

POLYNOMIAL = 0xEDB88320  # bits reversed: bit 31 is x^0


def multiply(a: int, b: int) -> int:
    """a * b modulo the polynomial."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ POLYNOMIAL if b & 1 else b >> 1
    return product


@lru_cache(maxsize=4096)
def zeros(length: int) -> int:
    """x^(8 length): what `length` zero bytes multiply a CRC by."""
    power, square = 1 << 31, 1 << 23  # x^0, x^8
    while length:
        if length & 1:
            power = multiply(square, power)
        square = multiply(square, square)
        length >>= 1
    return power


def combine(first: int, second: int, length: int) -> int:
    """The CRC of A + B from crc(A), crc(B) and len(B)."""
    return multiply(zeros(length), first) ^ second
