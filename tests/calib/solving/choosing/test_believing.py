"""What is believed of an input, and who judges: own tokens, drawn to the layer's as far as these agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from k2quant.calib.solving.deciding.drawing import agreed, believed
from k2quant.calib.solving.deciding.judging import judge_of
from k2quant.calib.solving.evidence import Evidence, Prior
from k2quant.kernels.solvers.errors import output_error

Plant = Callable[..., Any]
Weights = Callable[..., Tensor]


@pytest.mark.parametrize(("kind", "least", "most"), [("alike", 0.5, 1), ("strange", 0, 0.15), ("independent", 0, 0.1)])
def test_agreement_is_known_after_some_tokens(plant: Plant, kind: str, least: float, most: float) -> None:
    """Sixty-four tokens of 128 columns tell an expert that sees what its layer does from one that does not."""
    for seed in range(3):
        belief = believed(plant(kind, 64, layer=True, seed=seed).evidence)
        assert belief is not None
        assert belief.agreement is not None
        assert least <= belief.agreement <= most


def test_agreement_of_a_hessian_with_itself_and_with_its_opposite() -> None:
    """The slope is 1 where correlations are equal, half where they are half, never negative; size does not count."""
    one = torch.tensor([[2.0, 1.0, 0.0], [1.0, 8.0, 0.0], [0.0, 0.0, 0.0]])
    half, opposite = one.clone(), one.clone()
    half[0, 1] = half[1, 0] = 0.5
    opposite[0, 1] = opposite[1, 0] = -1
    assert agreed(one, 9 * one, one.diagonal()) == pytest.approx(1)
    assert agreed(half, one, one.diagonal()) == pytest.approx(0.5)
    assert agreed(opposite, one, one.diagonal()) == 0
    assert agreed(one, torch.eye(3), one.diagonal()) == 0


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), tokens=st.integers(0, 40), rank=st.integers(1, 32), alike=st.booleans())
def test_what_is_believed_is_positive_semidefinite(seed: int, tokens: int, rank: int, alike: bool) -> None:  # noqa: FBT001
    """Whatever came, and of whatever rank: no eigenvalue and no square is negative, and no mean exceeds its root."""
    dice = torch.Generator().manual_seed(seed)
    basis = torch.randn(rank, 32, generator=dice) * torch.rand(32, generator=dice)
    wide = torch.randn(50, rank, generator=dice) @ basis
    own = torch.randn(tokens, rank, generator=dice) @ (basis if alike else basis.flip(1))
    prior = Prior(hessian=wide.T @ wide / 50, mean=wide.mean(0), tokens=50, held=wide[:0].bfloat16())
    evidence = Evidence(
        hessian=own.T @ own / max(tokens, 1),
        mean=own.sum(0) / max(tokens, 1),
        weight=float(tokens),
        tokens=tokens,
        prior=prior,
        held=own[:0].bfloat16(),
        held_weights=torch.ones(0),
    )
    belief = believed(evidence)
    assert belief is not None
    values = torch.linalg.eigvalsh(belief.hessian.double())
    assert values.min() >= -1e-5 * values.max()
    assert (belief.square >= 0).all()
    assert (belief.mean**2 <= belief.square * 1.0001 + 1e-6).all()


def test_own_tokens_count_for_themselves_in_the_end(plant: Plant) -> None:
    """With sixty tokens a column, a sixtieth of what is believed is the prior's."""
    evidence = plant("strange", 60 * 128, layer=True).evidence
    belief = believed(evidence)
    assert belief is not None
    off = (belief.hessian - evidence.hessian * (60 / 61)).fill_diagonal_(0)
    assert off.norm() < 0.01 * evidence.hessian.norm()


def test_an_input_of_its_own_keeps_its_squares(plant: Plant) -> None:
    """Without a layer products are drawn to nothing, as many tokens as columns to the half; squares to their mean."""
    evidence = plant("uneven", 128, layer=False).evidence
    belief = believed(evidence)
    assert belief is not None
    own = evidence.hessian.diagonal()
    square = (128 * own + 32 * own.mean()) / 160
    torch.testing.assert_close(belief.square, square)
    expected = evidence.hessian / 2
    expected.diagonal().copy_((own + square) / 2)
    torch.testing.assert_close(belief.hessian, expected)
    torch.testing.assert_close(belief.mean, evidence.mean * 0.8)
    assert belief.agreement is None


def test_without_tokens_the_layer_is_tempered(plant: Plant) -> None:
    """Squares are the geometric mean of the layer's and of equal ones, means are moved along, products are nothing."""
    evidence = plant("strange", 0, layer=True).evidence
    belief = believed(evidence)
    assert belief is not None
    layer = evidence.prior.hessian.diagonal()
    torch.testing.assert_close(belief.square / belief.square.mean(), layer.sqrt() / layer.sqrt().mean())
    torch.testing.assert_close(belief.square.mean(), layer.mean())
    torch.testing.assert_close(belief.mean / belief.square.sqrt(), evidence.prior.mean / layer.sqrt())
    torch.testing.assert_close(belief.hessian, belief.square.diag())


def test_nothing_is_believed_of_nothing(plant: Plant) -> None:
    """No token, of the layer neither; or tokens that are always 0."""
    evidence = plant("alike", 0, layer=True).evidence
    empty = replace(evidence.prior, tokens=0, hessian=torch.zeros(128, 128))
    assert believed(replace(evidence, prior=None)) is None
    assert believed(replace(evidence, prior=empty)) is None
    assert believed(replace(evidence, prior=None, tokens=5)) is None


def test_some_tokens_judge_for_many(plant: Plant) -> None:
    """Of a thousand held-out tokens 256 judge, evenly spaced, by their shares of the weight; a report says so."""
    evidence = plant("uneven", 8000, layer=False).evidence
    counts = torch.arange(1000).float()
    judge = judge_of(replace(evidence, held_weights=counts), None)
    rows = torch.arange(256) * 1000 // 256
    assert torch.equal(judge.own, evidence.held[rows])
    torch.testing.assert_close(judge.shares, counts[rows] / counts[rows].sum())
    assert (judge.tokens, judge.measure) == (256, "validation")


@pytest.mark.parametrize("weight", [1.0, 0.0])
def test_few_tokens_judge_beside_the_layers(plant: Plant, gaussian: Weights, weight: float) -> None:
    """Of 16 own tokens each counts as one of 80, the layer's together as 64, as long as the two agree."""
    evidence, weights = plant("alike", 128, layer=True).evidence, gaussian(1)
    belief = believed(evidence)
    judge = judge_of(replace(evidence, held_weights=torch.full((16,), weight)), belief)
    assert judge.measure == "validation, blended"
    values = weights * 1.01
    own = output_error(weights, values, evidence.held, torch.full((16,), 1 / 16))
    wide = output_error(weights, values, evidence.prior.held, torch.full((100,), 1 / 100))
    assert judge.error(weights, values) == pytest.approx((16 * own + 64 * wide) / 80)


@pytest.mark.parametrize("layer", [True, False], ids=["strange", "no layer"])
def test_few_tokens_judge_beside_what_is_believed(plant: Plant, gaussian: Weights, layer: bool) -> None:  # noqa: FBT001
    """Where the layer's tokens are of another kind, or there are none, the believed Hessian takes their place."""
    evidence, weights = plant("strange", 128, layer=layer).evidence, gaussian(2, rows=512)
    belief = believed(evidence)
    assert belief is not None
    values = weights * 1.01
    lost = (weights.float() - values.float())[torch.arange(256) * 2]
    own = output_error(weights, values, evidence.held, torch.full((16,), 1 / 16))
    wide = 2 * float(((lost @ belief.hessian) * lost).sum())
    assert judge_of(evidence, belief).error(weights, values) == pytest.approx((16 * own + 64 * wide) / 80)
