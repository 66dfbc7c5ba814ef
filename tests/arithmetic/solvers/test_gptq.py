"""GPTQ: three ways to the same bits, and what these bits are worth."""

from __future__ import annotations

import torch
from torch import Tensor

from k2quant.kernels.codecs.reference.int4 import plain_int4_scale
from k2quant.kernels.solvers import gptq, reference
from k2quant.kernels.solvers.factors import Factor, factorise


def problem(rows: int = 100, columns: int = 224, tokens: int = 300, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return BF16 weights, their plain scales, and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * 0.1
    inputs = torch.randn(tokens, columns, generator=generator) @ mixing
    weights = (torch.randn(rows, columns, generator=generator) * 0.02).to(torch.bfloat16)
    return weights, plain_int4_scale(weights, "moonshot"), inputs.T @ inputs / tokens


def factor(hessian: Tensor) -> Factor:
    """Return the factor, which there must be."""
    found = factorise(hessian)
    assert found is not None
    return found


def test_the_loops_have_the_bits_of_the_reference() -> None:
    """Values, codes and what saturated are the reference's."""
    weights, scales, hessian = problem()
    known = factor(hessian)
    truth, found = reference.solve(weights, scales, known), gptq.solve(weights, scales, known)
    assert torch.equal(truth.values, found.values)
    assert torch.equal(truth.codes, found.codes)
    assert truth.saturated == found.saturated
