"""How much the columns of a matrix matter: its own tokens' moments, drawn to a prior where they are few.

An error e of one row (the weights less what their codes stand for) costs E[(e x)^2] at the output. Where the columns
fluctuate independently that is sum_j var_j e_j^2 + (sum_j mu_j e_j)^2, with mu_j = E[x_j], var_j = E[x_j^2] - mu_j^2:
so a mean square and a mean are kept for each column. Both are blended alike:

    (n E + n_0 P) / (n + n_0)

with n the tokens that reached the matrix, E their mean, and P the prior, as if n_0 tokens had been seen that look like
it. Such a blend is the moment of a mixture, so its variance is never negative.

For the gate and up of a routed expert the prior is that of all tokens of the layer: the columns are the same hidden
channels for every expert, and a channel that is large is so nearly everywhere. For `down_proj` there is none such:
column j of one expert's intermediate is another thing than column j of another's, so the prior says only that all
columns are alike: flat, at the mean of the expert's own mean squares, and its mean is 0. Of an expert that no token
reached even that is unknown: the layer's for gate and up; ones for down, which is plain squared error. Matrices that
every token passes need no prior.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from k2quant.calib.stats.moments import Moments
from k2quant.ground.saying.showing import brief

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    F32 = NDArray[np.float32]

PRIOR_TOKENS = 32
"""n_0 for second moments of columns. A diagonal needs few tokens: weighted by the E[x^2] of 8 tokens a search of scales
leaves 0.74 of rounding's error, of 32 tokens 0.72, of 2,048 tokens 0.71 (measured on synthetic inputs, K = 512);
llama.cpp's proposed prior is one token (#15060). A Hessian needs about K."""

LEAST_HELD_OUT = 64
"""Held-out tokens below which a matrix's own are called not measurable, and it is judged on the blend."""


class HeldOut(NamedTuple):
    """What a rounding of one matrix is judged by: the validation part alone, which decided nothing."""

    values: F32
    """`[K]`: mean squares."""
    mean: F32
    """`[K]`: means."""
    tokens: int
    """Validation tokens that reached the matrix."""
    blended: bool
    """Whether they were too few to be measured alone, so that values and mean are drawn to the prior."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)


def importance(own: Moments, prior: Moments | None) -> F32:
    """Return a routed expert's mean squares, drawn to the layer's or, without one, to their own mean.

    Args:
        own: of the expert.
        prior: of the layer; None for `down_proj`.

    Returns:
        float32 `[K]`, computed in float64.
    """
    flat = own.mean_square.mean(dtype="float64") if own.tokens else 1.0
    return _blended(own.mean_square, flat if prior is None else prior.mean_square, own.tokens)


def mean(own: Moments, prior: Moments | None) -> F32:
    """Return a routed expert's means, drawn to the layer's or, without one, to 0.

    Args:
        own: of the expert.
        prior: of the layer; None for `down_proj`.

    Returns:
        float32 `[K]`, computed in float64.
    """
    return _blended(own.mean, 0.0 if prior is None else prior.mean, own.tokens)


def held_out(own: Moments, prior: Moments | None, *, routed: bool) -> HeldOut:
    """Return what a matrix is judged by.

    Args:
        own: moments of the validation part.
        prior: the layer's, over the same part; None for what has none.
        routed: whether the matrix is a routed expert's. Others have no prior, and are blended with nothing.
    """
    few = own.tokens < LEAST_HELD_OUT
    if few and routed:
        return HeldOut(importance(own, prior), mean(own, prior), own.tokens, few)
    return HeldOut(own.mean_square, own.mean, own.tokens, few)


def _blended(own: F32, prior: F32 | float, tokens: int) -> F32:
    import numpy as np

    towards = np.asarray(prior, np.float64)
    mixed = (tokens * own.astype(np.float64) + PRIOR_TOKENS * towards) / (tokens + PRIOR_TOKENS)
    return mixed.astype(np.float32)
