"""The rules of FP4 in plain numpy: for tables of all that can come, not for weights. `seam` has them in words."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from k2quant.kernels.codecs import fp4
from k2quant.kernels.codecs.fp4 import TensorScale
from k2quant.kernels.codecs.values import F32, U8, U16, bf16_to_float, float_to_bf16

E2M1 = np.array(fp4.E2M1, np.float32)
_THRESHOLDS = np.array(fp4.THRESHOLDS, np.float32)
_TIES_UP = np.array(fp4.TIES_UP)


def reaches(quotient: F32) -> NDArray[np.bool_]:
    """Return whether quotients `[..., 7]`, from 0 up, are rounded to the codes 1 to 7 or to larger ones."""
    reached: NDArray[np.bool_] = np.where(_TIES_UP, quotient >= _THRESHOLDS, quotient > _THRESHOLDS)
    return reached


def rounded(values: F32) -> U16:
    """Round float32 to BF16; what is NaN or exceeds BF16 becomes an infinity."""
    return float_to_bf16(np.where(np.isnan(values), np.inf, values).astype(np.float32))


def nvfp4_quotients(amax: U16, tensor: TensorScale) -> F32:
    """Return what the scales of blocks of these largest magnitudes, BF16 bits, are before they are rounded."""
    largest = bf16_to_float(amax)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        if tensor.divides:
            return tensor.number * bf16_to_float(float_to_bf16(largest / np.float32(fp4.LARGEST_E2M1)))
        return largest / (np.float32(fp4.LARGEST_E2M1) * tensor.number)


def plain_nvfp4(quotient: F32, tensor: TensorScale) -> tuple[U8, U8]:
    """Return the scales that `choose` makes of quotients, and what these round to.

    The two differ where a scale would be zero, or less than the least that ModelOpt's rule allows.
    """
    near = fp4.float_to_e4m3(quotient)
    if tensor.divides:
        return np.where(near == 0, fp4.EMPTY_DIVIDES, near).astype(np.uint8), near
    plain = fp4.float_to_e4m3(np.maximum(quotient, np.float32(fp4.LEAST_E4M3)))
    return np.where(quotient == 0, fp4.EMPTY_MULTIPLIES, plain).astype(np.uint8), near


def plain_mxfp4(amax: U16) -> U8:
    """Return the scales that `choose` gives blocks of these largest magnitudes, BF16 bits."""
    found: U8 = np.maximum(((amax.astype(np.int32) + 0x20) >> 7) - 2, 0).astype(np.uint8)
    return found
