"""GPTQ: three ways to the same bits, and what these bits are worth."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from k2quant.errors import UsageError
from k2quant.kernels.codecs.reference import bf16_to_int4_at, int4_at_scale, plain_int4_scale, unpack_int4
from k2quant.kernels.codecs.values import ValueAt
from k2quant.kernels.solvers import gptq, reference
from k2quant.kernels.solvers.factors import Factor, factorise

Problem = Callable[..., tuple[Tensor, Tensor]]
Threads = Callable[[int], AbstractContextManager[None]]

LARGEST = {4: 7, 3: 3, 2: 1}


def factor(hessian: Tensor, damping: float = 0.1) -> Factor:
    """Return the factor, which there must be."""
    found = factorise(hessian, damping=damping)
    assert found is not None
    return found


def known(problem: Problem, **sizes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights, plain scales, and the Hessian of their inputs."""
    weights, inputs = problem(**sizes)
    return weights, plain_int4_scale(weights, "moonshot"), inputs.T @ inputs / len(inputs)


def cost(weights: Tensor, values: Tensor, hessian: Tensor) -> Tensor:
    """Return (w - q) H (w - q)^T of each row, in float64."""
    difference = weights.double() - values.double()
    return ((difference @ hessian.double()) * difference).sum(1)


def same(first: reference.Solved, second: reference.Solved) -> bool:
    """Tell whether values, codes and counts are equal, to the bit."""
    equal = torch.equal(first.values.view(torch.int16), second.values.view(torch.int16))
    return equal and torch.equal(first.codes, second.codes) and first.saturated == second.saturated


@given(
    rows=st.integers(1, 70),
    groups=st.integers(1, 6),
    tokens=st.integers(1, 200),
    bits=st.sampled_from([4, 3, 2]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=8, deadline=None)
def test_loops_and_device_have_the_bits_of_the_reference(
    rows: int, groups: int, tokens: int, bits: int, seed: int
) -> None:
    """For any shape, rank and width, with scales of zero, subnormal ones, and ones that clamp."""
    generator = torch.Generator().manual_seed(seed)
    columns = groups * 32
    weights = (torch.randn(rows, columns, generator=generator) * 0.02).to(torch.bfloat16)
    inputs = torch.randn(tokens, columns, generator=generator) * torch.randn(columns, generator=generator).exp()
    scales = plain_int4_scale(weights, "moonshot", bits) * torch.rand(rows, groups, generator=generator).add(0.5)
    kinds = torch.randint(8, (rows, groups), generator=generator)
    scales = torch.where(kinds == 0, 0.0, torch.where(kinds == 1, 2.0**-130, scales.float())).to(torch.bfloat16)
    found = factor(inputs.T @ inputs)
    truth = reference.solve(weights, scales, found, bits=bits)
    assert same(truth, gptq.solve(weights, scales, found, bits=bits))
    assert same(truth, gptq._with_torch(weights, scales, found, LARGEST[bits]))  # noqa: SLF001  a GPU's way
    assert torch.equal(truth.values.isfinite(), torch.ones_like(truth.values, dtype=torch.bool))
    assert int(truth.codes.abs().max()) <= LARGEST[bits]
    assert not truth.codes[(kinds == 0).repeat_interleave(32, 1)].any()


def test_rows_may_be_split_anywhere_among_any_threads(problem: Problem, threads: Threads) -> None:
    """Rows are independent: a matrix in parts, on one, two or three threads, has the bits of the whole."""
    weights, scales, hessian = known(problem, rows=1100, columns=160)
    with threads(1):
        found = factor(hessian)
        whole = gptq.solve(weights, scales, found)
    for number in (2, 3):
        with threads(number):
            assert same(whole, gptq.solve(weights, scales, found))
            again = factor(hessian)
            assert torch.equal(again.upper, found.upper)
    cuts = [0, 1, 8, 100, 611, 1100]
    parts = [gptq.solve(weights[a:b], scales[a:b], found) for a, b in pairwise(cuts)]
    joined = reference.Solved(
        torch.cat([part.values for part in parts]),
        torch.cat([part.codes for part in parts]),
        sum(part.saturated for part in parts),
    )
    assert same(whole, joined)


def textbook(weights: Tensor, scales: Tensor, damped: Tensor) -> Tensor:
    """Return the codes of GPTQ as its paper has it: U of the inverse, a column at a time, in float64."""
    left = weights.double().clone()
    steps = scales.double().repeat_interleave(32, 1)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped.double()), upper=True)
    codes = torch.zeros_like(left)
    for j in range(left.shape[1]):
        codes[:, j] = (left[:, j] / steps[:, j]).round().clamp(-7, 7)
        value = (codes[:, j] * steps[:, j]).to(torch.bfloat16).double()
        left[:, j:] -= ((left[:, j] - value) / upper[j, j])[:, None] * upper[j, j:]
    return codes.to(torch.int8)


def test_it_is_the_textbooks_gptq(problem: Problem) -> None:
    """Codes are those of the inverse's factor in float64, but for a few that lie near a tie, and the error is equal."""
    weights, scales, hessian = known(problem, rows=200, columns=192)
    hessian.diagonal().copy_(torch.linspace(float(hessian.diagonal().max()) * 2, float(hessian.diagonal().max()), 192))
    found, damped = factor(hessian), hessian + 0.1 * hessian.diagonal().mean() * torch.eye(192)
    assert found.order.tolist() == list(range(192))
    ours, theirs = gptq.solve(weights, scales, found), textbook(weights, scales, damped)
    assert (ours.codes != theirs).double().mean() < 1e-3
    values = (theirs.float() * scales.float().repeat_interleave(32, 1)).to(torch.bfloat16)
    assert float(cost(weights, ours.values, damped).sum() / cost(weights, values, damped).sum()) == pytest.approx(
        1, rel=1e-3
    )


def test_columns_are_taken_in_order_of_their_squares(problem: Problem) -> None:
    """It is what solving with the columns sorted by falling diagonal gives, with each group's scale where it was."""
    weights, _, hessian = known(problem, columns=32)
    scales = plain_int4_scale(weights, "moonshot")
    order = hessian.diagonal().sort(descending=True, stable=True).indices
    sorted_hessian = hessian[order][:, order]
    there = gptq.solve(weights[:, order].contiguous(), scales, factor(sorted_hessian))
    assert torch.equal(gptq.solve(weights, scales, factor(hessian)).codes[:, order], there.codes)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_a_diagonal_hessian_gives_plain_rounding(problem: Problem, bits: int) -> None:
    """Where columns know nothing of each other each keeps its nearest code."""
    weights, _, hessian = known(problem)
    scales = plain_int4_scale(weights, "moonshot", bits)
    solved = gptq.solve(weights, scales, factor(hessian.diagonal().diag()), bits=bits)
    codes, values = int4_at_scale(weights, scales, bits)
    assert torch.equal(solved.codes, codes.to(torch.int8))
    assert torch.equal(solved.values, values)
    assert not solved.saturated


def test_a_column_without_input_keeps_its_rounded_weight(problem: Problem) -> None:
    """Its row and column of the Hessian are zeros; its weights are not."""
    weights, inputs = problem()
    dead = torch.tensor([0, 5, 33, 200, 223])
    inputs[:, dead] = 0
    scales = plain_int4_scale(weights, "moonshot")
    solved = gptq.solve(weights, scales, factor(inputs.T @ inputs))
    codes, _ = int4_at_scale(weights, scales)
    assert torch.equal(solved.codes[:, dead], codes[:, dead].to(torch.int8))
    assert solved.codes[:, dead].any()


@pytest.mark.parametrize("tokens", [60, 2000])
def test_its_error_is_far_below_that_of_rounding(problem: Problem, tokens: int) -> None:
    """In the mean of several draws, under the damped Hessian that it solves for, and in no draw above it."""
    ratios = []
    for seed in range(8):
        weights, scales, hessian = known(problem, rows=64, columns=128, tokens=tokens, seed=seed)
        damped = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(128)
        plain = int4_at_scale(weights, scales)[1]
        solved = gptq.solve(weights, scales, factor(hessian)).values
        ratios.append(float(cost(weights, solved, damped).sum() / cost(weights, plain, damped).sum()))
    assert max(ratios) < 1
    assert sum(ratios) / len(ratios) < 0.9


def test_the_last_column_has_the_best_code_of_all(problem: Problem) -> None:
    """With all others as they are, no other code of the column that is rounded last makes the error less.

    Scales are powers of two: else BF16 moves values by a little, and codes next to a tie may be the worse ones.
    """
    weights, _, hessian = known(problem, columns=160)
    scales = torch.full((100, 5), 2.0**-8).to(torch.bfloat16)
    damped = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(160)
    found = factor(hessian)
    solved, last = gptq.solve(weights, scales, found), int(found.order[-1])
    least = cost(weights, solved.values, damped)
    for code in range(-7, 8):
        other = solved.values.clone()
        other[:, last] = (code * scales[:, last // 32].float()).to(torch.bfloat16)
        assert (cost(weights, other, damped) >= least * (1 - 1e-5)).all()


def test_what_saturates_is_what_rounding_would_not_have_clamped() -> None:
    """Weights of 7.4 steps leave 0.4 each, which those behind share; weights of 9 steps were beyond the range before.

    Inputs are all the same: 1/31 of the first column's 0.406 goes to the second, 1/30 of its own to the third, and so
    on. Seven of them are 0.102, enough to come from 7.406 above 7.5: the first seven columns are below, 25 are not.
    """
    scales = torch.ones(3, 1).to(torch.bfloat16)
    found = factor(torch.ones(32, 32), damping=0.01)
    pushed = gptq.solve(torch.full((3, 32), 7.4).to(torch.bfloat16), scales, found)
    assert pushed.saturated == 3 * 25
    assert (pushed.codes == 7).all()
    assert gptq.solve(torch.full((3, 32), 9.0).to(torch.bfloat16), scales, found).saturated == 0


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_storing_the_values_gives_the_codes_back(problem: Problem, bits: int) -> None:
    """The codec finds, at the scales that were given, the codes that were solved: also where no code is the largest."""
    weights, _, hessian = known(problem)
    scales = (plain_int4_scale(weights, "moonshot", bits).float() * 1.3).to(torch.bfloat16)
    solved = gptq.solve(weights, scales, factor(hessian), bits=bits)
    packed, figures = bf16_to_int4_at(solved.values, scales, "moonshot", bits)
    assert torch.equal(unpack_int4(packed), solved.codes)
    assert figures.changed == 0


def test_what_does_not_belong_together_is_refused(problem: Problem) -> None:
    """Shapes, dtypes, widths, and weights that are not finite."""
    weights, scales, hessian = known(problem)
    found = factor(hessian)
    with pytest.raises(UsageError, match=r"expected scales `\[100, 7\]`"):
        gptq.solve(weights, scales[:, :6], found)
    with pytest.raises(UsageError, match="a factor of 192 columns"):
        gptq.solve(weights[:, :192], scales[:, :6], found)
    with pytest.raises(UsageError, match="bfloat16"):
        gptq.solve(weights.float(), scales, found)
    with pytest.raises(UsageError, match="bits"):
        gptq.solve(weights, scales, found, bits=8)
    weights[3, 9] = torch.nan
    with pytest.raises(ValueAt, match="row 3, column 9"):
        gptq.solve(weights, scales, found)


def test_products_of_fewer_bits_are_refused(problem: Problem) -> None:
    """Where torch is told to round what it multiplies, nothing is solved, and the message says what to set."""
    weights, scales, hessian = known(problem)
    found = factor(hessian)
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(UsageError, match="highest"):
            gptq.solve(weights, scales, found)
        with pytest.raises(UsageError, match="highest"):
            factorise(hessian)
    finally:
        torch.set_float32_matmul_precision("highest")
