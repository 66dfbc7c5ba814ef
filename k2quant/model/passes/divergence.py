"""How far two models' predictions of the same tokens lie apart: figures of one token, and their means over a text.

Every sum runs over the whole vocabulary, in float64, from the logits themselves: nothing is cut off or stored in few
bits, as llama.cpp does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from k2quant.errors import UsageError
from k2quant.ground.intervals import Estimate

_ELEMENTS = 2**22
"""Logits that are taken to float64 at once, 32 MB; a batch of K2's has a hundred times as many."""

_STRETCHES = 8
"""Pieces into which a single chunk is cut for its standard error."""


def kl(base_logits: Tensor, candidate_logits: Tensor) -> Tensor:
    """Return the KL divergence of the candidate's predictions from the baseline's, in nats.

    With the arguments swapped it is the reverse KL. Identical logits give exactly 0.

    Args:
        base_logits: `[.., V]`, any float dtype, finite.
        candidate_logits: the same shape, on the same device.

    Returns:
        float64 `[..]`: sum over the vocabulary of p (ln p - ln q).
    """
    shape = base_logits.shape[:-1]
    base, candidate = _rows(base_logits), _rows(candidate_logits)
    parts = []
    for some, other in zip(_slices(base), _slices(candidate), strict=True):
        p, q = _log_probabilities(some), _log_probabilities(other)
        parts.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(parts).reshape(shape)


def nll(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the negative log-likelihood of the tokens that came, in nats.

    Args:
        logits: `[.., V]`, any float dtype: what was predicted.
        tokens: int64 `[..]`, on the same device: what came.

    Returns:
        float64 `[..]`.
    """
    rows, wanted = _rows(logits), tokens.reshape(-1, 1)
    parts = []
    for some, places in zip(_slices(rows), wanted.split(_step(rows)), strict=True):
        parts.append(-_log_probabilities(some).gather(1, places)[:, 0])
    return torch.cat(parts).reshape(tokens.shape)


def same_top(base_logits: Tensor, candidate_logits: Tensor) -> Tensor:
    """Return whether the likeliest token is the same, bool `[..]`, for logits `[.., V]`; the first of equals counts."""
    return base_logits.argmax(-1) == candidate_logits.argmax(-1)


def clustered(values: Tensor, chunks: Tensor) -> Estimate:
    """Return the mean over tokens, with a standard error that takes chunks of the text as independent.

    Tokens of one chunk share their context, so that taking them as independent would promise too much. The mean is a
    ratio, sum over tokens by number of tokens, of chunks of unequal size; its error is that of the ratio estimator. One
    chunk alone is cut into stretches of successive tokens, which is the best that can be had.

    Args:
        values: `[N]`, one figure for each token.
        chunks: int64 `[N]`: the number of the chunk that each token belongs to.

    Raises:
        UsageError: there are fewer than two values, or not a chunk for each.
    """
    if values.ndim != 1 or chunks.shape != values.shape or len(values) < 2:
        raise UsageError(f"values: expected [N] with a chunk for each, N at least 2, found {list(values.shape)}")
    values, place = values.double().cpu(), chunks.cpu().unique(return_inverse=True)[1]
    if not place.any():
        place = torch.arange(len(values)) * min(_STRETCHES, len(values)) // len(values)
    mean = values.mean()
    count = int(place.max()) + 1
    rest = torch.zeros(count, dtype=torch.float64).index_add_(0, place, values - mean)  # a chunk's sum - mean * size
    variance = count / (count - 1) * rest.square().sum() / len(values) ** 2
    return Estimate(value=float(mean), error=float(variance.sqrt()))


def percentile(values: Tensor, share: float) -> float:
    """Return the value below which a share of the values `[N]` lies: linear at share * (N - 1), as in llama.cpp."""
    ordered = values.double().sort().values
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (ordered[high] - ordered[low]) * (place - low))


def _rows(logits: Tensor) -> Tensor:
    return logits.reshape(-1, logits.shape[-1])


def _step(rows: Tensor) -> int:
    return max(_ELEMENTS // rows.shape[1], 1)


def _slices(rows: Tensor) -> tuple[Tensor, ...]:
    return torch.split(rows, _step(rows))


def _log_probabilities(rows: Tensor) -> Tensor:
    return rows.double().log_softmax(-1)
