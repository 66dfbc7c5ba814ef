"""The two forms of NVFP4's tensor scale: one that multiplies (ModelOpt) and one that divides (compressed-tensors).

1/s is no float32 in general. Yet block scales have eight mantissas and codes two, so that a weight is one of sixteen
products times a power of two, rounded to BF16. Nearly always some float32 near 1/s gives all of them: for 127 of the
128 mantissas that a matrix's largest weight may have. The other makes s = 7 * 2^e, whose products lie on ties of BF16.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from k2quant.kernels.codecs.fp4 import E2M1, NAN_E4M3, TensorScale, e4m3_to_float
from k2quant.kernels.codecs.values import float_to_bf16

_TRIED = 16  # float32 numbers on each side of the nearest


@lru_cache(maxsize=2**10)
def same_inverse(tensor: TensorScale) -> TensorScale | None:
    """Return a tensor scale of the other form that means the same, the nearest to the inverse; None: there is none.

    It means the same where each of the 8 magnitudes at each of the 127 block scales is the same BF16 value.

    Args:
        tensor: a scale that `fp4.check_tensor` takes as a divisor.
    """
    wanted = _products(tensor)
    return next((each for each in _near(tensor) if np.array_equal(_products(each), wanted)), None)


def nearest_inverse(tensor: TensorScale) -> TensorScale | None:
    """Return the float32 that is nearest to the inverse, in the other form; None: it is no number above zero."""
    return next(_near(tensor), None)


def _near(tensor: TensorScale) -> Iterator[TensorScale]:
    """Yield float32 numbers in the other form, the nearest to the inverse first."""
    with np.errstate(all="ignore"):
        lower = upper = np.float32(1 / np.float64(tensor.value))
    if not (np.isfinite(upper) and upper > 0):
        return
    yield TensorScale(float(upper), not tensor.divides)
    for _ in range(_TRIED):
        lower, upper = np.nextafter(lower, np.float32(0)), np.nextafter(upper, np.float32(np.inf))
        for value in (upper, lower):
            if np.isfinite(value) and value > 0:
                yield TensorScale(float(value), not tensor.divides)


def _products(tensor: TensorScale) -> NDArray[np.uint16]:
    """Return the BF16 bits `[127, 8]` of each magnitude at each block scale; infinity for what exceeds BF16."""
    scale = e4m3_to_float(np.arange(NAN_E4M3, dtype=np.uint8))
    with np.errstate(all="ignore"):
        factor = scale / tensor.number if tensor.divides else scale * tensor.number
        return float_to_bf16(factor[:, None] * np.array(E2M1, np.float32))
