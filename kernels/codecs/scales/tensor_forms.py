"""The two forms of NVFP4's tensor scale: one that multiplies (ModelOpt) and one that divides (compressed-tensors).

1/s is no float32 in general. Yet block scales have eight mantissas and codes two, so that a weight is one of sixteen
products times a power of two, rounded to BF16. Nearly always some float32 near 1/s gives all of them.
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
    with np.errstate(all="ignore"):
        middle = np.float32(1 / np.float64(tensor.value))
    lower = upper = middle
    yield from _form(middle, tensor)
    for _ in range(_TRIED):
        lower, upper = (np.nextafter(each, np.float32(end)) for each, end in ((lower, 0), (upper, np.inf)))
        yield from _form(upper, tensor)
        yield from _form(lower, tensor)


def _form(value: np.float32, tensor: TensorScale) -> Iterator[TensorScale]:
    if np.isfinite(value) and value > 0:
        yield TensorScale(float(value), not tensor.divides)


def _products(tensor: TensorScale) -> NDArray[np.uint16]:
    """Return the BF16 bits `[127, 8]` of each magnitude at each block scale; infinity for what exceeds BF16."""
    scale = e4m3_to_float(np.arange(NAN_E4M3, dtype=np.uint8))
    with np.errstate(all="ignore"):
        factor = scale / tensor.number if tensor.divides else scale * tensor.number
        return float_to_bf16(factor[:, None] * np.array(E2M1, np.float32))
