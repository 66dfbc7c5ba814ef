"""What a way of rounding loses on held-out tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from k2quant.calib.stats.blending import LEAST_HELD_OUT
from k2quant.kernels.solvers.errors import output_error

if TYPE_CHECKING:
    from torch import Tensor

    from k2quant.calib.solving.evidence import Evidence

JUDGED = 512
"""Held-out tokens that judge at most, evenly spaced: each costs as much as a row of the weights in a product, for each
way of rounding. What a token says is already a mean over all rows."""


class Judge(NamedTuple):
    """Tokens that decide between ways of rounding, and had no part in any of them."""

    inputs: Tensor
    """BF16 `[n, K]`."""
    weights: Tensor
    """float32 `[n]`: what each counts; they add up to 1."""
    tokens: int
    """Held-out tokens of the matrix's own."""
    measure: str
    """As a report says it."""

    def error(self, weights: Tensor, values: Tensor) -> float:
        """Return the mean square of what an output token loses, summed over rows."""
        return output_error(weights, values, self.inputs, self.weights)


def judge_of(evidence: Evidence) -> Judge | None:
    """Return who judges; None where no held-out token came, to this input or to the layer."""
    own, counts, tokens = *_sample(evidence.held, evidence.held_weights), len(evidence.held)
    own_share = _shares(counts)
    if tokens >= LEAST_HELD_OUT:
        return Judge(own, own_share, tokens, "validation")
    prior = evidence.prior
    if prior is None or not len(prior.held):
        return Judge(own, own_share, tokens, "validation, blended") if tokens else None
    others, ones = _sample(prior.held, torch.ones(len(prior.held), device=prior.held.device))
    share = tokens / (tokens + LEAST_HELD_OUT)
    weights = torch.cat([own_share * share, _shares(ones) * (1 - share)])
    return Judge(torch.cat([own, others]), weights, tokens, "validation, blended")


def _sample(inputs: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    if len(inputs) <= JUDGED:
        return inputs, weights
    rows = torch.arange(JUDGED, device=inputs.device) * len(inputs) // JUDGED
    return inputs[rows], weights[rows]


def _shares(weights: Tensor) -> Tensor:
    total = weights.sum()
    return weights / total if total > 0 else torch.full_like(weights, 1 / max(len(weights), 1))
