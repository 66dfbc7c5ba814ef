"""Every jitted loop of the codecs: what `bf16`, `fp8`, `int4` and `fused` call once they have checked their arrays.

This file stays long on purpose. Numba's cache notices an edit only in the file that holds the function: a helper
elsewhere would leave stale machine code behind, so the jitted code of one call graph is one file. `reference` says the
same in plain torch, and the tests hold the two equal bit for bit.

How the loops are built. Each works on one-dimensional spans that fit the first-level cache: a row for INT4, a block for
FP8. Spans are decoded to BF16 scratch, encoded, decoded again and compared with the scratch, so a fused pair such as
`fp8_to_int4` gives the bits and the figures of the two steps by construction. Encoding a span is choosing its scales
and storing codes at them; a `job` says which of the two a call is for. Sums are kept in `LANES` float64 lanes,
lane = position in the span modulo `LANES`, and added in order at the end: the figures do not depend on the machine's
vector width. No fast-math anywhere; every division is a true one.

Arrays are C-contiguous. Panels are calls on ranges of rows, multiples of the FP8 block's height.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

from k2quant.kernels.codecs import values as explain
from k2quant.kernels.codecs.grids import GROUP
from k2quant.kernels.codecs.scales.recovery import DISTANCES, SMALLEST_AMAX
from k2quant.kernels.codecs.values import F32, F64, U8, U16

Int = Any  # what numba makes of integers is no one Python type
U32 = NDArray[np.uint32]
Outcome = tuple[int, float, float, float]
"""Changed weights (-1: a bad value), energy, error, worst."""

LANES = 128
"""Accumulators of a sum; 128 float64 are 1 KiB, so both sums stay in the first-level cache."""

_PROBE = 256  # weights after which an ordinary FP8 block has, almost surely, shown two magnitudes with one code
_GLANCE = 16  # weights of which an ordinary block has one, almost surely, that is no code times a power of two
PLAIN, RECOVER, COMPRESSED_TENSORS = 0, 1, 2  # the INT4 rules, as the jitted code knows them
ENCODE, CHOOSE, STORE = 0, 1, 2  # what a call is for: scales and codes, scales alone, codes at scales that are there

_jit = njit(cache=True, nogil=True, boundscheck=False, error_model="numpy")


# --- scalars --------------------------------------------------------------------------------------------------------


# Numba computes with 64-bit integers; each step is cut back to 32 bits, or the loops would fill half as many lanes.


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
def _e4m3(value: np.float32) -> np.uint32:
    """Return the e4m3 code of a float32 that is not NaN, rounded half to even, saturated at +-448."""
    bits = _bits(value)
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    odd = np.uint32(np.uint32(magnitude >> np.uint32(20)) & np.uint32(1))
    rounded = np.uint32(np.uint32(magnitude + np.uint32(np.uint32(0x7FFFF) + odd)) >> np.uint32(20))
    normal = np.uint32(rounded - np.uint32(120 << 3))
    # Below 2^-6 codes are multiples of 2^-9, one unit in the last place of 16384: the addition rounds.
    subnormal = np.uint32(_bits(_float(magnitude) + np.float32(16384.0)) & np.uint32(0xF))
    code = subnormal if magnitude < np.uint32(121 << 23) else normal
    code = min(code, np.uint32(0x7E))
    return np.uint32(code | np.uint32(np.uint32(bits >> np.uint32(24)) & np.uint32(0x80)))


@_jit
def _fp8_product(code: Int, scale: np.float32) -> np.uint32:
    """Return the BF16 bits of code * scale, rounded to float32 first, as uint32."""
    # An e4m3 magnitude moved to float32's exponent field is too small by 2^120; the product with 2^120 is exact.
    moved = np.uint32(np.uint32(np.uint32(code) & np.uint32(0x7F)) << np.uint32(20))
    sign = np.uint32(np.uint32(np.uint32(code) & np.uint32(0x80)) << np.uint32(8))
    return np.uint32(_round(_float(moved) * np.float32(2.0**120) * scale) | sign)


@_jit
def _int4_product(nibble: Int, scale: np.float32) -> np.uint32:
    """Return the BF16 bits of (nibble - 8) * scale, as uint32."""
    return _round(np.float32(np.int32(np.int32(nibble) - np.int32(8))) * scale)


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
def _decode_fp8(codes: U8, scale: np.float32, out: U16) -> bool:
    """Decode a span that has one scale; return whether it holds no NaN code."""
    largest = np.uint8(0)
    for i in range(out.size):
        code = codes[i]
        magnitude = np.uint8(code & np.uint8(0x7F))
        largest = max(largest, magnitude)
        out[i] = _fp8_product(code, scale)
    return bool(largest < 0x7F)


@_jit
def _decode_int4(pairs: U8, scale: F32, out: U32) -> None:
    """Decode groups of 32 codes, two in a byte, low nibble first, to words of two BF16."""
    for group in range(scale.size):
        step = scale[group]
        for lane in range(GROUP // 2):
            i = group * (GROUP // 2) + lane
            pair = np.uint32(pairs[i])
            low = _int4_product(np.uint32(pair & np.uint32(15)), step)
            high = _int4_product(np.uint32(pair >> np.uint32(4)), step)
            out[i] = np.uint32(low | np.uint32(high << np.uint32(16)))


@_jit
def _square(value: np.float32) -> np.float64:
    return np.float64(value) * np.float64(value)


@_jit
def _difference(before: np.uint16, after: np.uint16) -> np.uint32:
    """Return the bits of |before - after|: as integers they order like the numbers, and 0 means unchanged."""
    return _bits(abs(_widen(before) - _widen(after)))


@_jit
def _tally(before: U16, after: U16, energy: F64, error: F64) -> tuple[Int, np.uint32]:
    """Add a span's energy and squared errors to the lanes; return how many changed, and the bits of the worst error."""
    changed, worst = np.uint32(0), np.uint32(0)
    whole = before.size - before.size % (4 * LANES)
    for start in range(0, whole, 4 * LANES):
        a, b = before[start : start + 4 * LANES], after[start : start + 4 * LANES]
        for lane in range(LANES):  # four weights for each visit to a lane: 1.6 times the speed of one
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


# --- INT4 -----------------------------------------------------------------------------------------------------------


@_jit
def _fits(weights: U16, scale: np.float32) -> bool:
    """Return whether every weight of a group is bf16(code * scale) for a code in +-7: the rule, read out plainly."""
    for i in range(weights.size):
        magnitude = np.uint32(weights[i]) & np.uint32(0x7FFF)
        found = False
        for code in range(8):
            found = found or _round(np.float32(code) * scale) == magnitude
        if not found:
            return False
    return True


@_jit
def _candidate(amax: np.uint16, candidate: Int) -> Int:
    """Return the BF16 bits of a candidate scale, see `recovery.CANDIDATES`; 0 where there is none."""
    step = candidate % 3
    bits = np.int64(_round(_widen(amax) / np.float32(7 - candidate // 3))) + (
        1 if step == 1 else -1 if step == 2 else 0
    )
    return bits if 0 < bits < explain.INFINITY else 0


@_jit
def _search_scale(weights: U16, amax: np.uint16) -> Int:
    """Return the BF16 bits of the first candidate scale that gives every weight of the group; 0 if none does."""
    for candidate in range(21):
        bits = _candidate(amax, candidate)
        if bits and _fits(weights, _widen(bits)):
            return bits
    return 0


@_jit
def _entry(weight: np.uint16, amax: np.uint16) -> Int:
    """Return the index of a weight's word in the table of candidates."""
    magnitude = np.int64(weight & np.uint16(0x7FFF))
    distance = np.int64(amax) - magnitude if magnitude else 0  # zero fits wherever amax fits
    return (np.int64(amax) & 0x7F) * DISTANCES + min(distance, DISTANCES - 1)  # the last column is empty


@_jit
def _fits_quickly(weights: U16, first: int, scale: np.float32) -> bool:
    """Return whether `scale` gives every weight of the group at `first`: true for the nearest codes or for none."""
    differences = np.uint32(0)
    for lane in range(GROUP):
        magnitude = np.uint32(weights[first + lane] & np.uint16(0x7FFF))
        nibble = _nibble(min(_widen(magnitude) / scale, np.float32(7)))
        differences |= np.uint32(_int4_product(nibble, scale) ^ magnitude)
    return bool(differences == 0)


@_jit
def _recover_int4_scales(weights: U16, amax: U16, table: U32, scale: U16) -> None:
    """Replace the scale of each group that lies on the grid by the one that the rule finds."""
    for group in range(scale.size):
        largest, first = amax[group], group * GROUP
        if largest < SMALLEST_AMAX:
            bits = _search_scale(weights[first : first + GROUP], largest) if largest else 0
            scale[group] = bits or scale[group]
            continue
        # Two weights without a branch reject all but 3 of 1000 ordinary groups, where one leaves 131.
        candidates = np.uint32(0xFFFFFFFF)
        for lane in range(2):
            candidates = np.uint32(candidates & table[_entry(weights[first + lane], largest)])
        if candidates == 0 or (candidates & np.uint32(1) and _fits_quickly(weights, first, _widen(scale[group]))):
            continue  # the first candidate is the scale that stands there
        for lane in range(GROUP):
            candidates = np.uint32(candidates & table[_entry(weights[first + lane], largest)])
        if candidates == 0:
            continue
        candidate = 0
        while not (candidates >> np.uint32(candidate)) & np.uint32(1):
            candidate += 1
        scale[group] = _candidate(largest, candidate)


@_jit
def _int4_scales(weights: U16, rule: int, largest: np.float32, amax: U16, scale: U16) -> bool:
    """Compute the plain BF16 scale of each group of a row; return whether all weights are finite."""
    for group in range(scale.size):
        amax[group] = _largest(weights[group * GROUP : group * GROUP + GROUP])
    if _largest(amax) >= explain.INFINITY:
        return False
    divisor = np.float32(7.5) if rule == COMPRESSED_TENSORS else largest
    for group in range(scale.size):
        bits = _round(_widen(amax[group]) / divisor)
        scale[group] = bits or np.uint32(0x3C00)  # 2^-7, as compressed-tensors writes for a scale of zero
    return True


@_jit
def _moonshot_quotient(weight: Int, step: np.float32, largest: np.float32) -> np.float32:
    """Return w/scale between -largest and largest; what is left is to round it to its code."""
    return min(max(_widen(weight) / step, -largest), largest)


@_jit
def _compressed_quotient(weight: Int, step: np.float32) -> np.float32:
    """Return w/scale between -8 and 7; it is rounded to BF16 before the clamp, as compressed-tensors does."""
    return min(max(_widen(_round(_widen(weight) / step)), np.float32(-8)), np.float32(7))


@_jit
def _encode_moonshot(weights: U16, scale: U16, largest: np.float32, nibbles: U8, decoded: U16) -> None:
    """Round a row to codes of at most `largest`: one nibble a byte, and the values that decoding will give."""
    for group in range(scale.size):
        step = _widen(scale[group])
        for lane in range(GROUP):
            i = group * GROUP + lane
            nibble = _nibble(_moonshot_quotient(weights[i], step, largest))
            nibbles[i] = nibble
            decoded[i] = _int4_product(nibble, step)


@_jit
def _encode_compressed_tensors(weights: U16, scale: U16, nibbles: U8, decoded: U16) -> None:
    """Round a row to codes -8..7, and the values that decoding will give."""
    for group in range(scale.size):
        step = _widen(scale[group])
        for lane in range(GROUP):
            i = group * GROUP + lane
            nibble = _nibble(_compressed_quotient(weights[i], step))
            nibbles[i] = nibble
            decoded[i] = _int4_product(nibble, step)


@_jit
def _nibble(quotient: np.float32) -> np.uint32:
    """Return code + 8: adding 1.5 * 2^23 + 8 rounds half to even and leaves it in the low four bits."""
    return np.uint32(_bits(quotient + np.float32(12582920.0)) & np.uint32(15))


@_jit
def _whole(quotient: np.float32) -> np.float32:
    """Return the code itself, of any width: adding 1.5 * 2^23 rounds half to even, taking it away leaves no -0."""
    return np.float32(quotient + np.float32(12582912.0)) - np.float32(12582912.0)


@_jit
def _choose_int4_row(weights: U16, rule: int, largest: np.float32, table: U32, amax: U16, scale: U16) -> bool:
    """Choose the scale of each group of a row; return whether all its weights are finite."""
    if not _int4_scales(weights, rule, largest, amax, scale):
        return False
    if rule == RECOVER:
        _recover_int4_scales(weights, amax, table, scale)
    return True


@_jit
def _store_int4_row(
    weights: U16, rule: int, largest: np.float32, scale: U16, packed: U8, nibbles: U8, decoded: U16
) -> None:
    """Round a row to codes at its scales, and write what they decode to."""
    if rule == COMPRESSED_TENSORS:
        _encode_compressed_tensors(weights, scale, nibbles, decoded)
    else:
        _encode_moonshot(weights, scale, largest, nibbles, decoded)
    pairs = nibbles.view(np.uint16)
    for i in range(packed.size):
        packed[i] = np.uint8(pairs[i] | (pairs[i] >> np.uint16(4)))


@_jit
def bf16_to_int4(
    weights: U16, rule: int, largest_code: np.float32, job: int, table: U32, packed: U8, scale: U16
) -> Outcome:
    """Encode rows, or one half of it: CHOOSE leaves `packed` alone, STORE takes `scale` as it is."""
    rows, columns = weights.shape
    nibbles, decoded = np.empty(columns, np.uint8), np.empty(columns, np.uint16)
    amax = np.empty(columns // GROUP, np.uint16)
    energy, error = np.zeros(LANES), np.zeros(LANES)
    changed, worst = 0, np.uint32(0)
    for row in range(rows):
        if job == STORE:
            if _largest(weights[row]) >= explain.INFINITY:
                return -1, 0.0, 0.0, 0.0
        elif not _choose_int4_row(weights[row], rule, largest_code, table, amax, scale[row]):
            return -1, 0.0, 0.0, 0.0
        if job == CHOOSE:
            continue
        _store_int4_row(weights[row], rule, largest_code, scale[row], packed[row], nibbles, decoded)
        count, largest = _tally(weights[row], decoded, energy, error)
        changed, worst = changed + count, max(worst, largest)
    return _total(changed, worst, energy, error)


@_jit
def fake_quantize_int4(weights: U16, rule: int, largest: np.float32, out: U16) -> bool:
    """Round to the grid and back; return whether all weights are finite, before and after."""
    columns = weights.shape[1]
    amax, scale = np.empty(columns // GROUP, np.uint16), np.empty(columns // GROUP, np.uint16)
    for row in range(weights.shape[0]):
        if not _int4_scales(weights[row], rule, largest, amax, scale):
            return False
        if rule == COMPRESSED_TENSORS:
            _fake_compressed_tensors(weights[row], scale, out[row])
        else:
            _fake_moonshot(weights[row], scale, largest, out[row])
        if _largest(out[row]) >= explain.INFINITY:
            return False
    return True


@_jit
def _fake_moonshot(weights: U16, scale: U16, largest: np.float32, out: U16) -> None:
    for group in range(scale.size):
        step = _widen(scale[group])
        for lane in range(GROUP):
            i = group * GROUP + lane
            out[i] = _round(_whole(_moonshot_quotient(weights[i], step, largest)) * step)


@_jit
def _fake_compressed_tensors(weights: U16, scale: U16, out: U16) -> None:
    for group in range(scale.size):
        step = _widen(scale[group])
        for lane in range(GROUP):
            i = group * GROUP + lane
            out[i] = _round(_whole(_compressed_quotient(weights[i], step)) * step)


@_jit
def _decode_int4_row(packed: U8, scale: F32, group: int, first: int, out: U16) -> None:
    """Decode columns of a row of packed bytes, from column `first` on."""
    if group == GROUP and first % GROUP == 0 and out.size % GROUP == 0:
        scales = scale[first // GROUP :][: out.size // GROUP]
        _decode_int4(packed[first // 2 :], scales, out.view(np.uint32))
    else:
        for i in range(out.size):
            column = first + i
            nibble = np.uint8(packed[column >> 1] >> np.uint8(4 * (column & 1))) & np.uint8(15)
            out[i] = _int4_product(nibble, scale[column // group])


@_jit
def int4_to_bf16(packed: U8, scale: F32, group: int, out: U16) -> bool:
    """Decode rows; return whether no product exceeds BF16."""
    for row in range(packed.shape[0]):
        _decode_int4_row(packed[row], scale[row], group, 0, out[row])
        if _largest(out[row]) >= explain.INFINITY:
            return False
    return True


# --- FP8 ------------------------------------------------------------------------------------------------------------


@_jit
def fp8_to_bf16(codes: U8, scale: F32, height: int, width: int, out: U16) -> bool:
    """Decode rows; return whether no code is NaN and no product exceeds BF16."""
    valid = True
    for row in range(codes.shape[0]):
        valid &= _decode_fp8_row(codes[row], scale[row // height], width, out[row])
    return valid


@_jit
def _decode_fp8_row(codes: U8, scale: F32, width: int, out: U16) -> bool:
    """Decode a row; return whether it holds no NaN code and no product beyond BF16."""
    valid = True
    for block in range(scale.size):
        start = block * width
        stop = min(start + width, codes.size)
        valid &= _decode_fp8(codes[start:stop], scale[block], out[start:stop])
    return valid and bool(_largest(out) < explain.INFINITY)


@_jit
def _product_at(magnitude: Int, scale_bits: Int) -> Int:
    """Return the BF16 bits of an e4m3 magnitude times the float32 scale with these bits."""
    return np.int64(_fp8_product(np.uint32(magnitude), _float(scale_bits)))


@_jit
def _least_scale(magnitude: Int, target: Int, low: Int, high: Int) -> Int:
    """Return the least scale, as float32 bits, whose product reaches `target`; `low` does not reach it, `high` does."""
    while high - low > 1:
        middle = (low + high) >> 1
        if _product_at(magnitude, middle) >= target:
            high = middle
        else:
            low = middle
    return high


@_jit
def _recovered_fp8_scale(weights: U16, codes: U8, plain: np.float32, table: U16) -> np.float32:
    """Return the scale nearest to `plain` whose products with the codes are the weights; 0 if there is none.

    `codes` are those of `plain`. Each code must stand for one magnitude only; then each pair of code and magnitude
    allows an interval of scales, for a product grows with its scale, and the scale must lie in all of them. That each
    code stands for one magnitude is tested on a few weights, which turns ordinary blocks away, and at the end on all.
    """
    table[:] = 0
    for i in range(min(weights.size, _PROBE)):
        used, value = np.uint8(codes[i] & np.uint8(0x7F)), np.uint16(weights[i] & np.uint16(0x7FFF))
        known = table[used]
        if known != value:
            if known != 0 or used == 0:
                return np.float32(0)
            table[used] = value
    for i in range(weights.size):
        table[codes[i] & np.uint8(0x7F)] = weights[i] & np.uint16(0x7FFF)
    nearest = _nearest_scale(table, plain)
    return nearest if _decodes_to(weights, codes, nearest) else np.float32(0)


@_jit
def _nearest_scale(table: U16, plain: np.float32) -> np.float32:
    """Return the scale nearest to `plain` that gives each code its magnitude in `table`; `plain` if there is none."""
    # 2^17 steps move a normal float32 by 2^-7 or more, further than half a BF16 step of amax; amax has the code 448.
    start = np.int64(_bits(plain))
    amax = np.int64(table[0x7E])
    below, above = max(start - (1 << 17), 0), start + (1 << 17)
    low = _least_scale(0x7E, amax, below, above)
    high = _least_scale(0x7E, amax + 1, below, above) - 1
    for code in range(1, 0x7F):
        magnitude = np.int64(table[code])
        if magnitude == 0:
            continue
        if _product_at(code, low) < magnitude:
            if _product_at(code, high) < magnitude:
                return plain
            low = _least_scale(code, magnitude, low, high)
        if _product_at(code, low) != magnitude:
            return plain
        if _product_at(code, high) > magnitude:
            high = _least_scale(code, magnitude + 1, low, high) - 1
    return _float(min(max(start, low), high))


@_jit
def _decodes_to(weights: U16, codes: U8, scale: np.float32) -> bool:
    """Return whether the codes give exactly these weights."""
    differences = np.uint32(0)
    for i in range(weights.size):
        differences |= np.uint32(_fp8_product(codes[i], scale) ^ np.uint32(weights[i]))
    return bool(differences == 0)


@_jit
def _begins_with_few_bits(weights: U16) -> bool:
    """Return whether the first weights, as far as they are normal numbers, have at most four significant bits."""
    for i in range(min(weights.size, _GLANCE)):
        if weights[i] & np.uint16(0x7F80) and weights[i] & np.uint16(0xF):
            return False
    return True


@_jit
def _choose_fp8_block(weights: U16, codes: U8, table: U16) -> np.float32:
    """Return the scale of one block, or -1 if a weight is not finite; leave its codes, recovered ones if they can be.

    First the scales at which the largest weight has the code 448 are tried, then amax/448 rounded up to a normal power
    of two: if any power of two gives all weights, this one does, see `reference.fp8`.
    """
    amax = _largest(weights)
    if amax >= explain.INFINITY:
        return np.float32(-1)
    plain = _widen(amax) / np.float32(448) if amax else np.float32(1)
    _round_fp8(weights, plain, codes)
    if not amax:
        return plain
    scale = _recovered_fp8_scale(weights, codes, plain, table)
    if scale:
        return scale
    if _begins_with_few_bits(weights):
        power = _float(np.uint32(_bits(plain) + np.uint32(0x7FFFFF)) & np.uint32(0x7F800000))
        _round_fp8(weights, power, codes)
        if _decodes_to(weights, codes, power):
            return power
        _round_fp8(weights, plain, codes)
    return plain


@_jit
def _round_fp8(weights: U16, scale: np.float32, codes: U8) -> None:
    """Write the codes of w/scale."""
    for i in range(codes.size):
        codes[i] = _e4m3(_widen(weights[i]) / scale)


@_jit
def _decode_again(codes: U8, scale: np.float32, decoded: U16) -> None:
    """Write the values of codes that are not NaN."""
    for i in range(codes.size):
        decoded[i] = _fp8_product(codes[i], scale)


@_jit
def _copy(source: NDArray[Any], target: NDArray[Any]) -> None:
    for i in range(target.size):
        target[i] = source[i]


@_jit
def bf16_to_fp8(weights: U16, height: int, width: int, job: int, codes: U8, scale: F32) -> Outcome:
    """Encode blocks, or one half of it: CHOOSE leaves `codes` alone, STORE takes `scale` as it is."""
    rows, columns = weights.shape
    height, width = min(height, rows), min(width, columns)
    block, decoded = np.empty(height * width, np.uint16), np.empty(height * width, np.uint16)
    block_codes, table = np.empty(height * width, np.uint8), np.empty(127, np.uint16)
    energy, error = np.zeros(LANES), np.zeros(LANES)
    changed, worst = 0, np.uint32(0)
    for top in range(0, rows, height):
        h = min(height, rows - top)
        for left in range(0, columns, width):
            w = min(width, columns - left)
            for i in range(h):
                _copy(weights[top + i, left : left + w], block[i * w : (i + 1) * w])
            if job == STORE:
                if _largest(block[: h * w]) >= explain.INFINITY:
                    return -1, 0.0, 0.0, 0.0
                chosen = scale[top // height, left // width]
                _round_fp8(block[: h * w], chosen, block_codes[: h * w])
            else:
                chosen = _choose_fp8_block(block[: h * w], block_codes[: h * w], table)
                if chosen < 0:
                    return -1, 0.0, 0.0, 0.0
                scale[top // height, left // width] = chosen
                if job == CHOOSE:
                    continue
            _decode_again(block_codes[: h * w], chosen, decoded[: h * w])
            count, largest = _tally(block[: h * w], decoded[: h * w], energy, error)
            changed, worst = changed + count, max(worst, largest)
            for i in range(h):
                _copy(block_codes[i * w : (i + 1) * w], codes[top + i, left : left + w])
    return _total(changed, worst, energy, error)


# --- fused pairs ----------------------------------------------------------------------------------------------------


@_jit
def fp8_to_int4(
    codes: U8, scale_in: F32, height: int, width: int, rule: int, table: U32, packed: U8, scale: U16
) -> Outcome:
    """Decode a row, choose the scales of its groups, and store codes at them; row by row."""
    rows, columns = codes.shape
    weights, decoded = np.empty(columns, np.uint16), np.empty(columns, np.uint16)
    nibbles, amax = np.empty(columns, np.uint8), np.empty(columns // GROUP, np.uint16)
    energy, error = np.zeros(LANES), np.zeros(LANES)
    changed, worst = 0, np.uint32(0)
    for row in range(rows):
        if not _decode_fp8_row(codes[row], scale_in[row // height], width, weights):
            return -1, 0.0, 0.0, 0.0
        if not _choose_int4_row(weights, rule, np.float32(7), table, amax, scale[row]):
            return -1, 0.0, 0.0, 0.0
        _store_int4_row(weights, rule, np.float32(7), scale[row], packed[row], nibbles, decoded)
        count, largest = _tally(weights, decoded, energy, error)
        changed, worst = changed + count, max(worst, largest)
    return _total(changed, worst, energy, error)


@_jit
def int4_to_fp8(packed: U8, scale_in: F32, group: int, height: int, width: int, codes: U8, scale: F32) -> Outcome:
    """Decode a block, choose its scale, and write its codes; block by block."""
    rows, columns = codes.shape
    height, width = min(height, rows), min(width, columns)
    block, decoded = np.empty(height * width, np.uint16), np.empty(height * width, np.uint16)
    block_codes, table = np.empty(height * width, np.uint8), np.empty(127, np.uint16)
    energy, error = np.zeros(LANES), np.zeros(LANES)
    changed, worst = 0, np.uint32(0)
    for top in range(0, rows, height):
        h = min(height, rows - top)
        for left in range(0, columns, width):
            w = min(width, columns - left)
            for i in range(h):
                span = block[i * w : (i + 1) * w]
                _decode_int4_row(packed[top + i], scale_in[top + i], group, left, span)
            chosen = _choose_fp8_block(block[: h * w], block_codes[: h * w], table)
            if chosen < 0:
                return -1, 0.0, 0.0, 0.0
            _decode_again(block_codes[: h * w], chosen, decoded[: h * w])
            scale[top // height, left // width] = chosen
            count, largest = _tally(block[: h * w], decoded[: h * w], energy, error)
            changed, worst = changed + count, max(worst, largest)
            for i in range(h):
                _copy(block_codes[i * w : (i + 1) * w], codes[top + i, left : left + w])
    return _total(changed, worst, energy, error)


# --- others ---------------------------------------------------------------------------------------------------------


@_jit
def float_to_bf16(values: F32, out: U16) -> bool:
    """Round to BF16; return whether all of it is finite."""
    for row in range(values.shape[0]):
        largest = np.uint32(0)
        for column in range(values.shape[1]):
            value = values[row, column]
            magnitude = np.uint32(_bits(value) & np.uint32(0x7FFFFFFF))
            largest = max(largest, magnitude)
            out[row, column] = _round(value)
        if largest >= np.uint32(0x7F7F8000):  # the least float32 that rounds to infinity
            return False
    return True


@_jit
def compare(before: U16, after: U16) -> Outcome:
    """Compare rows."""
    energy, error = np.zeros(LANES), np.zeros(LANES)
    changed, worst = 0, np.uint32(0)
    for row in range(before.shape[0]):
        if max(_largest(before[row]), _largest(after[row])) >= explain.INFINITY:
            return -1, 0.0, 0.0, 0.0
        count, largest = _tally(before[row], after[row], energy, error)
        changed, worst = changed + count, max(worst, largest)
    return _total(changed, worst, energy, error)


@_jit
def outside(
    before: U16,
    after: U16,
    scale: F32,
    height: int,
    width: int,
    largest_code: np.float32,
    steps: np.float32,
    relative: np.float32,
    floor: np.float32,
    least: np.float32,
) -> int:
    """Count the weights that `bf16.outside` is asked for."""
    count = 0
    rows, columns = before.shape
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            amax = np.uint16(0)
            for row in range(top, min(top + height, rows)):
                amax = max(amax, _largest(before[row, left : min(left + width, columns)]))
            asked = _widen(amax) / largest_code
            step = min(scale[top // height, left // width], asked * np.float32(1.01))
            edge = scale[top // height, left // width] * largest_code
            clips = scale[top // height, left // width] >= least * asked
            for row in range(top, min(top + height, rows)):
                for column in range(left, min(left + width, columns)):
                    weight = _widen(before[row, column])
                    stored = _widen(after[row, column])
                    room = steps * step + relative * abs(weight) + floor
                    if (
                        clips
                        and abs(weight) > edge
                        and abs(stored - (edge if weight > 0 else -edge)) <= edge * np.float32(2.0**-8)
                    ):
                        continue
                    if not abs(weight - stored) <= room:
                        count += 1
    return count
