"""The search for better INT4 scales in plain torch, and the error that it is judged by: rule 7 of docs/formats.md."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from k2quant.kernels.codecs.grids import GROUP, PACKED_BITS, largest_code
from k2quant.kernels.codecs.reference.bf16 import divided
from k2quant.kernels.codecs.reference.int4 import (
    bf16_to_int4_at,
    int4_at_scale,
    int4_scales,
    int4_to_bf16,
    plain_int4_scale,
)
from k2quant.kernels.codecs.scales.search import LARGE_AMAX, LEAST_AMAX, SHRINK, column_moments, column_weights


def searched_int4_scales(
    weights: Tensor, importance: Tensor | None, mean: Tensor | None = None, *, recover: bool = True, bits: int = 4
) -> Tensor:
    """Return the BF16 scales `[R, K/32]` of least error for BF16 `[R, K]` on the moonshot grid.

    Args:
        weights: BF16 `[R, K]`; K is a multiple of 32.
        importance: float32 `[K]`, what a squared error in each column weighs; nothing stands for ones.
        mean: float32 `[K]`, of what each column is multiplied with; nothing stands for zeros.
        recover: leave groups that lie on the grid the scale that gives all their weights; with 4 bits alone.
        bits: width of the codes, 4, 3 or 2.
    """
    largest = largest_code("moonshot", bits, PACKED_BITS)
    rows, columns = weights.shape
    heavy, shift = known_weights(importance, mean, columns, GROUP, weights.device)
    scale = int4_scales(weights, "moonshot", recover=recover, bits=bits)
    plain = plain_int4_scale(weights, "moonshot", bits)
    amax = weights.reshape(rows, columns // GROUP, GROUP).abs().amax(2).view(torch.int16).int()
    asked = (amax >= LEAST_AMAX) & (amax < LARGE_AMAX) & (scale == plain)
    # Where nothing is asked, zeros at the scale 1 stand in: they raise no error.
    groups = torch.where(_spread(asked), weights, 0)
    unit = torch.where(asked, (254 - (amax >> 7)) << 23, 127 << 23).view(torch.float32)
    least = torch.full_like(unit, torch.inf)
    for less in SHRINK[bits]:
        factor = (256 - less) / 256
        shrunk = (plain.float() * factor).to(torch.bfloat16).float() * largest
        trial = torch.where(asked, divided(shrunk.to(torch.bfloat16).float(), largest), 1).to(torch.bfloat16)
        error = _group_errors(groups, trial, unit, (heavy, shift), bits)
        better = asked & (error < least)
        scale, least = torch.where(better, trial, scale), torch.where(better, error, least)
    return scale


def weighted_int4_error(
    weights: Tensor, scale: Tensor, importance: Tensor | None, bits: int = 4, mean: Tensor | None = None
) -> float:
    """Return the sum of importance * (w - w')^2 over BF16 `[R, K]`, where w' is w at BF16 scales `[R, K/32]`.

    With a mean, importance less its square stands there, and the square of each row's sum of mean * (w - w') is added.

    Differences are float32, all else float64. In a row, 32 lanes each add what stands there in their groups, in order;
    the lanes are added in halves, and the rows exactly, by `math.fsum`.
    """
    columns = weights.shape[1]
    known_weights(importance, mean, columns, GROUP, weights.device)
    packed, _ = bf16_to_int4_at(weights, scale, "moonshot", bits)
    return lost(weights, int4_to_bf16(packed, scale.float(), GROUP), importance, mean, GROUP)


def lost(weights: Tensor, values: Tensor, importance: Tensor | None, mean: Tensor | None, lanes: int) -> float:
    """Return what `weighted_int4_error` says of BF16 weights and the BF16 values that stand for them, both `[R, K]`."""
    difference = (weights.float() - values.float()).double()
    terms = difference * difference
    if importance is not None:
        wide = importance.double()
        terms = terms * (wide if mean is None else (wide - mean.double() * mean.double()).clamp(min=0))
    found = in_lanes(terms, lanes)
    if mean is not None:
        shift = in_lanes(difference * mean.double(), lanes)
        found = found + shift * shift
    return math.fsum(found.tolist())


def in_lanes(terms: Tensor, count: int) -> Tensor:
    """Return the sum of each row `[R]` of float64 `[R, K]`, added in so many lanes."""
    lanes = torch.zeros(len(terms), count, dtype=torch.float64, device=terms.device)
    for group in terms.split(count, 1):
        lanes = lanes + group
    return halved(lanes)


def _group_errors(
    groups: Tensor, scale: Tensor, unit: Tensor, known: tuple[Tensor, Tensor | None], bits: int
) -> Tensor:
    """Return float32 `[R, K/32]`: the error of each group at its scale, by `column_weights`."""
    heavy, mean = known
    _, values = int4_at_scale(groups, scale, bits)
    difference = (groups.float() - values.float()) * _spread(unit)
    found = halved((difference * difference * heavy).reshape(*scale.shape, GROUP))
    if mean is None:
        return found
    shift = halved((difference * mean).reshape(*scale.shape, GROUP))
    return found + shift * shift


def halved(lanes: Tensor) -> Tensor:
    """Return the sum over the last dimension, a power of two, its halves added until one lane is left."""
    while lanes.shape[-1] > 1:
        low, high = lanes.chunk(2, -1)
        lanes = low + high
    return lanes[..., 0]


def _spread(groups: Tensor) -> Tensor:
    """Return one value for each column `[R, K]` of one for each group."""
    return groups.repeat_interleave(GROUP, 1)


def known_weights(
    importance: Tensor | None, mean: Tensor | None, columns: int, group: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Return `column_weights`, or `column_moments`, on a device."""
    known, shift = (None if part is None else part.detach().cpu().numpy() for part in (importance, mean))
    if shift is None:
        return torch.from_numpy(column_weights(known, columns, group)).to(device), None
    heavy, moved = column_moments(known, shift, columns, group)
    return torch.from_numpy(heavy).to(device), torch.from_numpy(moved).to(device)
