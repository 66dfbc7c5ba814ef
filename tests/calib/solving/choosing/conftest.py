"""Inputs that are planted, whose true distribution is known, and what a pass would have seen of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from k2quant.calib.solving.evidence import Evidence, Prior

WIDTH, ROWS = 128, 256
_LAYER_TOKENS, _LAYER_HELD = 1500, 100

Plant = Callable[..., "Planted"]


class Planted(NamedTuple):
    """An expert's input as it is, and as it was seen."""

    covariance: Tensor
    """float64 `[K, K]`: E[x x^T]."""
    evidence: Evidence

    def error(self, weights: Tensor, values: Tensor) -> float:
        """Return E|(W - Q) x|^2."""
        lost = weights.double() - values.double()
        return float(((lost @ self.covariance) * lost).sum())


def correlated(dice: torch.Generator) -> Tensor:
    """Return a covariance with the spectrum 1/i, float64 `[K, K]`."""
    basis, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=dice, dtype=torch.float64))
    found: Tensor = (basis / torch.arange(1, WIDTH + 1)) @ basis.T
    return found / found.diagonal().mean()


def outliers(dice: torch.Generator) -> Tensor:
    """Return factors of channels, float64 `[K]`: four of them are six times larger."""
    factors = torch.ones(WIDTH, dtype=torch.float64)
    factors[torch.randperm(WIDTH, generator=dice)[:4]] = 6
    return factors


def stretched(covariance: Tensor, factors: Tensor) -> Tensor:
    """Return the covariance of channels that were multiplied."""
    return covariance * factors * factors[:, None]


def _alike(dice: torch.Generator) -> tuple[Tensor, Tensor]:
    common, factors = correlated(dice), outliers(dice)
    own = stretched((common + correlated(dice)) / 2, factors)
    others = [stretched((common + correlated(dice)) / 2, factors) for _ in range(6)]
    return own, torch.stack(others).mean(0)


def _strange(dice: torch.Generator) -> tuple[Tensor, Tensor]:
    return stretched(correlated(dice), outliers(dice)), stretched(correlated(dice), outliers(dice))


def _independent(dice: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.eye(WIDTH, dtype=torch.float64), stretched(correlated(dice), outliers(dice))


def _uneven(dice: torch.Generator) -> tuple[Tensor, Tensor]:
    factors = torch.randn(WIDTH, generator=dice, dtype=torch.float64).exp()
    return stretched(correlated(dice), factors), stretched(correlated(dice), outliers(dice))


POPULATIONS = {"alike": _alike, "strange": _strange, "independent": _independent, "uneven": _uneven}
"""How an expert's inputs and its layer's come about: half of the covariance and the outliers shared, as in the check of
docs; nothing shared; no structure at all; channels of very different size. Each gives the two covariances."""


def drawn(root: Tensor, count: int, dice: torch.Generator) -> Tensor:
    """Return tokens of a covariance L L^T, BF16 `[n, K]`."""
    return (torch.randn(count, WIDTH, generator=dice, dtype=torch.float64) @ root.T).bfloat16()


@cache
def surroundings(kind: str, seed: int) -> tuple[Tensor, Tensor, Prior]:
    """Return an expert's covariance, its root L, and what its layer was seen to be."""
    dice = torch.Generator().manual_seed(seed)
    own, wide = POPULATIONS[kind](dice)
    small = 1e-9 * torch.eye(WIDTH, dtype=torch.float64)
    every = drawn(torch.linalg.cholesky(wide + small), _LAYER_TOKENS + _LAYER_HELD, dice)
    train, held = every[_LAYER_HELD:].float(), every[:_LAYER_HELD]
    prior = Prior(hessian=train.T @ train / len(train), mean=train.mean(0), tokens=len(train), held=held)
    return own, torch.linalg.cholesky(own + small), prior


def seen(train: Tensor, held: Tensor, prior: Prior | None = None) -> Evidence:
    """Return what tokens say that count alike, BF16 `[n, K]` each."""
    wide, count = train.float(), len(train)
    return Evidence(
        hessian=wide.T @ wide / max(count, 1),
        mean=wide.sum(0) / max(count, 1),
        weight=float(count),
        tokens=count,
        prior=prior,
        held=held,
        held_weights=torch.ones(len(held)),
    )


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices are so small that waking other threads takes longer than all the rest."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def plant() -> Plant:
    """Plant an expert: a population, a number of tokens (an eighth as many are held out), with or without a layer."""

    def make(kind: str, tokens: int, *, layer: bool, seed: int = 0) -> Planted:
        own, root, prior = surroundings(kind, seed)
        dice = torch.Generator().manual_seed(1000 * seed + tokens)
        train, held = drawn(root, tokens, dice), drawn(root, tokens // 8, dice)
        return Planted(own, seen(train, held, prior if layer else None))

    return make


@pytest.fixture(scope="session")
def gaussian() -> Callable[..., Tensor]:
    """Make Gaussian weights of a seed, BF16 `[R, K]`."""

    def make(seed: int, rows: int = ROWS) -> Tensor:
        dice = torch.Generator().manual_seed(seed)
        return (torch.randn(rows, WIDTH, generator=dice) * 0.02).bfloat16()

    return make


@pytest.fixture(scope="session", name="seen")
def seen_by_a_pass() -> Callable[..., Evidence]:
    """Sum what tokens say, as `seen` does."""
    return seen
