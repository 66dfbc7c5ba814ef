"""What NVFP4 and MXFP4 on the CPU share, in plain numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from k2quant.kernels.codecs.fp4 import E2M1, THRESHOLDS, TIES_UP
from k2quant.kernels.codecs.scales.search import (
    LARGE_AMAX,
    LEAST_AMAX,
    check_importance,
    check_mean,
    column_moments,
    column_weights,
    variance,
)
from k2quant.kernels.codecs.values import F32, F64, U8, U16, bf16_to_float, float_to_bf16

_NUMBERS = np.array([*E2M1, *(-number for number in E2M1)], np.float32)


def encoded(quotient: F32, negative: NDArray[np.bool_]) -> U8:
    """Return the codes 0 to 15 of quotients."""
    magnitude = np.abs(quotient)
    code = np.zeros(quotient.shape, np.uint8)
    for threshold, up in zip(THRESHOLDS, TIES_UP, strict=True):
        code += magnitude >= np.float32(threshold) if up else magnitude > np.float32(threshold)
    return code | (negative.astype(np.uint8) << np.uint8(3))


def numbers(codes: U8) -> F32:
    """Return the numbers of codes 0 to 15."""
    return _NUMBERS[codes]


def packed(codes: U8) -> U8:
    """Return bytes `[R, K/2]` of codes 0 to 15 `[R, K]`."""
    return codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))


def rounded(values: F32) -> U16:
    """Round float32 to BF16; what is NaN or exceeds BF16 becomes an infinity."""
    return float_to_bf16(np.where(np.isnan(values), np.inf, values).astype(np.float32))


def errors(importance: F32 | None, mean: F32 | None, columns: int) -> tuple[F64, F32 | None]:
    """Return what judges each column's squared error, and its mean; refuse what is none."""
    known = np.ones(columns, np.float32) if importance is None else importance
    check_importance(known, columns)
    if mean is not None:
        check_mean(mean, importance, columns)
    return variance(known, mean), mean


def sums(weights: U16, values: U16, heavy: F64, mean: F32 | None, block: int) -> F64:
    """Return what each row loses, in lanes as wide as a block."""
    difference = (bf16_to_float(weights) - bf16_to_float(values)).astype(np.float64)
    found = _in_lanes(difference * difference * heavy, block)
    if mean is not None:
        shift = _in_lanes(difference * mean.astype(np.float64), block)
        found = found + shift * shift
    return found


def least(weights: U16, trials: U8, products: Callable[[U16, U8], F32], known: tuple[F32 | None, F32 | None]) -> U8:
    """Return for each block the first of its trial scales `[R, B, T]` that errs least; else the first trial."""
    rows, blocks, count = trials.shape
    block = weights.shape[1] // blocks
    importance, mean = known
    heavy, shift = column_weights(importance, weights.shape[1], block), None
    if mean is not None:
        heavy, shift = column_moments(importance, mean, weights.shape[1], block)
    amax = (weights & 0x7FFF).reshape(rows, blocks, block).max(2)
    asked = (amax >= LEAST_AMAX) & (amax < LARGE_AMAX)
    groups = np.where(np.repeat(asked, block, 1), weights, 0).astype(np.uint16)
    unit = np.where(asked, (254 - (amax >> 7).astype(np.uint32)) << 23, 127 << 23).astype(np.uint32).view(np.float32)
    chosen, best = trials[..., 0].copy(), np.full((rows, blocks), np.inf, np.float32)
    for index in range(count):
        trial = np.ascontiguousarray(trials[..., index])
        values = bf16_to_float(rounded(products(groups, trial)))
        with np.errstate(over="ignore", invalid="ignore"):
            d = (bf16_to_float(groups) - values) * np.repeat(unit, block, 1)
            error = _halved((d * d * heavy).reshape(rows, blocks, block))
            if shift is not None:
                moved = _halved((d * shift).reshape(rows, blocks, block))
                error = error + moved * moved
        better = asked & (error < best)
        chosen[better], best[better] = trial[better], error[better]
    return chosen


def _in_lanes(terms: F64, block: int) -> F64:
    lanes = np.zeros((len(terms), block))
    for first in range(0, terms.shape[1], block):
        lanes = lanes + terms[:, first : first + block]
    return _halved(lanes)


Lanes = TypeVar("Lanes", F32, F64)


def _halved(lanes: Lanes) -> Lanes:
    while lanes.shape[-1] > 1:
        middle = lanes.shape[-1] // 2
        lanes = lanes[..., :middle] + lanes[..., middle:]
    return lanes[..., 0]
