"""FP8's arithmetic on a GPU, each rule once: every kernel that rounds to FP8 calls these functions.

A weight is divided by its block's scale by a product with the reciprocal and one correction, which is exact: it is
argued where it stands, and tested.
"""

from __future__ import annotations

import triton
import triton.language as tl

from k2quant.kernels.codecs.gpu.bf16 import LARGEST_FLOAT, magnitude_of, round_to_bf16, widen
from k2quant.kernels.devices.rounding import INTERPRETED, round_to_e4m3


@triton.jit
def fp8_value(code):
    """Return the float32 of e4m3 codes, int32; NaN codes read as 480.

    Under float32's wider exponent the same bits mean the number times 2^-120, subnormal codes included.
    """
    moved = ((code & 0x80) << 24) | ((code & 0x7F) << 20)
    return moved.to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def fp8_scale(amax):
    """Return the plain float32 scale of blocks whose largest magnitude is `amax`, BF16 bits as int32."""
    return tl.where(amax > 0, tl.div_rn(widen(amax), 448.0), 1.0)


@triton.jit
def fp8_power(scale):
    """Return the least normal power of two that is not below a plain scale."""
    return ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def fp8_code(bits, scale, NATIVE: tl.constexpr):
    """Return the e4m3 codes, uint8, of w/scale, for BF16 bits and float32 scales of as many dimensions.

    The quotient is the correctly rounded one: a product with the correctly rounded reciprocal, within a unit in the
    last place, and one correction by its exact remainder (Markstein, 1990). Both sides are moved by a power of two
    where the remainder might be subnormal. If NATIVE, the GPU's own conversion rounds to e4m3; it needs sm_89.
    """
    shift = tl.where(scale < 9.094947017729282e-13, 1.2676506002282294e30, 1.0)  # below 2^-40, by 2^100
    shift = tl.where(scale > 1.152921504606847e18, 8.673617379884035e-19, shift)  # above 2^60, by 2^-60
    divisor, weights = scale * shift, widen(magnitude_of(bits)) * shift
    reciprocal = tl.div_rn(1.0, divisor)
    near = weights * reciprocal
    quotient = _fma(_fma(-near, divisor, weights), reciprocal, near)
    if NATIVE:
        code = quotient.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        code = round_to_e4m3(quotient)
    return code | ((bits >> 8) & 0x80).to(tl.uint8)


@triton.jit
def _fma(a, b, c):
    """Return a * b + c, rounded once; in the interpreter, whose own rounds twice, through float64."""
    if INTERPRETED:
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    return tl.fma(a, b, c)


@triton.jit
def least_scale(value, reciprocal, target):
    """Return the bits of the least float32 scale whose product with a code reaches the BF16 bits `target`.

    The product is rounded to float32, then to BF16. It reaches the target from the float32 T on that is half way below
    it, or next to that if the half way goes down to the even neighbour; and so from half way below T on, or just above
    if T's bits are odd. That edge has 25 bits, and the exact product 28, so float64 holds both.

    Args:
        value: the code's magnitude, float64, above zero.
        reciprocal: 1 / value, as near as float64 has it.
        target: int32, from 1 to 0x7F80.
    """
    reached = (target << 16) - 0x8000 + (target & 1)
    above = reached.to(tl.float32, bitcast=True).to(tl.float64)
    edge = (above + (reached - 1).to(tl.float32, bitcast=True).to(tl.float64)) * 0.5
    near = (edge * reciprocal).to(tl.float32)
    product = near.to(tl.float64) * value
    short = (product < edge) | ((product == edge) & (target % 2 == 1))
    return tl.minimum(near.to(tl.int32, bitcast=True) + short.to(tl.int32), LARGEST_FLOAT)


@triton.jit
def fp8_multiple(bits, scale, NATIVE: tl.constexpr):
    """Return where BF16 weights are codes times the scale."""
    return round_to_bf16(fp8_value(fp8_code(bits, scale, NATIVE).to(tl.int32)) * scale) == bits


@triton.jit
def fp8_scales_allowed(bits, code):
    """Return the ends, as float32 bits, of the interval of scales with which each code gives its BF16 weight.

    A product grows with its scale, so there is one interval: none for a weight that became zero, any for zero itself.
    """
    magnitude = magnitude_of(bits)
    code = code.to(tl.int32) & 0x7F
    value = tl.where(code == 0, 1.0, fp8_value(code)).to(tl.float64)
    reciprocal = 1.0 / value
    low = least_scale(value, reciprocal, tl.maximum(magnitude, 1))
    high = least_scale(value, reciprocal, magnitude + 1) - 1
    low = tl.where(code == 0, tl.where(magnitude == 0, 0, LARGEST_FLOAT), low)
    high = tl.where(code == 0, tl.where(magnitude == 0, LARGEST_FLOAT, 0), high)
    return low, high
