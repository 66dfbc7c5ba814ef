"""What two models predict for each token of a text: how far apart, and how well."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from k2quant.eval.drift.findings import Fidelity, LayerFidelity
from k2quant.eval.gating.verdict import Side
from k2quant.model.passes.divergence import clustered, kl, nll, percentile, same_top
from k2quant.model.passes.texts import Text


class Predictions:
    """The figures of every predicted token, batch after batch; the logits are gone when a batch is done."""

    def __init__(self) -> None:
        self._kl: list[Tensor] = []
        self._reverse: list[Tensor] = []
        self._base: list[Tensor] = []
        self._candidate: list[Tensor] = []
        self._same: list[Tensor] = []
        self._chunks: list[Tensor] = []
        self._count = 0

    def add(self, ids: Tensor, scored: Tensor, base: Tensor, candidate: Tensor) -> None:
        """Take a batch: its tokens `[B, T]`, which count, bool `[B, T - 1]`, and both models' logits `[B, T, V]`."""
        chunks = (torch.arange(len(ids))[:, None].expand(scored.shape) + self._count)[scored]
        wanted, scored = ids[:, 1:][scored].to(base.device), scored.to(base.device)
        base, candidate = base[:, :-1][scored], candidate[:, :-1][scored]
        for figures, values in (
            (self._kl, kl(base, candidate)),
            (self._reverse, kl(candidate, base)),
            (self._base, nll(base, wanted)),
            (self._candidate, nll(candidate, wanted)),
            (self._same, same_top(base, candidate).double()),
            (self._chunks, chunks),
        ):
            figures.append(values.cpu())
        self._count += len(ids)

    def fidelity(
        self, text: Text, sides: tuple[Side, Side], layers: tuple[LayerFidelity, ...], backend: str
    ) -> Fidelity:
        """Sum up."""
        divergence, chunks = torch.cat(self._kl), torch.cat(self._chunks)
        base, candidate = torch.cat(self._base), torch.cat(self._candidate)
        return Fidelity(
            base=sides[0],
            candidate=sides[1],
            text=text.name,
            text_hash=text.hash,
            tokens=len(divergence),
            chunks=self._count,
            kl=clustered(divergence, chunks),
            kl_median=percentile(divergence, 0.5),
            kl_99=percentile(divergence, 0.99),
            kl_max=float(divergence.max()),
            reverse_kl=clustered(torch.cat(self._reverse), chunks),
            same_top=clustered(torch.cat(self._same), chunks),
            base_perplexity=_perplexity(base),
            candidate_perplexity=_perplexity(candidate),
            log_ratio=clustered(candidate - base, chunks),
            layers=layers,
            unread=text.unread,
            completions=text.completions,
            backend=backend,
        )


def _perplexity(values: Tensor) -> float:
    return math.exp(min(float(values.mean()), 700.0))  # e**710 is no float any more
