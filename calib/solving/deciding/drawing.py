"""What is believed of an input: what was seen of it, drawn to a prior where that is little.

    (n S + n_0 P) / (n + n_0)

with n the tokens that came, S what they say, and P the prior, as if n_0 tokens had been seen that look like it. Such a
blend of E[x x^T] is that of a mixture of inputs, so it stays positive semidefinite.

For gate and up of a routed expert P is what all tokens of the layer say. `down_proj` has none such: columns of one
expert are other things than those of another. There products of two columns are drawn to nothing and squares stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from k2quant.calib.solving.evidence import Evidence


class Belief(NamedTuple):
    """What weighs errors."""

    hessian: Tensor
    """float32 `[K, K]`: E[x x^T]."""
    square: Tensor
    """float32 `[K]`: E[x^2], its diagonal."""
    mean: Tensor
    """float32 `[K]`: E[x]."""


def believed(evidence: Evidence) -> Belief | None:
    """Return what is believed of an input; None where nothing was seen, not even of the layer, or not finite."""
    own, prior = evidence.hessian, evidence.prior
    if prior is not None and prior.tokens:
        share = evidence.tokens / (evidence.tokens + len(own))
        hessian = torch.lerp(prior.hessian, own, share)
        mean = torch.lerp(prior.mean, evidence.mean, share)
    elif evidence.tokens:
        share = evidence.tokens / (evidence.tokens + len(own))
        hessian, mean = own * share, evidence.mean
        hessian.diagonal().copy_(own.diagonal())
    else:
        return None
    square = hessian.diagonal().clamp(min=0)
    if not (square.isfinite().all() and mean.isfinite().all() and square.any()):
        return None
    return Belief(hessian, square.contiguous(), mean)
