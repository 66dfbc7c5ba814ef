"""How much a column of a matrix matters: its own tokens' E[x^2], drawn to a prior where they are few.

    (n E + n_0 P) / (n + n_0)

with n the tokens that reached the matrix, E their mean square by column, and P the prior, as if n_0 tokens had been
seen that look like it. Both are means per token, so they are of one size.

For the gate and up of a routed expert the prior is the mean square over all tokens of the layer: the columns are the
same hidden channels for every expert, and a channel that is large is so nearly everywhere. For `down_proj` there is
none such: column j of one expert's intermediate is another thing than column j of another's, so the prior says only
that all columns are alike: flat, at the expert's own mean. Of an expert that no token reached even that is unknown: the
layer's for gate and up, ones for down, which is plain squared error. Matrices that every token passes need no prior.
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
    """`[K]`: what the squared error of each column counts for."""
    tokens: int
    """Validation tokens that reached the matrix."""
    blended: bool
    """Whether they were too few to be measured alone, so that `values` is drawn to the prior."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)


def blended(own: Moments, prior: F32 | None) -> F32:
    """Return a routed expert's mean squares, drawn to the layer's or, without one, to their own mean.

    Args:
        own: of the expert.
        prior: of the layer, `[K]`; None for `down_proj`.

    Returns:
        float32 `[K]`, computed in float64.
    """
    import numpy as np

    mine = own.mean_square.astype(np.float64)
    flat = mine.mean() if own.tokens else 1.0
    towards = np.full_like(mine, flat) if prior is None else prior.astype(np.float64)
    mixed = (own.tokens * mine + PRIOR_TOKENS * towards) / (own.tokens + PRIOR_TOKENS)
    return mixed.astype(np.float32)


def held_out(own: Moments, prior: F32 | None, *, routed: bool) -> HeldOut:
    """Return what a matrix is judged by.

    Args:
        own: moments of the validation part.
        prior: the layer's, over the same part, `[K]`; None for what has none.
        routed: whether the matrix is a routed expert's. Others have no prior, and are blended with nothing.
    """
    few = own.tokens < LEAST_HELD_OUT
    values = blended(own, prior) if few and routed else own.mean_square
    return HeldOut(values, own.tokens, few)
