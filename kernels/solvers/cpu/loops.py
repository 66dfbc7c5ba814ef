"""The jitted loops of GPTQ: columns gathered in their order, a block of them rounded, and codes spread again.

A file of its own, for it calls no other jitted code: numba's cache would not see edits there. `reference` says the same
in plain torch, and the tests hold the two equal bit for bit.

How they are built. Matrices lie with columns as rows, so that the rows of W, which are independent, are the lanes of
the innermost loops: `LANES` of them at a time, their sums of a block in the first-level cache. No fast-math: a product
is rounded before it is added, every division is a true one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from k2quant.kernels.codecs.grids import GROUP
from k2quant.kernels.codecs.values import F32, U16

I8 = NDArray[np.int8]
I64 = NDArray[np.int64]
Int = Any  # what numba makes of integers is no one Python type

LANES = 64
"""Rows of W that are rounded together: their sums of a block, 32 KiB, are one core's first-level cache. With 32 LLVM
makes of the innermost loop what takes five times as long."""

TOGETHER = 8
"""Columns whose differences later columns of the block take at once, in their order; and rows that are gathered, or
spread, at once: more do not stay in the first-level cache."""

_jit = njit(cache=True, nogil=True, boundscheck=False, error_model="numpy")


@_jit
def _widen(bits: Int) -> np.float32:
    """Return the float32 value of BF16 bits."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@_jit
def _round(value: np.float32) -> np.uint32:
    """Return the BF16 bits of a float32 that is not NaN, rounded half to even, as uint32."""
    bits = np.float32(value).view(np.uint32)
    odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    return np.uint32(np.uint32(bits + np.uint32(np.uint32(0x7FFF) + odd)) >> np.uint32(16))


@_jit
def gather(weights: U16, order: I64, out: U16) -> bool:
    """Write the columns of BF16 `[R, K]` in their order as rows of `[K, P]`, zeros behind the last row of W.

    Returns:
        Whether all of them are finite.
    """
    rows, largest = weights.shape[0], np.uint16(0)
    for first in range(0, out.shape[1], TOGETHER):
        count = min(max(rows - first, 0), TOGETHER)
        for j in range(order.size):
            column, lanes = order[j], out[j, first : first + TOGETHER]
            lanes[:] = 0
            for lane in range(count):
                bits = weights[first + lane, column]
                largest = max(largest, np.uint16(bits & np.uint16(0x7FFF)))
                lanes[lane] = bits
    return bool(largest < 0x7F80)


@_jit
def order_rows(source: F32, order: I64, first: int, last: int, out: F32) -> None:
    """Write some rows of a symmetric `[K, K]`, rows and columns in an order, with zeros above the diagonal."""
    for row in range(first, last):
        here, there = source[order[row]], out[row]
        for column in range(row + 1):
            there[column] = here[order[column]]
        there[row + 1 :] = 0


@_jit
def _take(sums: F32, moved: F32, upper: F32, done: int) -> None:
    """Add what the last `TOGETHER` columns before `done` moved to the sums of the later ones, in the columns' order."""
    at = done - TOGETHER
    for k in range(done, sums.shape[0]):
        f0, f1, f2, f3 = upper[at, k], upper[at + 1, k], upper[at + 2, k], upper[at + 3, k]
        f4, f5, f6, f7 = upper[at + 4, k], upper[at + 5, k], upper[at + 6, k], upper[at + 7, k]
        for lane in range(LANES):
            total = sums[k, lane] + moved[0, lane] * f0
            total += moved[1, lane] * f1
            total += moved[2, lane] * f2
            total += moved[3, lane] * f3
            total += moved[4, lane] * f4
            total += moved[5, lane] * f5
            total += moved[6, lane] * f6
            sums[k, lane] = total + moved[7, lane] * f7


@_jit
def round_block(
    start: int,
    weights: U16,
    scales: F32,
    groups: I64,
    upper: F32,
    sums: F32,
    largest: np.float32,
    differences: F32,
    codes: I8,
) -> int:
    """Round the columns `start` to `start + B`, as `reference` does.

    Args:
        start: the first of them, in their order.
        weights: BF16 bits `[K, P]`, columns as rows.
        scales: `[K/32, P]`.
        groups: `[K]`, which scale each column has.
        upper: M's rows and columns `start` to `start + B`, `[B, B]`.
        sums: `[B, P]`, what the columns before `start` add.
        largest: L, the largest code.
        differences: `[K, P]`, W - Q; rows `start` to `start + B` are written.
        codes: int8 `[K, P]`, likewise.

    Returns:
        How many codes were clamped that plain rounding would not clamp.
    """
    width, lanes = sums.shape
    saturated = 0
    local, moved = np.empty((width, LANES), np.float32), np.empty((TOGETHER, LANES), np.float32)
    for first in range(0, lanes, LANES):
        for j in range(width):
            for lane in range(LANES):
                local[j, lane] = sums[j, first + lane]
        for j in range(width):
            at = start + j
            root = upper[j, j]
            scale = scales[groups[at], first : first + LANES]
            row, own, difference = weights[at, first : first + LANES], local[j], moved[j % TOGETHER]
            code_out, difference_out = codes[at, first : first + LANES], differences[at, first : first + LANES]
            beyond: Int = np.int32(0)
            for lane in range(LANES):
                weight, step = _widen(row[lane]), scale[lane]
                quotient = np.rint((weight + own[lane] / root) / step)
                usable = (step > 0) & ~np.isnan(quotient)
                quotient = quotient if usable else np.float32(0)
                clamped = min(max(quotient, -largest), largest)
                plain = abs(np.rint(weight / step)) <= largest
                beyond += np.int32((clamped != quotient) & plain)
                code_out[lane] = np.int8(clamped)
                difference[lane] = weight - _widen(_round(clamped * step))
                difference_out[lane] = difference[lane]
            saturated += beyond
            last = j // TOGETHER * TOGETHER + TOGETHER
            for k in range(j + 1, min(last, width)):
                factor, later = upper[j, k], local[k]
                for lane in range(LANES):
                    later[lane] += difference[lane] * factor
            if j == last - 1:
                _take(local, moved, upper, last)
    return saturated


@_jit
def spread(codes: I8, order: I64, scales: U16, out: I8, values: U16) -> None:
    """Write codes `[K, P]` to their places in int8 `[R, K]`, and the BF16 values that they stand for."""
    rows, columns = out.shape
    for first in range(0, rows, TOGETHER):
        last = min(first + TOGETHER, rows)
        for j in range(columns):
            column = order[j]
            for row in range(first, last):
                out[row, column] = codes[j, row]
        for row in range(first, last):
            for group in range(scales.shape[1]):
                step = _widen(scales[row, group])
                for column in range(group * GROUP, group * GROUP + GROUP):
                    values[row, column] = _round(np.float32(out[row, column]) * step)
