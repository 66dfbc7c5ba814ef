"""The two FP4 families, NVFP4 and MXFP4: their constants, and the rules for one number. docs/formats.md has the text.

A code is a nibble of E2M1: bit 3 the sign, bits 0 to 2 an index into `E2M1` (OCP Microscaling Formats 1.0, table 5).
NVFP4 has an E4M3 scale for each 16 columns, and one float32 for the whole tensor; MXFP4 has a power of two for each 32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from k2quant.kernels.codecs import grids
from k2quant.kernels.codecs.values import (
    F32,
    U8,
    U16,
    ValueAt,
    bad_weight,
    bf16_to_float,
    e8m0_to_float,
    first,
    float_to_bf16,
    has_infinity,
    overflow,
)

NVFP4_BLOCK, MXFP4_BLOCK = grids.NVFP4_BLOCK, grids.MXFP4_BLOCK
"""Columns that share a block scale."""

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the codes 0 to 7."""

THRESHOLDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""Where |w / scale| goes from one code to the next. A tie goes to the even code: up at `TIES_UP`, else down."""

TIES_UP = (False, True, False, True, False, True, False)
"""Whether a quotient that is just the threshold gets the upper of the two codes."""

LARGEST_E2M1, LARGEST_E4M3 = 6.0, 448.0

LEAST_E4M3 = 2.0**-9
"""The least block scale above zero; its bits are 1."""

LEAST_POWER, MOST_POWER = -9, 8
"""Exponents of the powers of two that E4M3 has."""

NAN_E4M3 = 0x7F
"""E4M3 bits of NaN, sign aside. Bits above it have a sign: no block scale has one."""

MXFP4_BIAS, NAN_E8M0 = 127, 255
"""A scale's byte b is 2^(b - 127); 255 is NaN."""

EMPTY_MULTIPLIES, EMPTY_DIVIDES = 0x38, 0x20
"""E4M3 bits of a block whose quotient is zero: 1.0 in ModelOpt's rule, 0.125 in compressed-tensors'."""

_FULL = np.float32(LARGEST_E2M1 * LARGEST_E4M3)


class TensorScale(NamedTuple):
    """The float32 that all of an NVFP4 tensor shares, in one of two forms.

    A block's scale in use is S = float32(e4m3 scale) * value (ModelOpt's `weight_scale_2`), or, if it `divides`,
    float32(e4m3 scale) / value (compressed-tensors' `weight_global_scale`); rounded to float32.
    """

    value: float
    """A float32 number, as the file stores it."""
    divides: bool

    @property
    def number(self) -> np.float32:
        """Return the value as float32."""
        return np.float32(self.value)

    @property
    def empty(self) -> int:
        """Return the E4M3 bits that a block of zeros gets."""
        return EMPTY_DIVIDES if self.divides else EMPTY_MULTIPLIES


def tensor_scale(amax: float, *, divides: bool) -> TensorScale:
    """Return the tensor scale of weights whose largest magnitude is `amax`: what the layout's own tool would write.

    It multiplies: float32(amax / 2688), of ModelOpt 0.47 (`NVFP4QTensor.get_weights_scaling_factor_2`). It divides:
    bf16(2688 * bf16(1 / amax)), of compressed-tensors 0.20 (`generate_gparam` of BF16 weights, where torch divides a
    number by a tensor in two steps). 2688 is 6 * 448: the largest weight gets the largest code and block scale.

    Zeros alone get 1.0. compressed-tensors does so too, also where that product exceeds BF16, that is for
    amax < 7.9e-36; ModelOpt writes 0 and NaN block scales for zeros, which nobody could read.

    Raises:
        ValueError: `amax` is NaN, infinite or negative.
    """
    if not 0 <= amax < math.inf:
        raise ValueError(f"amax: expected a finite number from 0 up, found {amax}")
    largest = np.float32(amax)
    if largest == 0:
        return TensorScale(1.0, divides)
    if not divides:
        return TensorScale(float(largest / _FULL), divides)
    with np.errstate(over="ignore"):
        inverse = _bf16(_FULL * _bf16(np.float32(1) / largest))
    return TensorScale(float(inverse) if inverse < np.inf else 1.0, divides)


def input_scale(amax: float, *, divides: bool) -> float:
    """Return what `input_scale`, or if it divides `input_global_scale`, is for activations up to `amax`.

    The rule is that of weights, in both tools (`NVFP4QTensor.get_activation_scaling_factor`, `generate_gparam`).

    Raises:
        ValueError: `amax` is NaN, infinite or negative.
    """
    return tensor_scale(amax, divides=divides).value


class ClosedForm(NamedTuple):
    """How MXFP4 becomes NVFP4 without rounding: block scales 2^(k - exponent), a tensor scale that means 2^exponent."""

    exponent: int
    tensor: TensorScale


def closed_form(lowest: int, highest: int, *, divides: bool) -> ClosedForm | None:
    """Return it for blocks whose scales are 2^lowest to 2^highest; nothing if E4M3 cannot span them.

    The largest block scale is 2^8, the largest power of two of E4M3, unless that would make the tensor scale less than
    2^-126, which is 1 / 2^126 in the other form. The least power is 2^-9, so a spread of 17 is the most.
    """
    exponent = max(highest - MOST_POWER, -126)
    if lowest - exponent < LEAST_POWER:
        return None
    return ClosedForm(exponent, TensorScale(2.0 ** (-exponent if divides else exponent), divides))


def bad_tensor(tensor: TensorScale, *, divisor: bool = False) -> ValueAt | None:
    """Say what is wrong with a tensor scale: it is NaN, infinite or negative (-0 included), or a zero that divides.

    Args:
        tensor: the scale.
        divisor: refuse zero in either form, for weights are divided by it.
    """
    value, zero_is_bad = tensor.number, divisor or tensor.divides
    if np.isfinite(value) and not np.signbit(value) and (value > 0 or not zero_is_bad):
        return None
    expected = "above 0" if zero_is_bad else "from 0 up"
    what = f"tensor scale {value}: expected a finite number {expected}"
    return ValueAt(row=0, column=0, what=what, of="tensor scale")


def check_tensor(tensor: TensorScale, *, divisor: bool = False) -> None:
    """Refuse a tensor scale that is bad, as `bad_tensor` says.

    Raises:
        ValueAt: it is.
    """
    if (error := bad_tensor(tensor, divisor=divisor)) is not None:
        raise error


def e4m3_to_float(bits: U8) -> F32:
    """Widen E4M3 without infinities; 0x7F and 0xFF are NaN."""
    return _E4M3[bits]


def float_to_e4m3(values: F32) -> U8:
    """Round float32 from 0 up to E4M3 bits, half to even, saturated at 448."""
    index = np.searchsorted(_MIDDLES, values.reshape(-1), side="left")
    tie = _MIDDLES[np.minimum(index, 125)] == values.reshape(-1)
    found: U8 = (index + (tie & (index % 2 == 1))).astype(np.uint8).reshape(values.shape)
    return found


def block_scales(scale: U8, tensor: TensorScale) -> F32:
    """Return S, what a code of each NVFP4 block is multiplied with; it may be NaN, infinite or zero."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        wide = e4m3_to_float(scale)
        return wide / tensor.number if tensor.divides else wide * tensor.number


def nibbles(codes: U8) -> U8:
    """Return the codes 0 to 15 of each column `[R, K]` of bytes `[R, K/2]`; the even column is the low nibble."""
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(codes.shape[0], -1)


def bad_nvfp4(codes: U8, scale: U8, tensor: TensorScale) -> ValueAt:
    """Find a bad tensor scale, else the first bad block scale, else the first product that exceeds BF16."""
    if (error := bad_tensor(tensor)) is not None:
        return error
    if (error := bad_block_scale(scale)) is not None:
        return error
    return _overflow(codes, block_scales(scale, tensor), NVFP4_BLOCK)


def bad_mxfp4(codes: U8, scale: U8) -> ValueAt:
    """Find the first scale that is NaN, else the first product that exceeds BF16."""
    if (nan := scale == NAN_E8M0).any():
        row, column = first(nan)
        return ValueAt(row=row, column=column, what="NaN scale 0xFF", of="scale")
    return _overflow(codes, e8m0_to_float(scale), MXFP4_BLOCK)


def bad_block_scale(scale: U8) -> ValueAt | None:
    """Find the first E4M3 block scale that is NaN or has a sign, -0 included. Nothing if all are good."""
    bad = scale >= NAN_E4M3
    if not bad.any():
        return None
    row, column = first(bad)
    bits = scale[row, column]
    name = "NaN" if bits & 0x7F == NAN_E4M3 else "negative"
    return ValueAt(row=row, column=column, what=f"{name} scale 0x{bits:02X}", of="scale")


def bad_nvfp4_divisor(scale: U8, tensor: TensorScale) -> ValueAt | None:
    """Find what makes a quotient at these block scales mean nothing: a bad scale, or one that is zero or infinite."""
    if (error := bad_tensor(tensor, divisor=True)) is not None:
        return error
    if (error := bad_block_scale(scale)) is not None:
        return error
    wide = block_scales(scale, tensor)
    bad = (wide == 0) | np.isinf(wide)
    if not bad.any():
        return None
    row, column = first(bad)
    by = "/" if tensor.divides else "*"
    what = f"a scale of {wide[row, column]:g} (0x{scale[row, column]:02X} {by} {tensor.number:g})"
    return ValueAt(row=row, column=column, what=what, of="scale")


def beyond_closed_form(scale: U8, beyond: NDArray[np.bool_], exponent: int) -> ValueAt:
    """Name the first MXFP4 scale of which a half is `beyond`, `[R, K/16]`: above 2^8 times the tensor's 2^exponent."""
    row, half = first(beyond)
    column = half * NVFP4_BLOCK // MXFP4_BLOCK
    power = int(scale[row, column]) - MXFP4_BIAS
    what = f"scale 2^{power}: expected at most 2^{exponent + MOST_POWER} beside a tensor scale of 2^{exponent}"
    return ValueAt(row=row, column=column, what=what, of="scale")


def bad_block(weights: U16, name: str) -> ValueAt:
    """Find the first NaN or infinity, else blame the largest weight: its block's products would exceed BF16."""
    if has_infinity(weights):
        return bad_weight(weights)
    row, column = divmod(int((weights & 0x7FFF).argmax()), weights.shape[1])
    value = float(bf16_to_float(weights[row : row + 1, column])[0])
    return ValueAt(row=row, column=column, what=f"overflow: {value} rounds to {name} value that exceeds bfloat16")


def _overflow(codes: U8, scale: F32, block: int) -> ValueAt:
    found = nibbles(codes)
    magnitude = np.array(E2M1, np.float32)[found & 7]
    return overflow(np.where(found > 7, -magnitude, magnitude).astype(np.float32), np.repeat(scale, block, 1))


def _bf16(value: np.float32) -> np.float32:
    """Round one number from 0 up to BF16; too large becomes infinity."""
    rounded: np.float32 = bf16_to_float(float_to_bf16(np.array([value], np.float32)))[0]
    return rounded


def _e4m3() -> F32:
    bits = np.arange(256, dtype=np.uint32)
    found = ((bits & 0x7F) << np.uint32(20)).view(np.float32) * np.float32(2.0**120)
    found[(bits & 0x7F) == NAN_E4M3] = np.nan
    found = np.where(bits > 0x7F, -found, found).astype(np.float32)
    found.flags.writeable = False
    return found


_E4M3 = _e4m3()
_MIDDLES = (_E4M3[:126] + _E4M3[1:127]) * np.float32(0.5)
