"""Values that no codec can carry, and where they stand.

The codecs only notice that a panel holds a bad value. What it is and where is searched here, afterwards, in plain
numpy: the search may be slow, for the conversion stops. Rows and columns count from the array that the codec was given;
the caller, who knows the tensor's name and the panel's first row, turns a `ValueAt` into a `BadValue`.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from k2quant.errors import K2QuantError

U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]
I32 = NDArray[np.int32]
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

INFINITY = 0x7F80
"""BF16 bits of infinity; larger magnitudes are NaN."""

Place = Literal["weight", "scale", "tensor scale", "input scale"]
"""Where a bad value stands; NVFP4 alone has a tensor scale, and may have one of its inputs."""


class ValueAt(K2QuantError):
    """A bad value at a place: `what` says it in words, `of` in which of a weight's arrays the place is."""

    def __init__(self, *, row: int, column: int, what: str, of: Place = "weight") -> None:
        """Keep the parts and glue them to one sentence.

        Args:
            row: row within the array that the codec was given; for a scale, the row of the scale array.
            column: the column, likewise.
            what: what was found, such as "NaN code 0x7F".
            of: which of the arrays `row` and `column` count in. A tensor scale is one number, at row 0, column 0.
        """
        self.row, self.column, self.what, self.of = row, column, what, of
        place = f"row {row}, column {column}"
        found = {"weight": f"{what} at {place}", "scale": f"{what} at {place} of the scale"}
        super().__init__(found.get(of, what))


def float_to_bf16(values: F32) -> U16:
    """Round float32 to BF16 bits, half to even; too large becomes infinity. For finite values only."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def double_to_bf16(values: F64) -> U16:
    """Round float64 to BF16 bits, half to even, once; what exceeds BF16 becomes infinity.

    The way leads over float32, which rounds too. That moves a value to the other side of a BF16 tie never, but it may
    move one onto a tie, which then goes to the even neighbour whichever side it came from. So float32 values that are
    ties are first put back, by one float32 step, on the side where the float64 value lies.
    """
    with np.errstate(over="ignore"):
        narrow = values.astype(np.float32)
    bits = narrow.reshape(-1).view(np.uint32)
    ties = np.flatnonzero((bits & np.uint32(0xFFFF)) == np.uint32(0x8000))
    exact, rounded = np.abs(values.reshape(-1)[ties]), np.abs(narrow.reshape(-1)[ties])
    bits[ties] += (exact > rounded).astype(np.uint32) - (exact < rounded).astype(np.uint32)
    infinite = np.isinf(narrow)
    result = float_to_bf16(narrow)
    result[infinite] = np.where(values[infinite] > 0, 0x7F80, 0xFF80)
    return result


def bf16_to_float(bits: U16) -> F32:
    """Widen BF16 bits to float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def e8m0_to_float(exponents: U8) -> F32:
    """Widen F8_E8M0, exponents alone: the byte b is 2^(b - 127), and 255 is NaN."""
    bits = exponents.astype(np.uint32) << np.uint32(23)
    bits[exponents == 0] = 0x00400000  # 2^-127 is subnormal
    bits[exponents == 0xFF] = 0x7FC00000
    return bits.view(np.float32)


def bad_float(values: NDArray[np.float16] | F32) -> ValueAt:
    """Find the first value of `[R, K]` that has no finite BF16 neighbour."""
    wide = values.astype(np.float32)
    wide[~np.isfinite(wide)] = np.inf
    row, column = first(float_to_bf16(wide) & 0x7FFF == INFINITY)
    value = float(values[row, column])
    what = f"overflow: {value} exceeds bfloat16" if math.isfinite(value) else f"non-finite value {value}"
    return ValueAt(row=row, column=column, what=what)


def bad_weight(weights: U16) -> ValueAt:
    """Find the first NaN or infinity among BF16 bits `[R, K]`."""
    row, column = first(weights & 0x7FFF >= INFINITY)
    bits = weights[row, column]
    name = "inf" if bits & 0x7FFF == INFINITY else "NaN"
    return ValueAt(row=row, column=column, what=f"non-finite weight {bits:#06x} ({name})")


def bad_fp8(codes: U8, scale: F32, block: tuple[int, int]) -> ValueAt:
    """Find the first bad scale, else the first NaN code, else the first product that exceeds BF16."""
    if (error := _bad_scale(scale)) is not None:
        return error
    if (nan := codes & 0x7F == 0x7F).any():
        row, column = first(nan)
        return ValueAt(row=row, column=column, what=f"NaN code 0x{codes[row, column]:02X}")
    magnitude = (codes & 0x7F).astype(np.uint32)
    code = (magnitude << np.uint32(20)).view(np.float32) * np.float32(2.0**120)
    return overflow(np.where(codes > 0x7F, -code, code), _spread(scale, block, codes.shape))


def bad_int4(packed: I32, scale: F32, group: int) -> ValueAt:
    """Find the first bad scale, else the first product that exceeds BF16."""
    if (error := _bad_scale(scale)) is not None:
        return error
    pairs = packed.view(np.uint8)
    codes = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(packed.shape[0], -1).astype(np.float32) - 8
    return overflow(codes, _spread(scale, (1, group), codes.shape))


def bad_group(weights: U16, bits: int = 4) -> ValueAt:
    """Find the first NaN or infinity, else blame the largest weight: its group's products would exceed BF16."""
    magnitude = weights & 0x7FFF
    if has_infinity(weights):
        return bad_weight(weights)
    row, column = divmod(int(magnitude.argmax()), weights.shape[1])
    value = float(bf16_to_float(weights[row : row + 1, column])[0])
    return ValueAt(row=row, column=column, what=f"overflow: {value} rounds to an INT{bits} value that exceeds bfloat16")


def bad_divisor(scale: F32) -> ValueAt | None:
    """Find the first scale that is bad, or that is zero: codes at it would be w/0. Nothing if all are good."""
    if (error := _bad_scale(scale)) is not None or scale.all():
        return error
    row, column = first(scale == 0)
    return ValueAt(row=row, column=column, what="a scale of zero", of="scale")


def has_infinity(weights: U16) -> bool:
    """Return whether any of these BF16 bits is NaN or infinite."""
    return bool((weights & 0x7FFF >= INFINITY).any())


def _bad_scale(scale: F32) -> ValueAt | None:
    bad = (scale.view(np.uint32) > 0x7F7FFFFF).reshape(scale.shape)
    if not bad.any():
        return None
    row, column = first(bad)
    value = float(scale[row, column])
    what = f"negative scale {value}" if math.isfinite(value) else f"non-finite scale {value}"
    return ValueAt(row=row, column=column, what=what, of="scale")


def _spread(scale: F32, block: tuple[int, int], shape: tuple[int, ...]) -> F32:
    return np.repeat(np.repeat(scale, block[0], 0)[: shape[0]], block[1], 1)[:, : shape[1]]


def overflow(codes: F32, scale: F32) -> ValueAt:
    """Find the first product that exceeds BF16, among codes and their scales, both `[R, K]`."""
    with np.errstate(over="ignore", invalid="ignore"):
        product = codes * scale
    row, column = first(~np.isfinite(product) | (float_to_bf16(product) & 0x7FFF >= INFINITY))
    what = f"overflow: {codes[row, column]:g} * {scale[row, column]:g} exceeds bfloat16"
    return ValueAt(row=row, column=column, what=what)


def first(bad: NDArray[np.bool_]) -> tuple[int, int]:
    """Return row and column of the first True of `[R, K]`."""
    row, column = divmod(int(bad.reshape(-1).argmax()), bad.shape[1])
    return row, column
