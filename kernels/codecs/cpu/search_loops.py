"""The jitted loops of the search for INT4 scales, and of the error that judges it.

A file of its own, for it calls none of `loops`, see there for why. `reference.search` says the same in plain torch, and
the tests hold the two equal bit for bit.

How the search is built. The 16 candidates of a group are the lanes of the innermost loops: each weight is tried at all
of them at once, so no sum runs across lanes, and the scales and their reciprocals are rows of tables by the mantissa of
amax. Weights are taken without sign, for rounding is symmetric, and in units of 2^e <= amax, so that nothing overflows
and one table serves all magnitudes. Two steps replace slower ones, with equal bits:

- The code is round(w/s). A quotient of two BF16 numbers is a tie n + 1/2 or further than 2^-10 from all ties. The
  product with the reciprocal is off by less than 2^-18; adding 1536 rounds it to a multiple of 2^-13, which gives back
  the ties and moves nothing across one. Then a second addition rounds to a whole number, half to even.
- The value is bf16(code * s). A code of three bits times a scale of eight is a number m of at most eleven. With
  m * 65537 rounded to float32's 24 bits and m * 65536 taken away, m is left rounded to eight, half to even; and as
  s * 65537 is a float32 itself, code * (s * 65537) is that first product, rounded once.

No fast-math: every operation is rounded as it stands.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from k2quant.kernels.codecs.grids import GROUP
from k2quant.kernels.codecs.scales.search import CANDIDATES, LARGE_AMAX, LEAST_AMAX
from k2quant.kernels.codecs.values import F32, F64, U16

Int = Any  # what numba makes of integers is no one Python type

_HALF = GROUP // 2
_FINE = np.float32(1536)  # adding it rounds to multiples of 2^-13
_WHOLE = np.float32(12582912)  # 1.5 * 2^23: adding it rounds to whole numbers
_WHOLE_LESS_FINE = np.float32(12582912 - 1536)

_jit = njit(cache=True, nogil=True, boundscheck=False, error_model="numpy")


@_jit
def _bits(value: np.float32) -> np.uint32:
    """Return the bits of a float32 as uint32."""
    return np.float32(value).view(np.uint32)


@_jit
def _float(bits: Int) -> np.float32:
    """Return the float32 that has these bits."""
    return np.uint32(bits).view(np.float32)


@_jit
def _widen(bits: Int) -> np.float32:
    """Return the float32 value of BF16 bits."""
    return _float(np.uint32(bits) << np.uint32(16))


@_jit
def _round(value: np.float32) -> np.uint32:
    """Return the BF16 bits of a float32 that is not NaN, rounded half to even, as uint32."""
    bits = _bits(value)
    odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    return np.uint32(np.uint32(bits + np.uint32(np.uint32(0x7FFF) + odd)) >> np.uint32(16))


@_jit
def _difference(weight: np.float32, reciprocal: np.float32, low: np.float32, high: np.float32, top: np.float32) -> Any:
    """Return weight - value at one candidate: `low` is 65536 times the scale, `high` 65537 times.

    `top` is 1536 more than the largest code.
    """
    code = (min(weight * reciprocal + _FINE, top) + _WHOLE_LESS_FINE) - _WHOLE
    return weight - (code * high - code * low)


@_jit
def _term(
    weight: np.float32,
    importance: np.float32,
    reciprocal: np.float32,
    low: np.float32,
    high: np.float32,
    top: np.float32,
) -> np.float32:
    """Return importance * (weight - value)^2 at one candidate: see `_difference`."""
    difference = _difference(weight, reciprocal, low, high, top)
    return np.float32(difference * difference * importance)


@_jit
def _errors(values: F32, heavy: F32, reciprocal: F32, low: F32, high: F32, top: np.float32, sums: F32) -> None:
    """Write the errors of a group at each candidate: the first 16 of `sums`, in which 16 rows of 16 find room."""
    for i in range(_HALF):
        w0, w1, h0, h1 = values[i], values[i + _HALF], heavy[i], heavy[i + _HALF]
        for c in range(CANDIDATES):
            first = _term(w0, h0, reciprocal[c], low[c], high[c], top)
            sums[i * CANDIDATES + c] = first + _term(w1, h1, reciprocal[c], low[c], high[c], top)
    for c in range(CANDIDATES):
        # `_column`, spelled out: a call nested deeper is not compiled for several candidates at once. It cost a sixth.
        sums[c] = (_four(sums, c) + _four(sums, c + 2 * CANDIDATES)) + (
            _four(sums, c + CANDIDATES) + _four(sums, c + 3 * CANDIDATES)
        )


@_jit
def _with_mean(
    values: F32,
    heavy: F32,
    mean: F32,
    reciprocal: F32,
    low: F32,
    high: F32,
    top: np.float32,
    sums: F32,
    shifts: F32,
) -> None:
    """Write the errors of a group at each candidate, the square of what its mean shifts added.

    Args:
        values: weights without sign.
        heavy: variances.
        mean: of each column, with the other sign where the weight is negative.
        reciprocal: of the candidates.
        low: see `_term`.
        high: see `_term`.
        top: see `_term`.
        sums: see `_errors`.
        shifts: as large, for the sums of mean * difference.
    """
    for i in range(_HALF):
        w0, w1, h0, h1 = values[i], values[i + _HALF], heavy[i], heavy[i + _HALF]
        m0, m1 = mean[i], mean[i + _HALF]
        for c in range(CANDIDATES):
            d0 = _difference(w0, reciprocal[c], low[c], high[c], top)
            d1 = _difference(w1, reciprocal[c], low[c], high[c], top)
            sums[i * CANDIDATES + c] = d0 * d0 * h0 + d1 * d1 * h1
            shifts[i * CANDIDATES + c] = d0 * m0 + d1 * m1
    for c in range(CANDIDATES):
        shift = _column(shifts, c)
        sums[c] = _column(sums, c) + shift * shift


@_jit
def _column(sums: F32, c: Int) -> Any:
    """Return a column added in halves."""
    return (_four(sums, c) + _four(sums, c + 2 * CANDIDATES)) + (
        _four(sums, c + CANDIDATES) + _four(sums, c + 3 * CANDIDATES)
    )


@_jit
def _four(sums: F32, at: Int) -> Any:
    """Return rows i, i + 4, i + 8 and i + 12 of a column added in halves."""
    step = 4 * CANDIDATES
    return (sums[at] + sums[at + 2 * step]) + (sums[at + step] + sums[at + 3 * step])


@_jit
def search(
    weights: U16,
    heavy: F32,
    mean: F32,
    scales: U16,
    steps: tuple[F32, F32, F32],
    largest: np.float32,
    scale: U16,
) -> None:
    """Replace the scale of each group by the candidate of least error; leave one that is not the plain scale.

    Args:
        weights: BF16 bits, all finite.
        heavy: what each column weighs.
        mean: of each column; of length 0 where none is known.
        scales: the candidates `[128, 16]`, BF16 bits, see `search.candidate_table`.
        steps: their reciprocals, the candidates times 65536, and times 65537.
        largest: the largest code.
        scale: BF16 bits, changed in place.
    """
    values, sums = np.empty(GROUP, np.float32), np.empty(_HALF * CANDIDATES, np.float32)
    shifts, signed = np.empty(_HALF * CANDIDATES, np.float32), np.empty(GROUP, np.float32)
    reciprocal, low, high = steps
    bits = sums.view(np.uint32)
    top = largest + _FINE
    for row in range(weights.shape[0]):
        for group in range(scale.shape[1]):
            first = group * GROUP
            span = weights[row, first : first + GROUP]
            amax = np.uint16(0)
            for i in range(GROUP):
                amax = max(amax, np.uint16(span[i] & np.uint16(0x7FFF)))
            if amax < LEAST_AMAX or amax >= LARGE_AMAX:
                continue
            m, exponent = np.int64(amax) & 0x7F, np.int64(amax) >> 7
            moved = (exponent - 127) << 7  # from the binade of 1.0 to that of amax, as BF16 bits
            if scale[row, group] != np.int64(scales[m, 0]) + moved:
                continue
            unit = _float((254 - exponent) << 23)
            for i in range(GROUP):
                values[i] = _widen(span[i] & np.uint16(0x7FFF)) * unit
            if len(mean):
                for i in range(GROUP):
                    signed[i] = -mean[first + i] if span[i] & np.uint16(0x8000) else mean[first + i]
                here = heavy[first : first + GROUP]
                _with_mean(values, here, signed, reciprocal[m], low[m], high[m], top, sums, shifts)
            else:
                _errors(values, heavy[first : first + GROUP], reciprocal[m], low[m], high[m], top, sums)
            least = np.uint64(0xFFFFFFFFFFFFFFFF)
            for c in range(CANDIDATES):  # errors have no sign, so their bits are in their order; then the earlier one
                least = min(least, np.uint64(np.uint64(bits[c]) << np.uint64(8)) | np.uint64(c))
            scale[row, group] = np.int64(scales[m, np.int64(least & np.uint64(0xFF))]) + moved


@_jit
def weighted_errors(weights: U16, heavy: F64, mean: F32, largest: np.float32, scale: U16, sums: F64) -> bool:
    """Write what each row loses at its scales; return whether all weights, and what they decode to, are finite.

    This divides, as storing does: a scale may be any here. `mean` has the length 0 where none is known.
    """
    lanes, shifts, worst = np.empty(GROUP, np.float64), np.empty(GROUP, np.float64), np.uint32(0)
    for row in range(weights.shape[0]):
        lanes[:] = 0
        shifts[:] = 0
        for group in range(scale.shape[1]):
            step = _widen(scale[row, group])
            for lane in range(GROUP):
                i = group * GROUP + lane
                weight = _widen(weights[row, i])
                code = (min(max(weight / step, -largest), largest) + _WHOLE) - _WHOLE
                difference = weight - _widen(_round(code * step))
                worst = max(worst, _bits(abs(difference)))  # in the order of the numbers, NaN beyond infinity
                wide = np.float64(difference)
                lanes[lane] += (wide * wide) * heavy[i]
                if len(mean):
                    shifts[lane] += wide * np.float64(mean[i])
        half = GROUP // 2
        while half > 0:
            for lane in range(half):
                lanes[lane] += lanes[lane + half]
                shifts[lane] += shifts[lane + half]
            half //= 2
        sums[row] = lanes[0] + shifts[0] * shifts[0]
    return bool(worst < np.uint32(0x7F800000))
