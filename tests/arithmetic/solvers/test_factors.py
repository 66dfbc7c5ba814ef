"""The factor of a Hessian: what it is, and when there is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from k2quant.errors import UsageError
from k2quant.kernels.solvers import factors
from k2quant.kernels.solvers.factors import factorise

Problem = Callable[..., tuple[Tensor, Tensor]]


def test_its_square_is_the_damped_hessian_in_order(problem: Problem) -> None:
    """M M^T is H with rows and columns by falling diagonal and a tenth of the mean on it; panels are cut anywhere."""
    for columns in (32, 256, 544):
        _, inputs = problem(rows=1, columns=columns, tokens=columns)
        hessian = inputs.T @ inputs
        found = factorise(hessian)
        assert found is not None
        diagonal = hessian.diagonal()[found.order]
        assert (diagonal[:-1] >= diagonal[1:]).all()
        damped = (hessian + 0.1 * hessian.diagonal().mean() * torch.eye(columns))[found.order][:, found.order].double()
        assert torch.equal(found.upper, found.upper.triu())
        assert (found.upper.double() @ found.upper.double().T - damped).abs().max() < 1e-5 * damped.abs().max()


def test_the_textbooks_factor_of_the_inverse_is_its_inverse(problem: Problem) -> None:
    """U, the upper Cholesky factor of H^-1, is M^-1 to 1e-5, and J L^-1 J with L the lower one of J H J."""
    _, inputs = problem(rows=1, columns=96, tokens=400)
    hessian = inputs.T @ inputs / 400
    found = factorise(hessian)
    assert found is not None
    damped = (hessian + 0.1 * hessian.diagonal().mean() * torch.eye(96))[found.order][:, found.order].double()
    textbook = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    lower = torch.linalg.cholesky(damped.flip(0, 1))
    size = textbook.abs().max()
    assert (torch.linalg.inv(lower).flip(0, 1) - textbook).abs().max() < 1e-10 * size
    assert (torch.linalg.inv(found.upper.double()) - textbook).abs().max() < 1e-5 * size


def test_equal_columns_keep_their_order() -> None:
    """Of columns with the same diagonal the lower index comes first."""
    found = factorise(torch.eye(64))
    assert found is not None
    assert found.order.tolist() == list(range(64))


def test_the_scale_of_a_hessian_is_of_no_matter(problem: Problem) -> None:
    """A sum over tokens and their mean give the same factor, but for a power of two."""
    _, inputs = problem(rows=1)
    hessian = inputs.T @ inputs
    whole, mean = factorise(hessian), factorise(hessian * 2.0**-10)
    assert whole is not None
    assert mean is not None
    assert torch.equal(whole.upper * 2.0**-5, mean.upper)


def test_there_is_none_of_what_is_not_positive_definite(problem: Problem) -> None:
    """Zeros, an indefinite matrix, NaN or infinity anywhere give None, with any damping; nothing is raised."""
    _, inputs = problem(rows=1, columns=320)
    hessian = inputs.T @ inputs
    assert factorise(torch.zeros(64, 64)) is None
    assert factorise(-torch.eye(64)) is None
    indefinite = torch.eye(64)
    indefinite[0, 1] = indefinite[1, 0] = 2
    assert factorise(indefinite) is None
    for bad in (torch.nan, torch.inf):
        for row, column in ((0, 0), (319, 0), (200, 199), (319, 319)):
            broken = hessian.clone()
            broken[row, column] = broken[column, row] = bad
            assert factorise(broken) is None
    assert factorise(torch.full((64, 64), 1e38), damping=1e10) is None


def test_damping_makes_a_singular_hessian_fit(problem: Problem) -> None:
    """One token, or columns without any input, are enough; without damping there is no factor."""
    _, inputs = problem(rows=1, tokens=1)
    inputs[:, ::3] = 0
    hessian = inputs.T @ inputs
    assert factorise(hessian) is not None
    assert factorise(hessian, damping=0) is None


@pytest.mark.parametrize("damping", [-0.1, float("nan"), float("inf")])
def test_a_damping_that_is_no_share_is_refused(damping: float) -> None:
    """Negative, infinite or no number."""
    with pytest.raises(UsageError, match="`damping`"):
        factorise(torch.eye(32), damping=damping)


def test_a_factor_is_shown_in_a_line() -> None:
    """Not as all its numbers."""
    shown = repr(factorise(torch.eye(64)))
    assert shown.startswith("Factor(")
    assert "\n" not in shown


def test_panels_are_as_documented() -> None:
    """The tests above have a matrix of less than a panel, of one, and of more."""
    assert factors.PANEL == 256
