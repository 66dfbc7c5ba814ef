"""Sums over tokens of one input: moments of its columns, and of pairs of columns where Hessians are asked for.

Products of a block of tokens are float32, and blocks are cut in the same places whatever memory there is; they are
added in float64, Hessians in float32, in the order of the tokens. So a run gives the same bits each time on a machine.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from k2quant.calib.stats.writing import Measured
from k2quant.kernels.solvers.gram import add_gram

_STRIPE = 1024
"""Rows of a Hessian that are mirrored at once."""


class Moments:
    """What is summed of one input over one part of the data, for one matrix or a row of them, one for each expert."""

    def __init__(self, width: int, experts: int | None, device: torch.device) -> None:
        """Begin with nothing.

        Args:
            width: columns, K.
            experts: how many rows; None for one input without rows.
            device: where it is summed.
        """
        lead = () if experts is None else (experts,)
        self.square = torch.zeros(*lead, width, dtype=torch.float64, device=device)
        """Sum w x^2, `[K]` or `[E, K]`."""
        self.sum = torch.zeros_like(self.square)
        """Sum w x."""
        self.weight = torch.zeros(lead, dtype=torch.float64, device=device)
        """Sum w."""
        self.tokens = torch.zeros(lead, dtype=torch.int64)
        self.largest = torch.zeros(lead, device=device)
        """max |x|."""

    def add(self, x: Tensor, weights: Tensor | None = None, *, expert: int | None = None) -> None:
        """Add some tokens.

        Args:
            x: `[M, K]`, at most `memory.BLOCK` rows.
            weights: float32 `[M]`, w of each token; None: each counts 1.
            expert: whose row they are for.
        """
        if not len(x):
            return
        at: Any = ... if expert is None else expert
        values = x.to(torch.float32, copy=True)
        weights = torch.ones(len(x), device=x.device) if weights is None else weights
        self.largest[at] = torch.maximum(self.largest[at], values.abs().amax())
        self.sum[at] += (weights @ values).double()
        self.square[at] += (weights @ values.square_()).double()
        self.weight[at] += weights.double().sum()
        self.tokens[at] += len(x)

    def measured(self) -> Measured:
        """Return the means, as statistics are written; zeros where no token came."""
        weight = self.weight.clamp(min=torch.finfo(torch.float64).tiny).unsqueeze(-1)
        return Measured(
            mean_square=(self.square / weight).float().cpu().numpy(),
            weight=self.weight.cpu().numpy(),
            tokens=self.tokens.numpy(),
            largest=self.largest.cpu().numpy(),
            mean=(self.sum / weight).float().cpu().numpy(),
        )


class Hessian:
    """Sum w x x^T of one input, float32 `[K, K]`, its lower triangle only until it is asked for."""

    def __init__(self, width: int, device: torch.device) -> None:
        """Begin with zeros."""
        self._sum = torch.zeros(width, width, device=device)

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Add some tokens; see `Moments.add`."""
        values = x.to(torch.float32, copy=True)
        if weights is not None:
            values *= weights.sqrt()[:, None]
        add_gram(self._sum, values)

    def mean(self, weight: float) -> Any:
        """Return sum w x x^T / sum w as a symmetric array; the sum is gone afterwards.

        Args:
            weight: sum w; 0 gives zeros.
        """
        whole = self._sum
        if weight:
            whole /= weight
        for start in range(0, len(whole), _STRIPE):
            stop = start + _STRIPE
            own = whole[start:stop, start:stop]
            own.copy_(own.tril() + own.tril(-1).T)
            whole[start:stop, stop:] = whole[stop:, start:stop].T
        return whole.cpu().numpy()
