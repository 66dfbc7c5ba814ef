"""crc32 of bytes, and of a whole from the crc32 of its parts, so that threads can check pieces of one tensor.

isal multiplies without carries and so is several times as fast as zlib for the same polynomial; where it has no wheel,
zlib gives the same numbers (benchmarks/results/checksums.md).

crc32 is linear over GF(2): appending n zero bytes multiplies the register by x^(8n) modulo the polynomial. This is
zlib's `crc32_combine` (the polynomial of ISO 3309, reflected: 0xEDB88320).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

try:
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

__all__ = ["combine", "crc32"]

_POLYNOMIAL = 0xEDB88320


def _multiply(left: int, right: int) -> int:
    """Return left * right modulo the polynomial; bit 31 is the coefficient of x^0."""
    product = 0
    for bit in range(31, -1, -1):
        if left >> bit & 1:
            product ^= right
        right = right >> 1 ^ (_POLYNOMIAL if right & 1 else 0)
    return product


@cache
def _power_of_x(zeros: int) -> int:
    """Return x^(8 * zeros) modulo the polynomial."""
    result, square, exponent = 1 << 31, 1 << 23, zeros  # x^0 and x^8
    while exponent:
        if exponent & 1:
            result = _multiply(square, result)
        square = _multiply(square, square)
        exponent >>= 1
    return result


def combine(parts: Iterable[tuple[int, int]]) -> int:
    """Return the crc32 of pieces laid end to end.

    Args:
        parts: for each piece in order its crc32 and its length in bytes.
    """
    total = 0
    for crc, length in parts:
        total = _multiply(_power_of_x(length), total) ^ crc
    return total
