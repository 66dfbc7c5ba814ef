"""Ways of rounding a matrix: by the plain rule, at searched scales, and solved at these."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from k2quant.kernels.codecs.choice import codecs
from k2quant.kernels.codecs.reference import int4_at_scale
from k2quant.kernels.codecs.views import bits_of
from k2quant.kernels.ops import bf16_to_int4, int4_to_bf16, search_int4_scales
from k2quant.kernels.solvers.gptq import solve

if TYPE_CHECKING:
    from torch import Tensor

    from k2quant.calib.solving.deciding.drawing import Belief
    from k2quant.calib.solving.settings import Scales
    from k2quant.kernels.solvers.factors import Factor


class Way(NamedTuple):
    """A matrix as one way rounds it."""

    method: str
    """As a report says it."""
    values: Tensor
    """BF16 `[R, K]`."""
    scales: Tensor
    """BF16 `[R, K/32]`."""
    saturated: int = 0
    """Weights whose code was clamped because columns before them had moved them out of the range."""


def plain(weights: Tensor, bits: int) -> Way:
    """Round BF16 `[R, K]` by the plain rule; what lies on the grid comes back."""
    packed, scales = bf16_to_int4(weights, bits=bits)
    return Way("rtn", int4_to_bf16(packed, scales), scales)


def searched(weights: Tensor, belief: Belief | None, scales: Scales, bits: int) -> Way:
    """Round BF16 `[R, K]` at the scales of a search.

    Args:
        weights: BF16 `[R, K]`.
        belief: what weighs errors with `imatrix`; without one all columns weigh alike.
        scales: `mse` or `imatrix`.
        bits: width of the codes.
    """
    weighted = scales == "imatrix" and belief is not None
    found = (
        search_int4_scales(weights, belief.square, belief.mean, bits=bits)
        if weighted and belief is not None
        else search_int4_scales(weights, bits=bits)
    )
    return Way("imatrix" if weighted else "mse", _at(weights, found, bits), found)


def solved(weights: Tensor, scales: Tensor, factor: Factor, bits: int) -> Way:
    """Solve BF16 `[R, K]` at BF16 scales `[R, K/32]` that stay."""
    found = solve(weights, scales, factor, bits=bits)
    return Way("gptq", found.values, scales, found.saturated)


def _at(weights: Tensor, scales: Tensor, bits: int) -> Tensor:
    if weights.device.type != "cpu":
        return int4_at_scale(weights, scales, bits)[1]
    packed = weights.new_empty(weights.shape[0], weights.shape[1] // 8, dtype=torch.int32)
    codecs("cpu").int4.store(bits_of(weights), bits_of(scales), "moonshot", bits_of(packed), bits=bits)
    return int4_to_bf16(packed, scales)
