"""What the columns of a matrix weigh, as the loops take it."""

from __future__ import annotations

import numpy as np

from k2quant.kernels.codecs.cpu.checks import frozen
from k2quant.kernels.codecs.scales.search import (
    check_importance,
    check_mean,
    column_moments,
    column_weights,
    variance,
)
from k2quant.kernels.codecs.values import F32, F64

_NO_MEAN = np.empty(0, np.float32)


def search_weights(importance: F32 | None, mean: F32 | None, columns: int, block: int) -> tuple[F32, F32]:
    """Return what a search weighs columns by, and their means: of length 0 where there are none."""
    if mean is None:
        return frozen(column_weights(importance, columns, block)), frozen(_NO_MEAN)
    heavy, shift = column_moments(importance, mean, columns, block)
    return frozen(heavy), frozen(shift)


def weighing(importance: F32 | None, mean: F32 | None, columns: int) -> tuple[F64, F32]:
    """Return what judges each column's squared error, and its mean: of length 0 where there are none."""
    known = np.ones(columns, np.float32) if importance is None else importance
    check_importance(known, columns)
    if mean is not None:
        check_mean(mean, importance, columns)
    return frozen(variance(known, mean)), frozen(_NO_MEAN if mean is None else mean)
