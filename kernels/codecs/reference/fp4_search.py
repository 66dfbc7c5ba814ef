"""The search for better FP4 scales in plain torch, and the error that it is judged by: rule 13 of docs/formats.md."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from k2quant.kernels.codecs.fp4 import MXFP4_BLOCK, NVFP4_BLOCK
from k2quant.kernels.codecs.reference.e2m1 import e2m1_numbers
from k2quant.kernels.codecs.reference.mxfp4 import (
    bf16_to_mxfp4_at,
    e8m0_powers,
    mxfp4_codes,
    mxfp4_scales,
    mxfp4_to_bf16,
)
from k2quant.kernels.codecs.reference.nvfp4 import (
    bf16_to_nvfp4_at,
    e4m3_bits,
    nvfp4_block_scales,
    nvfp4_codes,
    nvfp4_quotients,
    nvfp4_scales,
    nvfp4_to_bf16,
)
from k2quant.kernels.codecs.reference.search import halved, known_weights, lost
from k2quant.kernels.codecs.scales.fp4 import MOST_E4M3, MOST_E8M0, MXFP4_STEPS, NVFP4_STEPS
from k2quant.kernels.codecs.scales.search import LARGE_AMAX, LEAST_AMAX

Known = tuple[Tensor, Tensor | None]
"""What columns weigh, and their means."""


def searched_nvfp4_scales(
    weights: Tensor, importance: Tensor | None, tensor: Tensor, mean: Tensor | None = None, *, divides: bool
) -> Tensor:
    """Return the block scales of least error, E4M3 bits `[R, K/16]`, for BF16 `[R, K]`.

    Args:
        weights: BF16 `[R, K]`; K is a multiple of 16.
        importance: float32 `[K]`, what a squared error in each column weighs; nothing stands for ones.
        tensor: float32 of one number, the tensor scale.
        mean: float32 `[K]`, of what each column is multiplied with; nothing stands for zeros.
        divides: which form the tensor scale has.
    """
    known = known_weights(importance, mean, weights.shape[1], NVFP4_BLOCK, weights.device)
    plain = nvfp4_scales(weights, tensor, divides=divides)
    rounded = e4m3_bits(nvfp4_quotients(weights, tensor, divides=divides)).clamp(min=1).int()
    trials = [plain, *((rounded + step).clamp(1, MOST_E4M3).to(torch.uint8) for step in NVFP4_STEPS[1:])]

    def products(groups: Tensor, trial: Tensor) -> Tensor:
        factor = nvfp4_block_scales(trial, tensor, divides=divides).repeat_interleave(NVFP4_BLOCK, 1)
        return e2m1_numbers(nvfp4_codes(groups, trial, tensor, divides=divides)) * factor

    return _least(weights, trials, products, known)


def searched_mxfp4_scales(weights: Tensor, importance: Tensor | None, mean: Tensor | None = None) -> Tensor:
    """Return the scales of least error, bytes `[R, K/32]`, for BF16 `[R, K]`; arguments as of the other."""
    known = known_weights(importance, mean, weights.shape[1], MXFP4_BLOCK, weights.device)
    plain = mxfp4_scales(weights)
    trials = [(plain.int() + step).clamp(0, MOST_E8M0).to(torch.uint8) for step in MXFP4_STEPS]

    def products(groups: Tensor, trial: Tensor) -> Tensor:
        return e2m1_numbers(mxfp4_codes(groups, trial)) * e8m0_powers(trial).repeat_interleave(MXFP4_BLOCK, 1)

    return _least(weights, trials, products, known)


def weighted_nvfp4_error(
    weights: Tensor,
    scale: Tensor,
    tensor: Tensor,
    importance: Tensor | None,
    mean: Tensor | None = None,
    *,
    divides: bool,
) -> float:
    """Return the sum of importance * (w - w')^2, where w' is w at block scales: as `weighted_int4_error`, 16 lanes."""
    known_weights(importance, mean, weights.shape[1], NVFP4_BLOCK, weights.device)
    codes, _ = bf16_to_nvfp4_at(weights, scale, tensor, divides=divides)
    return lost(weights, nvfp4_to_bf16(codes, scale, tensor, divides=divides), importance, mean, NVFP4_BLOCK)


def weighted_mxfp4_error(
    weights: Tensor, scale: Tensor, importance: Tensor | None, mean: Tensor | None = None
) -> float:
    """Return the sum of importance * (w - w')^2, where w' is w at scales: as `weighted_int4_error`, in 32 lanes."""
    known_weights(importance, mean, weights.shape[1], MXFP4_BLOCK, weights.device)
    codes, _ = bf16_to_mxfp4_at(weights, scale)
    return lost(weights, mxfp4_to_bf16(codes, scale), importance, mean, MXFP4_BLOCK)


def _least(weights: Tensor, trials: list[Tensor], products: Callable[[Tensor, Tensor], Tensor], known: Known) -> Tensor:
    """Return for each block the first of its trial scales that errs least; blocks not searched keep the first trial."""
    chosen = trials[0]
    block = weights.shape[1] // chosen.shape[1]
    amax = weights.reshape(*chosen.shape, block).abs().amax(2).view(torch.int16).int()
    asked = (amax >= LEAST_AMAX) & (amax < LARGE_AMAX)
    groups = torch.where(asked.repeat_interleave(block, 1), weights, 0)
    unit = torch.where(asked, (254 - (amax >> 7)) << 23, 127 << 23).to(torch.int32).view(torch.float32)
    least = torch.full_like(unit, torch.inf)
    for trial in trials:
        difference = groups.float() - products(groups, trial).to(torch.bfloat16).float()
        error = _errors(difference * unit.repeat_interleave(block, 1), known, block)
        better = asked & (error < least)
        chosen, least = torch.where(better, trial, chosen), torch.where(better, error, least)
    return chosen


def _errors(difference: Tensor, known: Known, block: int) -> Tensor:
    """Return float32 `[R, K/block]`: the error of each block."""
    heavy, mean = known
    found = halved((difference * difference * heavy).unflatten(1, (-1, block)))
    if mean is None:
        return found
    shift = halved((difference * mean).unflatten(1, (-1, block)))
    return found + shift * shift
