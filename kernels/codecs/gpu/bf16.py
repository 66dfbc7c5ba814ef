"""BF16 on a GPU: what all kernels of the codecs compute with, each rule of arithmetic once.

BF16 travels as int16 bits and is computed with as float32: the interpreter's own conversions truncate, and spoil
subnormal numbers. Kernels are launched with `exact=True`, so that no product and sum are contracted into one rounding.
The bits are those of `reference`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from k2quant.kernels.devices.rounding import round_to

INFINITY = tl.constexpr(0x7F80)
"""BF16 bits of infinity; NaN lies above."""

LARGEST_FLOAT = tl.constexpr(0x7F7FFFFF)
"""Bits of the largest finite float32."""


@triton.jit
def widen(bits):
    """Return the float32 of BF16 bits."""
    return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def round_to_bf16(value):
    """Return the BF16 bits, int16, of each float32, rounded half to even; too large becomes infinity."""
    return round_to(value, tl.bfloat16).to(tl.int16, bitcast=True)


@triton.jit
def magnitude_of(bits):
    """Return BF16 bits without their sign, as int32; they order like the numbers, NaN above all."""
    return bits.to(tl.int32) & 0x7FFF


@triton.jit
def any_of(condition):
    """Return 1 if the condition holds anywhere in a tile, else 0."""
    return tl.max(condition.to(tl.int32))


@triton.jit
def bad_scale(scale):
    """Return where a float32 scale is NaN, infinite or has a sign bit."""
    bits = scale.to(tl.int32, bitcast=True)
    return (bits < 0) | (bits > LARGEST_FLOAT)


@triton.jit
def large_scale(scale):
    """Return where a float32 scale is bad, or so large that a product with a code of 448 might exceed BF16."""
    bits = scale.to(tl.int32, bitcast=True)
    return (bits < 0) | (bits >= 0x7B000000)  # 2^119


@triton.jit
def tally(before, after, sums_ptr, line):
    """Store energy, error, number of changed weights and worst error of a tile as float64.

    Args:
        before: BF16 bits of the truth.
        after: BF16 bits of the same shape.
        sums_ptr: float64 `[lines, 4]`.
        line: which line to write.
    """
    truth = widen(before)
    error = tl.abs(truth - widen(after))
    wide, wide_error = truth.to(tl.float64), error.to(tl.float64)
    sums_ptr += line * 4
    tl.store(sums_ptr, tl.sum(wide * wide))
    tl.store(sums_ptr + 1, tl.sum(wide_error * wide_error))
    tl.store(sums_ptr + 2, tl.sum((error > 0).to(tl.int32)).to(tl.float64))
    tl.store(sums_ptr + 3, tl.max(error).to(tl.float64))
