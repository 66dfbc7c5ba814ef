"""How many weights lie further off than rounding to FP4 explains, whoever rounded them.

The distance from a weight to the nearest code at its block's scale is all that rounding may cost, so a code that is one
step off is seen, unless the weight lies just between two. A block's scale is one that a rule or a search may choose for
its largest weight; one that is larger excuses no more than the largest of those, and one that is less cuts nothing off.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from k2quant.kernels.codecs.cpu.checks import frozen, same
from k2quant.kernels.codecs.values import F32, U16


def outside(
    before: U16,
    after: U16,
    scale: F32,
    *,
    least: float,
    most: float,
    unit: tuple[float, float],
    zeros: float,
) -> int:
    """Count the weights whose error their block's scale does not explain.

    Args:
        before: BF16 bits `[R, K]`.
        after: BF16 bits `[R, K]`, decoded.
        scale: float32 `[R, blocks]`, what codes are multiplied with.
        least: the least scale that may be chosen, in units of a block's amax / 6.
        most: the largest, likewise.
        unit: what may be taken from the one and added to the other where scales are near the least of their format.
        zeros: up to which amax a whole block may become zeros.
    """
    same(before.shape, after.shape)
    same(scale.shape[:1], before.shape[:1])
    bounds = [np.float32(each) for each in (least, most, *unit, zeros)]
    return int(_outside(frozen(before), frozen(after), frozen(scale), *bounds))


_jit = njit(cache=True, nogil=True, boundscheck=False, error_model="numpy")


@_jit
def _widen(bits: Any) -> np.float32:
    """Return the float32 value of BF16 bits."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@_jit
def _off(at: np.float32) -> np.float32:
    """Return the distance from a magnitude to the nearest of E2M1's."""
    if at < np.float32(1.75):
        return abs(at - np.rint(at * np.float32(2)) * np.float32(0.5))
    if at < np.float32(3.5):
        return abs(at - np.rint(at))
    return abs(at - (np.float32(4) if at < np.float32(5) else np.float32(6)))


@_jit
def _outside(
    before: U16,
    after: U16,
    scale: F32,
    least: np.float32,
    most: np.float32,
    down: np.float32,
    up: np.float32,
    zeros: np.float32,
) -> int:
    count = 0
    rows, blocks = scale.shape
    width = before.shape[1] // blocks
    for row in range(rows):
        for block in range(blocks):
            first = block * width
            largest = np.float32(0)
            for column in range(first, first + width):
                largest = max(largest, abs(_widen(before[row, column])))
            asked = largest / np.float32(6)
            step = scale[row, block]
            if not step >= least * asked - down:
                step = asked
            step = min(step, most * asked + up)
            for column in range(first, first + width):
                weight, stored = _widen(before[row, column]), _widen(after[row, column])
                at = abs(weight) / step if step > 0 else np.float32(0)
                # A quotient of weights far below the scale may round to zero; what such a weight loses is all of it.
                lost = abs(weight) if step > 0 and at < np.float32(0.25) else _off(at) * step
                rounded = abs(stored) * np.float32(1.01 * 2.0**-8) + abs(weight) * np.float32(2.0**-20)
                room = lost + rounded + np.float32(2.0**-133)
                empty = largest <= zeros and stored == 0
                count += not abs(weight - stored) <= room and not empty
    return count
