"""What is believed of an input: what was seen of it, drawn to a prior where that is little.

    (n S + n_0 P) / (n + n_0)

with n the tokens that came, S the mean that they give and P the prior, as if n_0 tokens had been seen that look like
it. Means and squares of single columns need few tokens, products of two columns about as many as there are columns.

Squares of columns: for gate and up of a routed expert, whose columns are the same hidden channels for all experts, P is
the geometric mean of the layer's squares and of equal ones, with the layer's mean. An expert may see other channels
large than its layer does. Of planted experts that do, one with no token is then searched at 0.88 to 0.99 of rounding's
error, where the layer's own squares leave 0.97 to 1.18; where expert and layer are alike 0.73 and not 0.62 is left, and
on a nano-K2 both leave 0.84. Means are the layer's, at the squares that P has. `down_proj` has equal squares and no
mean: no other expert has the same columns. n_0 is that of `stats.blending`.

Products are drawn to r sqrt(P_ii P_jj), with the squares just blended on the diagonal and r the layer's correlation of
the two columns, taken down by how far the expert's own tokens agree: the slope of their correlations on the layer's,
over all pairs of columns, between 0 and 1; n_0 is K. It is known after a few tokens, for it is one number out of
K (K - 1) / 2 pairs. An expert that sees what the layer sees gets nearly all of the layer's; one that sees something
else gets none of it, and is solved as if columns were independent of each other: then every column is rounded by
itself. So is `down_proj`, until own tokens say more.

Both terms are mean products of some inputs, or of independent columns, so what is believed is positive semidefinite.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from k2quant.calib.stats.blending import PRIOR_TOKENS

if TYPE_CHECKING:
    from torch import Tensor

    from k2quant.calib.solving.evidence import Evidence, Prior

_ROWS = 512  # of a Hessian that are looked at at a time


class Belief(NamedTuple):
    """What weighs errors."""

    hessian: Tensor
    """float32 `[K, K]`: E[x x^T]."""
    square: Tensor
    """float32 `[K]`: E[x^2], for a search of scales."""
    mean: Tensor
    """float32 `[K]`: E[x], likewise."""
    agreement: float | None
    """How far own tokens agree with the layer's, from 0 to 1; None where there is no layer to agree with."""


def believed(evidence: Evidence) -> Belief | None:
    """Return what is believed of an input; None where nothing is known, not even of the layer, or no finite number.

    It takes one more Hessian of memory, and reads those of the evidence without changing them.
    """
    prior = evidence.prior if evidence.prior is not None and evidence.prior.tokens else None
    if not (evidence.tokens or prior):
        return None
    own = evidence.hessian
    towards, shift = _before_any(own, prior)
    square = _drawn(own.diagonal(), towards, evidence.tokens)
    mean = _drawn(evidence.mean, shift, evidence.tokens)
    if not (square.isfinite().all() and mean.isfinite().all() and (square >= 0).all() and square.any()):
        return None
    share = evidence.tokens / (evidence.tokens + len(own))
    agreement = None
    hessian = own * share
    if prior is not None:
        agreement = agreed(own, prior.hessian, square) if evidence.tokens else 0.0
        _add_layer(hessian, prior.hessian, square, agreement * (1 - share))
    hessian.diagonal().copy_(own.diagonal() * share + square * (1 - share))
    return Belief(hessian, square, mean, agreement)


def agreed(own: Tensor, layer: Tensor, square: Tensor) -> float:
    """Return the slope of own correlations on the layer's, over all pairs of columns; at least 0 and at most 1.

    Args:
        own: float32 `[K, K]`, mean products of own tokens.
        layer: float32 `[K, K]`, the same of the layer's.
        square: float32 `[K]`, what own products are divided by the roots of: own squares, or what is believed of them.
    """
    mine, theirs = _inverse_root(square), _inverse_root(layer.diagonal())
    both = alone = 0.0
    for start in range(0, len(own), _ROWS):
        stop = start + _ROWS
        other = layer[start:stop] * theirs[start:stop, None] * theirs
        other.diagonal(start).zero_()
        correlated = own[start:stop] * mine[start:stop, None] * mine
        both += float((correlated * other).sum(dtype=torch.float64))
        alone += float(other.square_().sum(dtype=torch.float64))
    slope = both / alone if alone > 0 else 0.0
    return min(max(slope, 0.0), 1.0) if math.isfinite(slope) else 0.0


def _add_layer(hessian: Tensor, layer: Tensor, square: Tensor, share: float) -> None:
    """Add a share of the layer's correlations at other squares, in place; the diagonal is left to the caller."""
    if not share:
        return
    factor = square.sqrt() * _inverse_root(layer.diagonal())
    for start in range(0, len(hessian), _ROWS):
        stop = start + _ROWS
        hessian[start:stop] += layer[start:stop] * (factor[start:stop, None] * share) * factor


def _before_any(own: Tensor, prior: Prior | None) -> tuple[Tensor, Tensor]:
    """Return squares and means, float32 `[K]` each, that are believed before a token came."""
    if prior is None:
        flat = own.diagonal().mean(dtype=torch.float64).float().expand(len(own))
        return flat, torch.zeros_like(flat)
    layer = prior.hessian.diagonal()
    root = layer.clamp(min=0).sqrt()
    square = root * (layer.mean() / root.mean().clamp(min=torch.finfo(torch.float32).tiny))
    return square, prior.mean * square.sqrt() * _inverse_root(layer)


def _drawn(own: Tensor, prior: Tensor, tokens: int) -> Tensor:
    mixed = (tokens * own.double() + PRIOR_TOKENS * prior.double()) / (tokens + PRIOR_TOKENS)
    return mixed.float()


def _inverse_root(square: Tensor) -> Tensor:
    """Return 1/sqrt, and 0 for columns that are never anything but 0."""
    return torch.where(square > 0, square.rsqrt(), 0.0)
