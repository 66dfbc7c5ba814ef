"""The search for INT4 scales on a GPU, and the error that judges it: the bits of `reference.search`.

A thread holds a group through all candidates: memory is read once. What a column weighs, and its mean, are made ahead,
once for all rows. As in `int4`, nothing here waits for the device, and what the seam refuses is reported in a flag;
a group with such a value gets the scale NaN.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from k2quant.errors import UsageError
from k2quant.kernels.codecs.gpu.bf16 import INFINITY, any_of, bad_scale, magnitude_of, widen
from k2quant.kernels.codecs.gpu.figures import bits_of, flag_for
from k2quant.kernels.codecs.gpu.int4_rules import chosen_int4_scale, halved, int4_nibble, int4_product, searched_scale
from k2quant.kernels.codecs.grids import GROUP, PACKED_BITS, largest_code
from k2quant.kernels.codecs.scales.search import ALONE, SHRINK
from k2quant.kernels.devices.launch import launch

_GROUPS = 128
"""Groups that a program searches, one a thread: so no error is added up across threads, 16 times over."""

_ROWS = 16
"""Rows whose errors a program adds up, each in its order: 4 weights a thread."""

_COLUMNS = 16
"""Groups of columns that a program weighs."""


@triton.jit
def _column_weights(importance_ptr, out_ptr, groups, GROUPS: tl.constexpr):
    """Write each importance times a power of two that brings the largest of its group to 1/2 or more, below 1.

    All of a group that holds what is no importance, a NaN or less than zero, becomes NaN.
    """
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    place = (group * 32)[:, None] + tl.arange(0, 32)[None, :]
    inside = (group < groups)[:, None]
    given = tl.load(importance_ptr + place, mask=inside, other=0.0)
    bad = tl.max((bad_scale(given) & (given != 0)).to(tl.int32), 1)
    # float64 holds the power even where the largest is subnormal in float32; it is made of the exponent's bits alone.
    wide = given.to(tl.float64)
    exponent = tl.max(wide.to(tl.int64, bitcast=True) >> 52, 1) & 0x7FF
    power = ((2045 - exponent) << 52).to(tl.float64, bitcast=True)
    weight = (wide * power[:, None]).to(tl.float32)
    weight = tl.where(bad[:, None] > 0, float("nan"), weight)
    tl.store(out_ptr + place, weight, mask=inside)


@triton.jit
def _column_moments(importance_ptr, mean_ptr, heavy_ptr, moved_ptr, groups, GROUPS: tl.constexpr):
    """Write variances times a power of four that brings the largest of a group near 1, and means times its root.

    All variances of a group that holds what is no importance, or a mean that is not finite, become NaN.
    """
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    place = (group * 32)[:, None] + tl.arange(0, 32)[None, :]
    inside = (group < groups)[:, None]
    given = tl.load(importance_ptr + place, mask=inside, other=0.0)
    mean = tl.load(mean_ptr + place, mask=inside, other=0.0)
    wrong = (bad_scale(given) & (given != 0)) | bad_scale(tl.abs(mean))
    bad = tl.max(wrong.to(tl.int32), 1)
    wide = mean.to(tl.float64)
    largest = tl.maximum(given.to(tl.float64), wide * wide)
    exponent = tl.max(largest.to(tl.int64, bitcast=True) >> 52, 1) & 0x7FF
    root = 511 - ((exponent + 1) >> 1)  # the exponent is biased by 1023, and that of a number from 1/2 up to 1 is 0
    power = ((1023 + 2 * root) << 52).to(tl.float64, bitcast=True)
    heavy = (tl.maximum(given - mean * mean, 0.0).to(tl.float64) * power[:, None]).to(tl.float32)
    heavy = tl.where(bad[:, None] > 0, float("nan"), heavy)
    half = ((1023 + root) << 52).to(tl.float64, bitcast=True)
    tl.store(heavy_ptr + place, heavy, mask=inside)
    tl.store(moved_ptr + place, (wide * half[:, None]).to(tl.float32), mask=inside)


@triton.jit
def _search(
    weights_ptr,
    heavy_ptr,
    mean_ptr,
    shrink_ptr,
    scale_ptr,
    bad_ptr,
    groups,
    ACROSS,
    RECOVER: tl.constexpr,
    LARGEST: tl.constexpr,
    WEIGHED: tl.constexpr,
    SHIFTED: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Choose the scales of GROUPS groups, of which ACROSS lie in a row."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = (group < groups)[:, None, None]
    lane = (8 * tl.arange(0, 4))[:, None] + tl.arange(0, 8)[None, :]
    bits = tl.load(weights_ptr + ((group * 32)[:, None, None] + lane[None, :, :]), mask=inside, other=0)
    amax = tl.max(tl.max(magnitude_of(bits), 2), 1)
    scale = chosen_int4_scale(bits, amax, RECOVER, LARGEST)
    # Read only now: recovery, which knows no weighing, needs the registers.
    column = (group % ACROSS * 32)[:, None, None] + lane[None, :, :]
    if WEIGHED:
        heavy = tl.load(heavy_ptr + column, mask=inside, other=0.0)
    else:
        heavy = tl.full((GROUPS, 4, 8), 1.0, tl.float32)
    mean = heavy
    if SHIFTED:
        mean = tl.load(mean_ptr + column, mask=inside, other=0.0)
    scale = searched_scale(bits, heavy, mean, amax, scale, shrink_ptr, LARGEST, SHIFTED)
    if tl.max(amax) >= INFINITY:
        tl.store(bad_ptr, 1)
    tl.store(scale_ptr + group, scale, mask=group < groups)


def search_int4_scales(
    weights: Tensor,
    importance: Tensor | None,
    mean: Tensor | None = None,
    *,
    recover: bool = True,
    bits: int = 4,
    bad: Tensor | None = None,
) -> Tensor:
    """Return the BF16 scales `[R, K/32]` of least error, see `seam.Int4Codec.search`.

    Args:
        weights: BF16 `[R, K]`; K is a multiple of 32.
        importance: float32 `[K]`; nothing stands for ones. A group of columns with one that is NaN, infinite or
            negative gets the scale NaN where it is searched.
        mean: float32 `[K]`, beside an importance; nothing stands for zeros. One that is not finite does the same.
        recover: leave groups that lie on the grid the scale that gives all their weights; of 4 bits alone.
        bits: width of the codes, 4, 3 or 2.
        bad: int32 `[1]`, set to 1 if a weight is not finite.

    Raises:
        UsageError: there is no such width, `importance` or `mean` is of another dtype or length, or a mean stands
            alone.
    """
    largest, columns = largest_code("moonshot", bits, PACKED_BITS), weights.shape[-1]
    heavy, moved = weights, weights  # not looked at
    if mean is not None:
        heavy, moved = column_moments(importance, mean, columns)
    elif importance is not None:
        heavy = column_weights(importance, columns)
    across = columns // GROUP
    scale = torch.empty((*weights.shape[:-1], across), dtype=torch.bfloat16, device=weights.device)
    launch(
        _search,
        (triton.cdiv(scale.numel(), _GROUPS),),
        bits_of(weights),
        heavy,
        moved,
        _shrink(bits, weights.device),
        bits_of(scale),
        flag_for(bad, weights),
        scale.numel(),
        across,
        RECOVER=recover and bits == 4,
        LARGEST=float(largest),
        WEIGHED=importance is not None,
        SHIFTED=mean is not None,
        GROUPS=_GROUPS,
        exact=True,
    )
    return scale


@lru_cache
def _shrink(bits: int, device: torch.device) -> Tensor:
    """Return `SHRINK` on a device, int32 `[16]`; copied there once."""
    return torch.tensor(SHRINK[bits], dtype=torch.int32, device=device)


def column_weights(importance: Tensor, columns: int) -> Tensor:
    """Return what each column weighs in a search, float32 `[K]`: the bits of `scales.search.column_weights`.

    Raises:
        UsageError: `importance` is of another dtype or length; what it holds is not looked at.
    """
    _check("importance", importance, columns)
    out, groups = torch.empty_like(importance, memory_format=torch.contiguous_format), columns // GROUP
    launch(
        _column_weights,
        (triton.cdiv(groups, _COLUMNS),),
        importance.contiguous(),
        out,
        groups,
        GROUPS=_COLUMNS,
        exact=True,
    )
    return out


def column_moments(importance: Tensor | None, mean: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Return the variance and the mean of each column, float32 `[K]`: the bits of `scales.search.column_moments`.

    Raises:
        UsageError: either is of another dtype or length, or there is no importance; what they hold is not looked at.
    """
    if importance is None:
        raise UsageError(ALONE)
    for name, values in (("mean", mean), ("importance", importance)):
        _check(name, values, columns)
    heavy, moved = (torch.empty(columns, dtype=torch.float32, device=mean.device) for _ in range(2))
    groups = columns // GROUP
    launch(
        _column_moments,
        (triton.cdiv(groups, _COLUMNS),),
        importance.contiguous(),
        mean.contiguous(),
        heavy,
        moved,
        groups,
        GROUPS=_COLUMNS,
        exact=True,
    )
    return heavy, moved


def _check(name: str, values: Tensor, columns: int) -> None:
    if values.dtype != torch.float32 or values.shape != (columns,):
        found = f"{str(values.dtype).removeprefix('torch.')} {list(values.shape)}"
        raise UsageError(f"{name}: expected float32 [{columns}], one for each column, found {found}")


@triton.jit
def _weighted_errors(
    weights_ptr,
    scale_ptr,
    importance_ptr,
    mean_ptr,
    sums_ptr,
    bad_ptr,
    rows,
    ACROSS,
    LARGEST: tl.constexpr,
    WEIGHED: tl.constexpr,
    SHIFTED: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Write what each of ROWS rows loses: 32 lanes go along a row, and are added in halves at its end."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    lane = (8 * tl.arange(0, 4))[:, None] + tl.arange(0, 8)[None, :]
    lanes = tl.zeros((ROWS, 4, 8), tl.float64)
    shifts = lanes
    bad = tl.zeros((ROWS,), tl.int32)
    group = 0
    while group < ACROSS:
        scale = tl.load(scale_ptr + row * ACROSS + group, mask=inside, other=0x3F80)
        place = ((row * ACROSS + group) * 32)[:, None, None] + lane[None, :, :]
        bits = tl.load(weights_ptr + place, mask=inside[:, None, None], other=0)
        step = widen(scale)
        after = int4_product(int4_nibble(widen(bits), step, "moonshot", LARGEST), step[:, None, None])
        difference = (widen(bits) - widen(after)).to(tl.float64)
        term = difference * difference
        if WEIGHED:
            weight = tl.load(importance_ptr + (group * 32 + lane))[None, :, :].to(tl.float64)
            if SHIFTED:
                mean = tl.load(mean_ptr + (group * 32 + lane))[None, :, :].to(tl.float64)
                weight = tl.maximum(weight - mean * mean, 0.0)
                shifts += difference * mean
            term = term * weight
        lanes += term
        worst = tl.max(tl.max(tl.maximum(magnitude_of(bits), magnitude_of(after)), 2), 1)
        bad = bad | (bad_scale(step) | (scale == 0) | (worst >= INFINITY)).to(tl.int32)
        group += 1
    sums = halved(lanes)
    if SHIFTED:
        shift = halved(shifts)
        sums += shift * shift
    tl.store(sums_ptr + row, sums, mask=inside)
    if any_of(bad > 0) > 0:
        tl.store(bad_ptr, 1)


def weighted_errors(
    weights: Tensor,
    scale: Tensor,
    importance: Tensor | None,
    mean: Tensor | None = None,
    *,
    bits: int = 4,
    bad: Tensor | None = None,
) -> Tensor:
    """Return for each row, float64 `[R]`, what rounding at given scales loses: see `seam.Int4Codec.weighted_error`.

    Args:
        weights: BF16 `[R, K]`; K is a multiple of 32.
        scale: BF16 `[R, K/32]`.
        importance: float32 `[K]`; nothing stands for ones.
        mean: float32 `[K]`, beside an importance; nothing stands for zeros.
        bits: width of the codes, 4, 3 or 2.
        bad: int32 `[1]`, set to 1 if a weight is not finite or decodes to more than BF16 holds, or a scale is bad or
            zero.
    """
    largest, rows = largest_code("moonshot", bits, PACKED_BITS), weights.shape[0]
    sums = torch.empty(rows, dtype=torch.float64, device=weights.device)
    launch(
        _weighted_errors,
        (triton.cdiv(rows, _ROWS),),
        bits_of(weights),
        bits_of(scale),
        sums if importance is None else importance.contiguous(),
        sums if mean is None else mean.contiguous(),
        sums,
        flag_for(bad, weights),
        rows,
        weights.shape[1] // GROUP,
        LARGEST=float(largest),
        WEIGHED=importance is not None,
        SHIFTED=mean is not None,
        ROWS=_ROWS,
        exact=True,
    )
    return sums
