"""BF16 on the CPU: `seam.FloatCodec`, and how many weights lie outside a budget."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from k2quant.kernels.codecs import values as explain
from k2quant.kernels.codecs.cpu import loops
from k2quant.kernels.codecs.cpu.checks import figures, frozen, same, same_fp8
from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.values import F32, U16


def to_bf16(values: F32 | NDArray[np.float16], out: U16) -> None:
    """Round to BF16, half to even. See `seam.FloatCodec`."""
    same(values.shape, out.shape)
    if not loops.float_to_bf16(frozen(values.astype(np.float32, copy=False)), out):
        raise explain.bad_float(values)


def compare(before: U16, after: U16) -> Figures:
    """Return the figures of `after` against the truth `before`. See `seam.FloatCodec`."""
    same(before.shape, after.shape)
    found = figures(before.size, loops.compare(frozen(before), frozen(after)))
    if found is None:
        raise explain.bad_weight(before if explain.has_infinity(before) else after)
    return found


def outside(
    before: U16,
    after: U16,
    scale: F32,
    block: tuple[int, int],
    *,
    largest_code: float,
    steps: float,
    relative: float,
    floor: float,
    least: float = math.inf,
) -> int:
    """Count the weights for which |before - after| exceeds steps * step + relative * |before| + floor.

    The step is the block's scale, but no more than its largest weight asks for: too large a scale excuses nothing. One
    that is less, but not below `least` of that, may cut off what exceeds its largest code, if it is stored as that.

    Args:
        before: BF16 bits `[R, K]`.
        after: BF16 bits `[R, K]`.
        scale: float32 `[ceil(R/block[0]), ceil(K/block[1])]`.
        block: rows and columns that share a scale.
        largest_code: what the block's largest weight is divided by to get the step it asks for.
        steps: allowed error in steps.
        relative: allowed error in units of the weight.
        floor: allowed error in units of one.
        least: share of the step that the largest weight asks for, from which on larger weights may be cut off.
    """
    same(before.shape, after.shape)
    same_fp8(before.shape, scale, block)
    bounds = [np.float32(each) for each in (largest_code, steps, relative, floor, least)]
    return int(loops.outside(frozen(before), frozen(after), frozen(scale), *block, *bounds))
