"""Matrices, scales and Hessians for the solver, and torch with a number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from torch import Tensor

Problem = Callable[..., tuple[Tensor, Tensor]]
Threads = Callable[[int], AbstractContextManager[None]]


@pytest.fixture
def threads() -> Threads:
    """Return a context with so many threads of torch."""

    @contextmanager
    def these(number: int) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(number)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    return these


@pytest.fixture
def problem() -> Problem:
    """Return what makes BF16 weights `[R, K]`, and inputs `[n, K]` whose columns are correlated and of unlike size."""

    def made(rows: int = 100, columns: int = 224, tokens: int = 300, seed: int = 0) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        mixing = torch.randn(columns, columns, generator=generator) * 0.05 + torch.eye(columns)
        sizes = torch.randn(columns, generator=generator).exp()
        inputs = torch.randn(tokens, columns, generator=generator) @ mixing * sizes
        return (torch.randn(rows, columns, generator=generator) * 0.02).to(torch.bfloat16), inputs

    return made
