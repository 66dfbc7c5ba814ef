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
from k2quant.kernels.codecs.scales.search import LARGE_AMAX, LEAST_AMAX, SHRINK, column_weights


def searched_int4_scales(weights: Tensor, importance: Tensor | None, *, recover: bool = True, bits: int = 4) -> Tensor:
    """Return the BF16 scales `[R, K/32]` of least error for BF16 `[R, K]` on the moonshot grid.

    Args:
        weights: BF16 `[R, K]`; K is a multiple of 32.
        importance: float32 `[K]`, what a squared error in each column weighs; nothing stands for ones.
        recover: leave groups that lie on the grid the scale that gives all their weights; with 4 bits alone.
        bits: width of the codes, 4, 3 or 2.
    """
    largest = largest_code("moonshot", bits, PACKED_BITS)
    rows, columns = weights.shape
    heavy = _column_weights(importance, columns, weights.device)
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
        error = _group_errors(groups, trial, unit, heavy, bits)
        better = asked & (error < least)
        scale, least = torch.where(better, trial, scale), torch.where(better, error, least)
    return scale


def weighted_int4_error(weights: Tensor, scale: Tensor, importance: Tensor | None, bits: int = 4) -> float:
    """Return the sum of importance * (w - w')^2 over BF16 `[R, K]`, where w' is w at BF16 scales `[R, K/32]`.

    Differences are float32, all else float64. In a row, 32 lanes each add what stands there in their groups, in order;
    the lanes are added in halves, and the rows exactly, by `math.fsum`.
    """
    rows, columns = weights.shape
    _column_weights(importance, columns, weights.device)
    packed, _ = bf16_to_int4_at(weights, scale, "moonshot", bits)
    difference = (weights.float() - int4_to_bf16(packed, scale.float(), GROUP).float()).double()
    terms = difference * difference
    if importance is not None:
        terms = terms * importance.double()
    lanes = torch.zeros(rows, GROUP, dtype=torch.float64, device=weights.device)
    for group in terms.split(GROUP, 1):
        lanes = lanes + group
    return math.fsum(_halved(lanes).tolist())


def _group_errors(groups: Tensor, scale: Tensor, unit: Tensor, heavy: Tensor, bits: int) -> Tensor:
    """Return float32 `[R, K/32]`: the error of each group at its scale."""
    _, values = int4_at_scale(groups, scale, bits)
    difference = (groups.float() - values.float()) * _spread(unit)
    return _halved((difference * difference * heavy).reshape(*scale.shape, GROUP))


def _halved(lanes: Tensor) -> Tensor:
    """Return the sum over the last dimension, a power of two, its halves added until one lane is left."""
    while lanes.shape[-1] > 1:
        low, high = lanes.chunk(2, -1)
        lanes = low + high
    return lanes[..., 0]


def _spread(groups: Tensor) -> Tensor:
    """Return one value for each column `[R, K]` of one for each group."""
    return groups.repeat_interleave(GROUP, 1)


def _column_weights(importance: Tensor | None, columns: int, device: torch.device) -> Tensor:
    """Return `column_weights` on a device."""
    found = column_weights(None if importance is None else importance.detach().cpu().numpy(), columns)
    return torch.from_numpy(found).to(device)
