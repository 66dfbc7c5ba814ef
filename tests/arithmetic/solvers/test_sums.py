"""Sums over tokens: Hessians, errors of outputs, and torch held to one thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from k2quant.kernels.devices.single import single_threaded
from k2quant.kernels.solvers.errors import output_error
from k2quant.kernels.solvers.gram import add_gram

Problem = Callable[..., tuple[Tensor, Tensor]]
Threads = Callable[[int], AbstractContextManager[None]]


@pytest.mark.parametrize("width", [32, 128, 160, 700, 1100])
def test_a_gram_is_the_lower_triangle_of_the_product(width: int, threads: Threads) -> None:
    """Added to what is there, with the same bits for any number of threads."""
    generator = torch.Generator().manual_seed(width)
    inputs = torch.randn(50, width, generator=generator)
    sums = []
    for number in (1, 2, 3):
        with threads(number):
            total = torch.ones(width, width)
            add_gram(total, inputs)
            sums.append(total.tril())
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])
    truth = (1 + inputs.double().T @ inputs.double()).tril()
    assert (sums[0] - truth).abs().max() < 1e-4


def test_an_output_error_is_the_weighted_sum_of_squares(problem: Problem, threads: Threads) -> None:
    """Of |(W - Q) x|^2, over the tokens; with the same bits for any number of threads; 0 of none."""
    weights, inputs = problem(tokens=700)
    values = (weights.float() * 1.01).to(torch.bfloat16)
    seen, counts = inputs.to(torch.bfloat16), torch.rand(700, generator=torch.Generator().manual_seed(1))
    found = []
    for number in (1, 2, 3):
        with threads(number):
            found.append(output_error(weights, values, seen, counts))
    assert found[0] == found[1] == found[2]
    moved = seen.double() @ (weights.double() - values.double()).T
    assert found[0] == pytest.approx(float(counts.double() @ moved.square().sum(1)), rel=1e-5)
    assert output_error(weights, values, seen[:0], counts[:0]) == 0


def test_threads_begun_inside_have_one_thread_each(threads: Threads) -> None:
    """So has the one that asks, also where it asks twice; afterwards it has as many as before."""
    seen: list[int] = []
    with threads(3), single_threaded() as before:
        assert before == 3
        other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        other.start()
        other.join()
        with single_threaded() as inner:
            assert inner == 1
        assert torch.get_num_threads() == 1
        seen.append(torch.get_num_threads())
    assert seen == [1, 1]
    with threads(3):
        with single_threaded():
            pass
        assert torch.get_num_threads() == 3


def test_an_error_inside_gives_the_threads_back(threads: Threads) -> None:
    """The number is what it was, whatever happened."""
    with threads(2):
        with pytest.raises(ValueError, match="inside"), single_threaded():
            raise ValueError("inside")
        assert torch.get_num_threads() == 2


def test_threads_that_overlap_end_with_what_they_had(threads: Threads) -> None:
    """A thread that is inside while another leaves keeps one thread, and both have their own number afterwards."""
    entered, left = threading.Event(), threading.Event()
    seen: list[int] = []

    def other() -> None:
        torch.set_num_threads(2)
        with single_threaded():
            entered.set()
            left.wait(10)
            seen.append(torch.get_num_threads())
        seen.append(torch.get_num_threads())

    with threads(2):
        thread = threading.Thread(target=other)
        with single_threaded():
            thread.start()
            assert entered.wait(10)
        mine = torch.get_num_threads()
        left.set()
        thread.join()
        assert mine == 2
    assert seen == [1, 2]
