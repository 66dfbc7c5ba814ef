"""Rounding to FP8, and to BF16: the same bits on every GPU and in the interpreter, whose own casts are wrong."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""Whether kernels run in the interpreter; decided by the environment when Triton is imported."""


@triton.jit
def round_to(value, DTYPE: tl.constexpr):
    """Return float32 numbers rounded to DTYPE, to nearest, ties to even; NaN stays NaN.

    The interpreter's own cast to BF16 cuts the low half of a float32 off, and spoils subnormals.
    """
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = value.to(tl.int32, bitcast=True)
        half = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        half = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, half)
        return half.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return value.to(DTYPE)


@triton.jit
def round_to_e4m3(value):
    """Return the e4m3 code, uint8, of each float32: to nearest, ties to even, saturated at +-448; NaN stays NaN.

    From 2^-6 on, the code is the top of the float32's bits, rounded at bit 20 and with the exponent's bias lowered from
    127 to 7. Below, codes count steps of 2^-9, which is the last place of 2^14: adding that number does the rounding.
    """
    bits = value.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    subnormal = (tl.abs(value) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.minimum(tl.where(magnitude < 0x3C800000, subnormal, normal), 0x7E)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
