"""The scales among which a search chooses for a group of INT4 on the moonshot grid, and what its columns weigh.

The rule (docs/formats.md, rule 7). Candidate c of a group is s = bf16(s0 * (256 - SHRINK[bits][c]) / 256), where
s0 = bf16(amax/L) is the plain scale, moved to a scale that survives, bf16(bf16(L * s) / L). That a scale survives
means: rounded anew by the plain rule, the values decoded at it have that scale and those codes again. Candidate 0 is
s0, which survives itself. None is larger than s0, so the largest weight keeps the code L.

The least error wins, the earlier candidate among equals. With d = (w - bf16(code * s)) * 2^-e, codes as `store` rounds
them and 2^e <= amax < 2^(e+1), an error is the sum over the group's 32 columns of importance * d^2. All of it is
float32, each operation rounded: (d * d) * importance, then sums in halves: lane i and i + 16, then i + 8, 4, 2, 1. The
power of two is exact and keeps squares of large and of small weights within float32.

Where the columns' means are known too, the error is the expected square of the group's share of an output, as long as
columns vary independently: E[(sum d x)^2] = sum var d^2 + (sum mean d)^2. Then var = max(importance - mean * mean, 0)
stands for the importance, and the square of the sum of mean * d, in the same halves, is added.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from k2quant.errors import UsageError
from k2quant.kernels.codecs.grids import GROUP, PACKED_BITS, largest_code
from k2quant.kernels.codecs.scales.recovery import SMALLEST_AMAX
from k2quant.kernels.codecs.values import F32, F64, U16, bf16_to_float, float_to_bf16

SHRINK = {
    4: (0, 5, 10, 13, 17, 20, 24, 29, 34, 41, 50, 59, 70, 82, 97, 119),
    3: (0, 10, 18, 26, 32, 40, 46, 52, 58, 66, 76, 86, 98, 112, 128, 148),
    2: (0, 32, 56, 76, 92, 104, 116, 124, 132, 140, 148, 160, 172, 184, 196, 216),
}
"""By bits: how many 256ths each candidate takes from the plain scale.

Chosen one after the other, each the one that lowers the mean relative error most over Gaussian, Laplace and Student-t
(4 degrees) weights and those of a trained nano-K2, with importances that are equal or log-normal (sigma 0.5 to 1.5).
What is lost against every, every second and every fourth 256th down to the last: 0.6, 0.5, 0.3 %. Measured on other
draws, squared error relative to the plain scale, with equal and with log-normal importances (sigma 1):

| bits | Gaussian | Laplace | Student-t | nano-K2 |
|---|---|---|---|---|
| 4 | 0.881, 0.780 | 0.906, 0.809 | 0.913, 0.816 | 0.881, 0.779 |
| 3 | 0.740, 0.643 | 0.775, 0.663 | 0.779, 0.660 | 0.739, 0.643 |
| 2 | 0.412, 0.375 | 0.537, 0.463 | 0.560, 0.476 | 0.412, 0.376 |
"""

CANDIDATES = len(SHRINK[4])
"""Scales that are tried for a group, the plain one first."""

LEAST_AMAX, LARGE_AMAX = SMALLEST_AMAX, 0x7E80
"""BF16 bits of 2^-122 and 2^126: a group whose largest weight is less, or not below the second, keeps its plain scale.

Between them all scales and products are normal numbers, so the mantissa of amax alone decides on the candidates.
"""


ALONE = "mean: expected only beside an importance, found none"
"""What is said of a mean that stands alone."""


def surviving(scale: F32, largest: int) -> F32:
    """Return the scale that survives nearest to BF16 numbers `scale`, as BF16 numbers in float32."""
    divisor = np.float32(largest)
    return bf16_to_float(float_to_bf16(bf16_to_float(float_to_bf16(scale * divisor)) / divisor))


@lru_cache(maxsize=len(PACKED_BITS))
def candidate_table(bits: int) -> U16:
    """Return the candidates, as BF16 bits `[128, CANDIDATES]`, by mantissa of amax, for amax from 1.0 to 1.99.

    Raises:
        UsageError: there is no such width.
    """
    largest = largest_code("moonshot", bits, PACKED_BITS)
    amax = np.arange(127 << 7, 128 << 7, dtype=np.uint16)
    plain = bf16_to_float(float_to_bf16(bf16_to_float(amax) / np.float32(largest)))
    factors = (256 - np.array(SHRINK[bits])).astype(np.float32) / np.float32(256)
    shrunk = bf16_to_float(float_to_bf16(plain[:, None] * factors))
    table = float_to_bf16(surviving(shrunk, largest))
    table.flags.writeable = False
    return table


def least_share(bits: int) -> float:
    """Return a share of amax/L below which no searched scale is.

    From the last candidate's factor 2 % are taken: it is rounded to BF16 three times, by at most 2^-8, and amax/L once.
    """
    return 0.98 * (256 - max(SHRINK[bits])) / 256


def column_weights(importance: F32 | None, columns: int, group: int = GROUP) -> F32:
    """Return what each column weighs in a search: its importance, scaled so that the largest of a group is near 1.

    A power of two for each group of columns does it: no order among candidates changes, and no error overflows.

    Args:
        importance: float32 `[K]`, finite, none negative; nothing stands for ones.
        columns: K, a multiple of the group.
        group: columns that share a scale.

    Raises:
        UsageError: `importance` is of another dtype or length, or holds a NaN, an infinity or a negative number.
    """
    if importance is None:
        return np.ones(columns, np.float32)
    check_importance(importance, columns)
    _, exponent = np.frexp(importance.reshape(-1, group).max(1, initial=0, keepdims=True))
    return _moved(importance, -exponent)


def column_moments(importance: F32 | None, mean: F32, columns: int, group: int = GROUP) -> tuple[F32, F32]:
    """Return the variance and the mean of each column, scaled so that the largest of a group is near 1.

    A power of four for each group of columns does it, and its root for means.

    Args:
        importance: as for `column_weights`, but there must be one.
        mean: float32 `[K]`, finite.
        columns: K, a multiple of the group.
        group: columns that share a scale.

    Returns:
        float32 `[K]` each: max(importance - mean * mean, 0), and the mean.

    Raises:
        UsageError: as for `column_weights`, of both.
    """
    importance = check_mean(mean, importance, columns)
    check_importance(importance, columns)
    with np.errstate(over="ignore"):  # a mean whose square is infinite leaves no variance
        heavy = np.maximum(importance - mean * mean, np.float32(0))
    largest = np.maximum(importance.astype(np.float64), mean.astype(np.float64) ** 2)
    _, exponent = np.frexp(largest.reshape(-1, group).max(1, initial=0, keepdims=True))
    root = -((exponent + 1) // 2)
    return _moved(heavy, 2 * root), _moved(mean, root)


def _moved(values: F32, exponent: NDArray[np.int32]) -> F32:
    """Return each group of columns `[K]` times a power of two, one row of `[groups, 1]`."""
    found: F32 = np.ldexp(values.reshape(len(exponent), -1), exponent).reshape(-1)
    return found


def check_mean(mean: F32, importance: F32 | None, columns: int) -> F32:
    """Return the importance beside a mean; refuse what is not one mean for each column, and one without importance."""
    if importance is None:
        raise UsageError(ALONE)
    if mean.dtype != np.float32 or mean.shape != (columns,):
        found = f"{mean.dtype} {list(mean.shape)}"
        raise UsageError(f"mean: expected float32 [{columns}], one for each column, found {found}")
    bad = ~np.isfinite(mean)
    if bad.any():
        column = int(bad.argmax())
        raise UsageError(f"mean: expected finite numbers, found {mean[column]} at column {column}")
    return importance


def variance(importance: F32, mean: F32 | None) -> F64:
    """Return what judges the squared error of each column: importance less the mean's square, float64 `[K]`."""
    wide = importance.astype(np.float64)
    return wide if mean is None else np.maximum(wide - mean.astype(np.float64) ** 2, 0.0)


def check_importance(importance: F32, columns: int) -> None:
    """Refuse what is not one importance for each column, as `column_weights` does."""
    if importance.dtype != np.float32 or importance.shape != (columns,):
        found = f"{importance.dtype} {list(importance.shape)}"
        raise UsageError(f"importance: expected float32 [{columns}], one for each column, found {found}")
    bad = ~(np.isfinite(importance) & (importance >= 0))
    if bad.any():
        column = int(bad.argmax())
        raise UsageError(
            f"importance: expected finite numbers from 0 up, found {importance[column]} at column {column}"
        )


def is_candidate(amax: U16, scale: U16, bits: int = 4) -> NDArray[np.bool_]:
    """Tell which scales are among those that a search tries for a group, by its largest weight alone.

    Args:
        amax: BF16 bits of each group's largest magnitude.
        scale: BF16 bits of its scale, of the same shape.
        bits: width of the codes.
    """
    candidates = candidate_table(bits)[amax & 0x7F].astype(np.int32)
    moved = candidates + (((amax >> 7).astype(np.int32) - 127) << 7)[..., None]
    searched = (amax >= LEAST_AMAX) & (amax < LARGE_AMAX)
    found: NDArray[np.bool_] = (moved == scale[..., None]).any(-1) & searched
    return found
