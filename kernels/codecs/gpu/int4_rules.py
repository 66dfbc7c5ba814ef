"""INT4's arithmetic on a GPU, each rule once: every kernel that rounds to INT4 calls these functions.

A weight is divided by its group's scale by a product with the reciprocal, for a true division takes ten instructions of
the twenty that a weight may cost at the speed of memory. That this is exact is argued where it stands, and the tests
try every pair of mantissas.
"""

from __future__ import annotations

import triton
import triton.language as tl

from k2quant.kernels.codecs.gpu.bf16 import INFINITY, any_of, magnitude_of, round_to_bf16, widen
from k2quant.kernels.codecs.scales import search

LARGE = tl.constexpr(search.LARGE_AMAX)
"""BF16 bits of 2^126: below this largest weight no group has a value that exceeds BF16."""

LEAST_AMAX = tl.constexpr(search.LEAST_AMAX)
"""BF16 bits of the least largest weight of a group that is searched."""

CANDIDATES = tl.constexpr(search.CANDIDATES)
"""Scales that a search tries."""


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
def recoverable(magnitude, amax, scale):
    """Return which groups may lie on the grid, and are worth trying.

    No value but zero is below its scale, and no candidate is below bf16(amax/7) less a step. Of ordinary groups one in
    5000 holds nothing smaller; only such are tried, and all of those whose scale may be subnormal.

    Args:
        magnitude: BF16 bits without sign `[G, 4, 8]`.
        amax: the largest of each group.
        scale: the plain scales, BF16 bits `[G]`.
    """
    least = tl.min(tl.min(tl.where(magnitude == 0, 0x7FFF, magnitude), 2), 1)
    return ((least >= scale.to(tl.int32) - 1) | (amax < 0x200)) & (amax > 0) & (amax < INFINITY)


@triton.jit
def chosen_int4_scale(bits, amax, RECOVER: tl.constexpr, LARGEST: tl.constexpr):
    """Return the scales, BF16 bits `[G]`, that moonshot's rule takes for groups `[G, 4, 8]`, recovered ones among them.

    A group that is not finite gets the scale NaN.
    """
    scale = int4_scale(amax, "moonshot", LARGEST)
    if RECOVER:
        candidates = recoverable(magnitude_of(bits), amax, scale)
        if any_of(candidates) > 0:
            scale = recovered_int4_scale(bits, amax, scale, candidates)
    return tl.where(amax >= INFINITY, 0x7FC0, scale).to(tl.int16)


@triton.jit
def halved(lanes):
    """Return the sums `[G]` of lanes `[G, 4, 8]`: lane i and i + 16, then i + 8, 4, 2, 1.

    Each step adds two numbers, so no order is left to the compiler.
    """
    groups: tl.constexpr = lanes.shape[0]
    fours = tl.sum(tl.sum(lanes.reshape(groups, 2, 2, 8), 1), 1).reshape(groups, 2, 4)
    return tl.sum(tl.sum(tl.sum(fours, 1).reshape(groups, 2, 2), 1), 1)


@triton.jit
def searched_scale(bits, heavy, mean, amax, scale, shrink_ptr, LARGEST: tl.constexpr, SHIFTED: tl.constexpr):
    """Return the scales of least error, BF16 bits `[G]`: rule 7 of docs/formats.md, see `scales.search`.

    Args:
        bits: BF16 bits `[G, 4, 8]`.
        heavy: what each weighs, float32 `[G, 4, 8]`; a group in which one is NaN gets the scale NaN.
        mean: of what each is multiplied with, float32 `[G, 4, 8]`; not looked at unless SHIFTED.
        amax: their largest magnitudes `[G]`, int32.
        scale: BF16 bits `[G]`; one that is not the plain scale stays.
        shrink_ptr: int32, by candidate how many 256ths of the plain scale it takes off.
        LARGEST: the largest code, a float.
        SHIFTED: whether means are known.
    """
    plain = int4_scale(amax, "moonshot", LARGEST)
    asked = (amax >= LEAST_AMAX) & (amax < LARGE) & (scale == plain)
    unit = tl.where(asked, (254 - (amax >> 7)) << 23, 0).to(tl.float32, bitcast=True)[:, None, None]  # 2^-e
    values = tl.where(asked[:, None, None], widen(bits), 0.0)
    least = tl.full(amax.shape, float("inf"), tl.float32)
    candidate = 0
    while candidate < CANDIDATES:
        factor = (256 - tl.load(shrink_ptr + candidate)).to(tl.float32) * 0.00390625  # 256ths
        shrunk = widen(round_to_bf16(widen(plain) * factor)) * LARGEST
        trial = round_to_bf16(tl.div_rn(widen(round_to_bf16(shrunk)), LARGEST))
        step = widen(tl.where(asked, trial, 0x3F80))
        after = int4_product(int4_nibble(values, step, "moonshot", LARGEST), step[:, None, None])
        difference = (values - widen(after)) * unit
        error = halved(difference * difference * heavy)
        if SHIFTED:
            shift = halved(difference * mean)
            error += shift * shift
        better = asked & (error < least)
        scale = tl.where(better, trial, scale)
        least = tl.where(better, error, least)
        candidate += 1
    return tl.where(asked & (least == float("inf")), 0x7FC0, scale).to(tl.int16)


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
        candidates = recoverable(magnitude, amax, scale)
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
