"""The jitted loops of both FP4 formats: all they know of a format are its tables, see `tables`.

A weight's scale is one of 256 bytes, and it has 32,640 finite magnitudes, so each rule is a table that the rule itself
has filled: what two codes of a byte mean at a scale, from which magnitude on each code begins, which scale a block's
largest magnitude asks for. A rule therefore stands in one place only, and no loop divides. NVFP4's blocks have 16
columns, MXFP4's 32: loops walk in halves of 16, and `shift` says how many of them share a scale, as a power of two.

Rows are encoded, decoded again and compared while they are in the first-level cache; sums are kept as those of
`cpu.loops` are, whose `_tally` stands here again: numba's cache notices an edit only in the file of the function that
is compiled, so this file calls none of another.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from k2quant.kernels.codecs import values as explain
from k2quant.kernels.codecs.values import F32, F64, U8, U16

Int = Any  # what numba makes of integers is no one Python type
I16 = NDArray[np.int16]
U32 = NDArray[np.uint32]
B1 = NDArray[np.bool_]
Outcome = tuple[int, float, float, float]
"""Changed weights (-1: a bad value), energy, error, worst."""

LANES = 128
"""Accumulators of a sum, as in `cpu.loops`."""

HALF = 16
"""Columns that loops take at a time: a block of NVFP4, half a block of MXFP4."""


class Tables(NamedTuple):
    """What is looked up: `tables` fills it."""

    asked: U8
    """By a block's amax, as BF16 bits: the scale that `choose` gives it, `[32640]`."""
    levels: I16
    """By scale: the least magnitudes of the codes 1 to 7, and from which one on a weight keeps its sign, `[256, 8]`."""
    pairs: U32
    """By scale and byte: the BF16 values of two codes, `[256, 256]`; not finite where the scale is bad."""
    refused: B1
    """By scale: whether nothing can be divided by it, `[256]`."""


class Restating(NamedTuple):
    """What `restate` looks up."""

    bits: U8
    """By scale of MXFP4: that of NVFP4, `[256]`."""
    steps: U8
    """By scale: powers of two by which codes are lowered, as many as change something; 255: it is too large."""
    moved: U8
    """By powers of two and byte: two codes, lowered, `[6, 256]`."""


ENCODE, CHOOSE, STORE = 0, 1, 2  # what a call is for: scales and codes, scales alone, codes at scales that are there

_jit = njit(cache=True, nogil=True, boundscheck=False, error_model="numpy")


# --- scalars --------------------------------------------------------------------------------------------------------


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
def _square(value: np.float32) -> np.float64:
    return np.float64(value) * np.float64(value)


@_jit
def _difference(before: np.uint16, after: np.uint16) -> np.uint32:
    """Return the bits of |before - after|: as integers they order like the numbers, and 0 means unchanged."""
    return _bits(abs(_widen(before) - _widen(after)))


# --- spans ----------------------------------------------------------------------------------------------------------


@_jit
def _largest(weights: U16) -> np.uint16:
    """Return the largest magnitude among BF16 bits; NaN and infinity are the largest of all."""
    largest = np.uint16(0)
    for i in range(weights.size):
        magnitude = np.uint16(weights[i] & np.uint16(0x7FFF))
        largest = max(largest, magnitude)
    return largest


@_jit
def _tally(before: U16, after: U16, energy: F64, error: F64) -> tuple[Int, np.uint32]:
    """Add a span's energy and squared errors to the lanes; return how many changed, and the bits of the worst error."""
    changed, worst = np.uint32(0), np.uint32(0)
    whole = before.size - before.size % (4 * LANES)
    for start in range(0, whole, 4 * LANES):
        a, b = before[start : start + 4 * LANES], after[start : start + 4 * LANES]
        for lane in range(LANES):
            d0, d1 = _difference(a[lane], b[lane]), _difference(a[lane + LANES], b[lane + LANES])
            d2 = _difference(a[lane + 2 * LANES], b[lane + 2 * LANES])
            d3 = _difference(a[lane + 3 * LANES], b[lane + 3 * LANES])
            energy[lane] += (_square(_widen(a[lane])) + _square(_widen(a[lane + LANES]))) + (
                _square(_widen(a[lane + 2 * LANES])) + _square(_widen(a[lane + 3 * LANES]))
            )
            error[lane] += (_square(_float(d0)) + _square(_float(d1))) + (_square(_float(d2)) + _square(_float(d3)))
            worst = max(worst, d0, d1, d2, d3)
            changed = np.uint32(changed + (d0 != 0) + (d1 != 0) + (d2 != 0) + (d3 != 0))
    for start in range(whole, before.size, LANES):
        a, b = before[start : start + LANES], after[start : start + LANES]
        for lane in range(a.size):
            d0 = _difference(a[lane], b[lane])
            energy[lane] += _square(_widen(a[lane]))
            error[lane] += _square(_float(d0))
            worst = max(worst, d0)
            changed = np.uint32(changed + (d0 != 0))
    return np.int64(changed), worst


@_jit
def _total(changed: int, worst: np.uint32, energy: F64, error: F64) -> Outcome:
    """Return the outcome of a call; the lanes are added in order."""
    energy_sum, error_sum = 0.0, 0.0
    for lane in range(LANES):
        energy_sum += energy[lane]
        error_sum += error[lane]
    return changed, energy_sum, error_sum, np.float64(_float(worst))


# --- rows -----------------------------------------------------------------------------------------------------------


@_jit
def _decode_row(codes: U8, scale: U8, pairs: U32, shift: int, out: U32) -> None:
    """Look up two weights at a time."""
    for half in range(codes.size // 8):
        table = pairs[scale[half >> shift]]
        for i in range(half * 8, half * 8 + 8):
            out[i] = table[codes[i]]


@_jit
def _choose_row(weights: U16, asked: U8, shift: int, amax: U16, scale: U8) -> bool:
    """Look up the scale of each block of a row; return whether all its weights are finite."""
    for half in range(amax.size):
        amax[half] = _largest(weights[half * HALF : half * HALF + HALF])
    if _largest(amax) >= explain.INFINITY:
        return False
    if shift:
        for block in range(scale.size):
            scale[block] = asked[max(amax[2 * block], amax[2 * block + 1])]
    else:
        for block in range(scale.size):
            scale[block] = asked[amax[block]]
    return True


@_jit
def _store_row(weights: U16, scale: U8, levels: I16, shift: int, nibbles: U8, codes: U8) -> None:
    """Write the codes of a row at its scales: a code is how many of seven magnitudes a weight's reaches."""
    for half in range(weights.size // HALF):
        at = levels[scale[half >> shift]]
        t0, t1, t2, t3, t4, t5, t6, signed = at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7]
        for i in range(half * HALF, half * HALF + HALF):
            weight = weights[i]
            m = np.int16(weight & np.uint16(0x7FFF))
            code = (m >= t0) + (m >= t1) + (m >= t2) + (m >= t3) + (m >= t4) + (m >= t5) + (m >= t6)
            sign = np.uint16(np.uint16(weight >> np.uint16(12)) & np.uint16(8)) if m >= signed else np.uint16(0)
            nibbles[i] = np.uint8(np.uint16(code) | sign)
    both = nibbles.view(np.uint16)
    for i in range(codes.size):
        codes[i] = np.uint8(both[i] | (both[i] >> np.uint16(4)))


@_jit
def _usable(scale: U8, refused: B1) -> bool:
    """Return whether weights can be divided by every scale of a row."""
    bad = False
    for block in range(scale.size):
        bad |= refused[scale[block]]
    return not bad


# --- panels ---------------------------------------------------------------------------------------------------------


@_jit
def decode(codes: U8, scale: U8, tables: Tables, shift: int, out: U16) -> bool:
    """Decode rows; return whether all values are finite: those of bad scales are not, by the table."""
    for row in range(codes.shape[0]):
        _decode_row(codes[row], scale[row], tables.pairs, shift, out[row].view(np.uint32))
        if _largest(out[row]) >= explain.INFINITY:
            return False
    return True


@_jit
def encode(weights: U16, job: int, tables: Tables, shift: int, codes: U8, scale: U8) -> Outcome:
    """Encode rows, or one half of it: CHOOSE leaves `codes` alone, STORE takes `scale` as it is."""
    rows, columns = weights.shape
    nibbles, decoded = np.empty(columns, np.uint8), np.empty(columns, np.uint16)
    amax = np.empty(columns // HALF, np.uint16)
    energy, error = np.zeros(LANES), np.zeros(LANES)
    changed, worst = 0, np.uint32(0)
    for row in range(rows):
        if job == STORE:
            if _largest(weights[row]) >= explain.INFINITY:
                return -1, 0.0, 0.0, 0.0
        elif not _choose_row(weights[row], tables.asked, shift, amax, scale[row]):
            return -1, 0.0, 0.0, 0.0
        if job == CHOOSE:
            continue
        if not _usable(scale[row], tables.refused):
            return -1, 0.0, 0.0, 0.0
        _store_row(weights[row], scale[row], tables.levels, shift, nibbles, codes[row])
        _decode_row(codes[row], scale[row], tables.pairs, shift, decoded.view(np.uint32))
        count, largest = _tally(weights[row], decoded, energy, error)
        changed, worst = changed + count, max(worst, largest)
    return _total(changed, worst, energy, error)


@_jit
def fake_quantize(weights: U16, tables: Tables, shift: int, scale: U8, out: U16) -> bool:
    """Round rows and back; return whether weights, scales and values are good. `scale` has room for one row's."""
    columns = weights.shape[1]
    nibbles, codes = np.empty(columns, np.uint8), np.empty(columns // 2, np.uint8)
    amax = np.empty(columns // HALF, np.uint16)
    for row in range(weights.shape[0]):
        if not (_choose_row(weights[row], tables.asked, shift, amax, scale) and _usable(scale, tables.refused)):
            return False
        _store_row(weights[row], scale, tables.levels, shift, nibbles, codes)
        _decode_row(codes, scale, tables.pairs, shift, out[row].view(np.uint32))
        if _largest(out[row]) >= explain.INFINITY:
            return False
    return True


@_jit
def largest(weights: U16) -> Int:
    """Return the largest magnitude of all rows, as BF16 bits."""
    found = np.uint16(0)
    for row in range(weights.shape[0]):
        found = max(found, _largest(weights[row]))
    return np.int64(found)


@_jit
def weighted_errors(weights: U16, heavy: F64, mean: F32, tables: Tables, shift: int, scale: U8, sums: F64) -> bool:
    """Write what each row loses at its scales; return whether weights, scales and values are good.

    `mean` has the length 0 where none is known.
    """
    columns = weights.shape[1]
    nibbles, codes, decoded = (
        np.empty(columns, np.uint8),
        np.empty(columns // 2, np.uint8),
        np.empty(columns, np.uint16),
    )
    block = HALF << shift
    lanes, shifts = np.empty(block, np.float64), np.empty(block, np.float64)
    for row in range(weights.shape[0]):
        if _largest(weights[row]) >= explain.INFINITY or not _usable(scale[row], tables.refused):
            return False
        _store_row(weights[row], scale[row], tables.levels, shift, nibbles, codes)
        _decode_row(codes, scale[row], tables.pairs, shift, decoded.view(np.uint32))
        if _largest(decoded) >= explain.INFINITY:
            return False
        lanes[:] = 0
        shifts[:] = 0
        for first in range(0, columns, block):
            for lane in range(block):
                i = first + lane
                wide = np.float64(_widen(weights[row, i]) - _widen(decoded[i]))
                lanes[lane] += (wide * wide) * heavy[i]
                if len(mean):
                    shifts[lane] += wide * np.float64(mean[i])
        half = block // 2
        while half > 0:
            for lane in range(half):
                lanes[lane] += lanes[lane + half]
                shifts[lane] += shifts[lane + half]
            half //= 2
        sums[row] = lanes[0] + shifts[0] * shifts[0]
    return True


# --- from MXFP4 to NVFP4 --------------------------------------------------------------------------------------------


@_jit
def _used(codes: U8, row: Int, first: Int, count: Int) -> bool:
    """Return whether bytes of codes hold more than zeros of either sign."""
    magnitudes = np.uint8(0)
    for i in range(first, first + count):
        magnitudes |= np.uint8(codes[row, i] & np.uint8(0x77))
    return bool(magnitudes != 0)


@_jit
def exponents(codes: U8, scale: U8) -> tuple[Int, Int]:
    """Return the least and the largest scale of the blocks that hold more than zeros; 256 and -1 if none does."""
    low, high = np.int64(256), np.int64(-1)
    for row in range(scale.shape[0]):
        for block in range(scale.shape[1]):
            if _used(codes, row, block * HALF, HALF):
                low = min(low, np.int64(scale[row, block]))
                high = max(high, np.int64(scale[row, block]))
    return low, high


@_jit
def restate(codes_in: U8, scale_in: U8, tables: Restating, empty: int, codes: U8, scale: U8) -> int:
    """Copy codes, and give each half of a block its scale; return how many halves were rounded, -1 for a bad scale.

    `empty` is the scale of a half that holds zeros alone.
    """
    rounded = 0
    for row in range(scale.shape[0]):
        for half in range(scale.shape[1]):
            block = scale_in[row, half >> 1]
            first = half * (HALF // 2)
            used = _used(codes_in, row, first, HALF // 2)
            scale[row, half] = tables.bits[block] if used else np.uint8(empty)
            lowered = np.int64(tables.steps[block]) if used else 0
            for i in range(first, first + HALF // 2):
                codes[row, i] = codes_in[row, i]
            if lowered:
                if lowered >= len(tables.moved):
                    return -1
                rounded += 1
                for i in range(first, first + HALF // 2):
                    codes[row, i] = tables.moved[lowered, codes_in[row, i]]
    return rounded
