"""The arithmetic of the codecs on a GPU, each rule once: every kernel that rounds calls these functions.

The bits are those of `reference.py`. BF16 travels as int16 bits and is computed with as float32: the interpreter's own
conversions truncate, and spoil subnormal numbers. Kernels are launched with `exact=True`, so that no product and sum
are contracted into one rounding.

A weight is divided by its group's scale by a product with the reciprocal, for a true division takes ten instructions of
the twenty that a weight may cost at the speed of memory. That this is exact is argued where it stands, and the tests
try every pair of mantissas.
"""

from __future__ import annotations

import triton
import triton.language as tl

from k2quant.kernels.devices.rounding import INTERPRETED, round_to, round_to_e4m3

INFINITY = tl.constexpr(0x7F80)
"""BF16 bits of infinity; NaN lies above."""

LARGE = tl.constexpr(0x7E80)
"""BF16 bits of 2^126: below this largest weight no group has a value that exceeds BF16."""

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


# --- INT4 -----------------------------------------------------------------------------------------------------------


@triton.jit
def int4_scale(amax, GRID: tl.constexpr, LARGEST: tl.constexpr):
    """Return the plain scale, BF16 bits, of groups whose largest magnitude is `amax`, BF16 bits as int32.

    LARGEST is the largest code of the moonshot grid, a float: 7.0, or that of another width.
    """
    if GRID == "compressed-tensors":
        scale = round_to_bf16(tl.div_rn(widen(amax), 7.5))
    else:
        scale = round_to_bf16(tl.div_rn(widen(amax), LARGEST))
    return tl.where(scale == 0, 0x3C00, scale).to(tl.int16)  # 2^-7, as compressed-tensors writes for a scale of zero


@triton.jit
def int4_nibble(weights, scale, GRID: tl.constexpr, LARGEST: tl.constexpr):
    """Return code + 8 as int32, for weights `[G, 4, 8]` and scales `[G]`, both float32; LARGEST as in `int4_scale`.

    The quotient of two BF16 numbers is either a tie n + 1/2 or further than 2^-10 from all ties, for its denominator is
    below 256. The product with the reciprocal errs by less than 2^-15, for with codes up to 127 no quotient exceeds
    191; rounding it to multiples of 2^-13 gives back the ties, and moves nothing across one. No BF16 quotient is a tie
    of BF16, and none is as close to one as 2^-17 of itself, so for the other grid the product rounds to the same BF16
    number as the quotient.
    """
    # The reciprocal of a tiny scale would overflow, and that of a huge one lose bits, so both sides are moved.
    shift = tl.where(scale < 1.0, 18446744073709551616.0, 5.421010862427522e-20)  # 2^64, 2^-64
    reciprocal = tl.div_rn(1.0, scale * shift)
    quotient = (weights * shift[:, None, None]) * reciprocal[:, None, None]
    if GRID == "compressed-tensors":
        quotient = tl.maximum(widen(round_to_bf16(quotient)), -8.0)
    else:
        quotient = tl.maximum((quotient + 1536.0) - 1536.0, -LARGEST)
    # Adding 1.5 * 2^23 + 8 rounds half to even, and leaves the code + 8 in the lowest bits; the others are those of
    # 1.5 * 2^23. Who packs only the lowest four pays nothing for taking them away.
    return (tl.minimum(quotient, LARGEST) + 12582920.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def int4_product(nibble, scale):
    """Return the BF16 bits of code * scale, where `nibble` is code + 8, of any width."""
    return round_to_bf16((nibble - 8).to(tl.float32) * scale)


@triton.jit
def recovered_int4_scale(bits, amax, scale, candidates):
    """Return for each of `candidates` the first scale of `recovery.CANDIDATES` that gives its group; else `scale`.

    A product with the candidate lies within 2^-8 of itself of code * candidate, so only the nearest code can fit.

    Args:
        bits: BF16 bits `[G, 4, 8]`.
        amax: their largest magnitudes `[G]`, int32.
        scale: the plain scales, BF16 bits `[G]`.
        candidates: bool `[G]`, which groups to try.
    """
    # One word at a time: the whole group would keep every register of the kernel, in which loads could be in flight.
    word = tl.arange(0, 4)[None, :, None]
    left, fits, step = candidates.to(tl.int32), candidates.to(tl.int32), 0
    while (step < 84) & (tl.max(left) > 0):
        candidate = step // 4
        ulp = (candidate % 3) - 3 * (candidate % 3 // 2)  # 0, 1, -1
        trial = round_to_bf16(tl.div_rn(widen(amax), 7.0 - candidate // 3)).to(tl.int32) + ulp
        valid = (trial > 0) & (trial < INFINITY)
        value = widen(tl.where(valid, trial, 0x3F80))
        magnitude = tl.sum(tl.where(word == step % 4, magnitude_of(bits), 0), 1)[:, None, :]
        product = int4_product(int4_nibble(widen(magnitude), value, "moonshot", 7.0), value[:, None, None])
        missed = tl.max(tl.max((product.to(tl.int32) != magnitude).to(tl.int32), 2), 1)
        fits = tl.where(valid, fits & (1 - missed), 0)
        if step % 4 == 3:
            scale = tl.where(fits > 0, trial.to(tl.int16), scale)
            left = left & (1 - fits)
            fits = left
        step += 1
    return scale


@triton.jit
def encode_int4(bits, bad_ptr, GRID: tl.constexpr, RECOVER: tl.constexpr, LARGEST: tl.constexpr):
    """Round groups to INT4; set the flag at `bad_ptr` where a weight is not finite, or would not be after decoding.

    Args:
        bits: BF16 bits `[G, 4, 8]`, four words of eight weights.
        bad_ptr: int32.
        GRID: "moonshot" or "compressed-tensors".
        RECOVER: whether to look for the scale that gives all weights of a group; of the moonshot grid, 4 bits, alone.
        LARGEST: the largest code of the moonshot grid, a float; 7.0 for the other grid.

    Returns:
        code + 8 as int32 `[G, 4, 8]`; the scale as BF16 bits `[G]`.
    """
    magnitude = magnitude_of(bits)
    amax = tl.max(tl.max(magnitude, 2), 1)
    scale = int4_scale(amax, GRID, LARGEST)
    special = amax >= LARGE
    if RECOVER and GRID == "moonshot":
        # No value but zero is below its scale, and no candidate is below bf16(amax/7) less a step. Of ordinary groups
        # one in 5000 holds nothing smaller; only such are searched, and all of those whose scale may be subnormal.
        least = tl.min(tl.min(tl.where(magnitude == 0, 0x7FFF, magnitude), 2), 1)
        candidates = ((least >= scale.to(tl.int32) - 1) | (amax < 0x200)) & (amax > 0) & (amax < INFINITY)
        special = special | candidates
    found = any_of(special)  # one vote among the program's threads for all that seldom happens
    if RECOVER and GRID == "moonshot":
        if found > 0:
            scale = recovered_int4_scale(bits, amax, scale, candidates)
    nibble = int4_nibble(widen(bits), widen(scale), GRID, LARGEST)
    if found > 0:
        after = magnitude_of(int4_product(nibble, widen(scale)[:, None, None]))
        if (tl.max(amax) >= INFINITY) | (tl.max(after) >= INFINITY):
            tl.store(bad_ptr, 1)
    return nibble, scale


# --- FP8 ------------------------------------------------------------------------------------------------------------


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


# --- figures --------------------------------------------------------------------------------------------------------


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
