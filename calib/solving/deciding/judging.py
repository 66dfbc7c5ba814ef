"""What a way of rounding loses on held-out tokens, and on what is believed of the input where these are few."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from k2quant.calib.solving.evidence import even_sample
from k2quant.calib.solving.memory import HELD
from k2quant.calib.stats.blending import LEAST_HELD_OUT
from k2quant.ground.saying.showing import brief
from k2quant.kernels.devices.single import single_threaded
from k2quant.kernels.solvers.errors import output_error

if TYPE_CHECKING:
    from torch import Tensor

    from k2quant.calib.solving.deciding.drawing import Belief
    from k2quant.calib.solving.evidence import Evidence

_ALIKE = 0.5
"""Agreement with the layer from which on its tokens judge: 0.84 to 0.86 in the mean over experts of a nano-K2."""

_ROWS = 256
"""Rows of a matrix, evenly spaced, on which what is believed judges: a product with a Hessian costs as much as solving,
and rows are alike."""


class Judge(NamedTuple):
    """Tokens that had no part in any way of rounding; where they are few, others beside them."""

    own: Tensor
    """BF16 `[n, K]`: held-out tokens of the matrix's own."""
    shares: Tensor
    """float32 `[n]`: what each counts; they add up to 1."""
    others: Tensor | None
    """BF16 `[m, K]`: the layer's held-out tokens, for what has few of its own and sees what its layer does."""
    belief: Belief | None
    """In their place for what sees something else: it comes from training tokens, and is partial to what it solved."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    @property
    def tokens(self) -> int:
        """How many of its own judge."""
        return len(self.own)

    @property
    def blended(self) -> bool:
        """Whether there are so few tokens that others count too, as many as if 64 had come that look like them."""
        return self.tokens < LEAST_HELD_OUT

    @property
    def measure(self) -> str:
        """What judges, as a report says it."""
        if not self.tokens and self.others is None and self.belief is None:
            return "weights"
        return "validation, blended" if self.blended else "validation"

    def error(self, weights: Tensor, values: Tensor) -> float:
        """Return the mean of |(W - Q) x|^2 over tokens; nothing to judge by gives |W - Q|^2. Threads change no bit.

        Args:
            weights: BF16 `[R, K]`, W.
            values: BF16 `[R, K]`, Q.
        """
        found = output_error(weights, values, self.own, self.shares) if self.tokens else 0.0
        if not self.blended:
            return found
        share = self.tokens / (self.tokens + LEAST_HELD_OUT)
        if self.others is not None:
            beside = output_error(weights, values, self.others, _shares(None, self.others))
        elif self.belief is not None:
            beside = _believed_error(weights, values, self.belief.hessian)
        elif self.tokens:
            return found
        else:
            return _squared_error(weights, values)
        return share * found + (1 - share) * beside


def judge_of(evidence: Evidence, belief: Belief | None) -> Judge:
    """Return who judges matrices of an input.

    Args:
        evidence: with the tokens that were held out.
        belief: what judges beside few of them where the layer's tokens cannot: no other expert has the same input, or
            own tokens agree with the layer's less than half.
    """
    rows = even_sample(len(evidence.held), HELD)
    own = evidence.held[rows]
    shares = _shares(evidence.held_weights[rows], own)
    if len(own) >= LEAST_HELD_OUT:
        return Judge(own, shares, None, None)
    prior = evidence.prior
    alike = belief is None or belief.agreement is None or belief.agreement >= _ALIKE or not evidence.tokens
    if prior is not None and len(prior.held) and alike:
        return Judge(own, shares, prior.held[even_sample(len(prior.held), HELD)], None)
    return Judge(own, shares, None, belief)


def _believed_error(weights: Tensor, values: Tensor, hessian: Tensor) -> float:
    """Return tr(D H D^T) for what was lost, by a sample of the rows."""
    rows = even_sample(len(weights), _ROWS)
    lost = weights[rows].float() - values[rows].float()
    with single_threaded():
        return float((lost @ hessian).mul_(lost).sum(dtype=torch.float64)) * len(weights) / len(rows)


def _squared_error(weights: Tensor, values: Tensor) -> float:
    with single_threaded():
        return float((weights.float() - values.float()).square_().sum(dtype=torch.float64))


def _shares(weights: Tensor | None, inputs: Tensor) -> Tensor:
    """Return weights that add up to 1; equal ones for tokens that count alike, or nothing."""
    total = 0.0 if weights is None else float(weights.sum(dtype=torch.float64))
    if weights is None or not total > 0:
        return torch.full((len(inputs),), 1 / max(len(inputs), 1), device=inputs.device)
    return weights / total
