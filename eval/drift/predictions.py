"""What two models predict for each token of a text: how far apart, and how well."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from k2quant.eval.drift.batches import Measured
from k2quant.eval.drift.findings import Fidelity, LayerFidelity
from k2quant.eval.gating.verdict import Side
from k2quant.model.passes.divergence import clustered, kl, nll, percentile, same_top
from k2quant.model.passes.texts import Text


def scores(ids: Tensor, scored: Tensor, base: Tensor, candidate: Tensor) -> Tensor:
    """Return the figures of a batch's predicted tokens, as `Measured.scores` has them, on the CPU.

    Args:
        ids: its tokens, int64 `[B, T]`.
        scored: which count, bool `[B, T - 1]`.
        base: the baseline's logits `[B, T, V]`.
        candidate: the candidate's.
    """
    wanted, scored = ids[:, 1:][scored].to(base.device), scored.to(base.device)
    base, candidate = base[:, :-1][scored], candidate[:, :-1][scored]
    figures = (
        kl(base, candidate),
        kl(candidate, base),
        nll(base, wanted),
        nll(candidate, wanted),
        same_top(base, candidate).double(),
    )
    return torch.stack(figures).cpu()


def fidelity(
    found: Sequence[Measured],
    text: Text,
    sides: tuple[Side, Side],
    layers: tuple[LayerFidelity, ...],
    backend: str,
) -> Fidelity:
    """Sum up what was found of all batches of a text, in order."""
    divergence, reverse, base, candidate, same = (
        torch.cat([one.scores[row] for one in found]) for row in range(len(found[0].scores))
    )
    chunks = _chunks(text)
    return Fidelity(
        base=sides[0],
        candidate=sides[1],
        text=text.name,
        text_hash=text.hash,
        tokens=len(divergence),
        chunks=text.chunks,
        kl=clustered(divergence, chunks),
        kl_median=percentile(divergence, 0.5),
        kl_99=percentile(divergence, 0.99),
        kl_max=float(divergence.max()),
        reverse_kl=clustered(reverse, chunks),
        same_top=clustered(same, chunks),
        base_perplexity=_perplexity(base),
        candidate_perplexity=_perplexity(candidate),
        log_ratio=clustered(candidate - base, chunks),
        layers=layers,
        unread=text.unread,
        completions=text.completions,
        backend=backend,
    )


def _chunks(text: Text) -> Tensor:
    """Return for each predicted token the number of its chunk, int64 `[N]`."""
    sizes = torch.cat([scored.sum(1) for scored in text.scored])
    return torch.arange(len(sizes)).repeat_interleave(sizes)


def _perplexity(values: Tensor) -> float:
    return math.exp(min(float(values.mean()), 700.0))  # e**710 is no float any more
