"""GPTQ in plain torch, a column at a time: what the CPU's and a GPU's ways are copies of.

The order of the sums is part of the rule. What the columns before a block of `BLOCK` add to it is one float32 product;
what columns inside the block add comes on top, one column after the other, each product rounded before it is added.
Rows of W come in multiples of `LANES`, zeros behind the last, so that a BLAS takes the same way for each of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from k2quant.kernels.codecs.grids import GROUP, PACKED_BITS, largest_code
from k2quant.kernels.codecs.reference import moonshot_codes, moonshot_values
from k2quant.kernels.solvers.cpu.loops import LANES
from k2quant.kernels.solvers.factors import Factor

BLOCK = 128
"""Columns between two products; GPTQ's own (arXiv 2210.17323, section 3.3)."""


@dataclass(frozen=True, slots=True, eq=False)
class Solved:
    """A matrix as GPTQ leaves it, at the scales that it was given."""

    values: Tensor
    """bfloat16 `[R, K]`: bf16(code * scale)."""
    codes: Tensor
    """int8 `[R, K]`, -L..L."""
    saturated: int
    """Weights whose code was clamped because of what other columns added; plain rounding would not have."""


def earlier(upper: Tensor, differences: Tensor, start: int, stop: int) -> Tensor:
    """Return what the columns before a block add to it: float32 `[stop - start, P]`, of `[K, K]` and `[K, P]`."""
    if not start:
        return differences.new_zeros(stop - start, differences.shape[1])
    return upper[:start, start:stop].T @ differences[:start]


def rounded(weights: Tensor, added: Tensor, scales: Tensor, largest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round a column of W.

    Args:
        weights: float32 `[P]`.
        added: float32 `[P]`, what is added to each first.
        scales: float32 `[P]`; at 0, as where a sum overflowed to NaN, the code is 0.
        largest: L.

    Returns:
        Codes and values, float32 `[P]`, and bool `[P]`: clamped, though plain rounding would not be.
    """
    quotient = (weights + added) / scales
    quotient = torch.where((scales > 0) & ~quotient.isnan(), quotient, 0.0)
    codes = moonshot_codes(quotient, largest)
    plain = weights / scales
    beyond = (codes != quotient.round()) & (plain.round().abs() <= largest)
    return codes, moonshot_values(codes, scales).float(), beyond


def solve(weights: Tensor, scales: Tensor, factor: Factor, *, bits: int = 4) -> Solved:
    """Do what `gptq.solve` does."""
    largest = largest_code("moonshot", bits, PACKED_BITS)
    order, upper = factor.order, factor.upper
    rows, columns = weights.shape
    padding = (0, -rows % LANES)
    wide = torch.nn.functional.pad(weights.float().T[order], padding)
    steps = torch.nn.functional.pad(scales.float().T[order // GROUP], padding)
    differences, codes = torch.zeros_like(wide), torch.zeros_like(wide)
    saturated = 0
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        sums = earlier(upper, differences, start, stop)
        for j in range(start, stop):
            added = sums[j - start]
            for before in range(start, j):
                added = added + differences[before] * upper[before, j]
            codes[j], value, beyond = rounded(wide[j], added / upper[j, j], steps[j], largest)
            differences[j] = wide[j] - value
            saturated += int(beyond.sum())
    found = torch.empty_like(codes)
    found[order] = codes
    found = found[:, :rows].T.contiguous().to(torch.int8)
    return Solved(moonshot_values(found, scales.repeat_interleave(GROUP, 1)), found, saturated)
