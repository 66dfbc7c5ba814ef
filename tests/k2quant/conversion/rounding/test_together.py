"""Threads that need one result share the work for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from k2quant.conversion.searching.together import Together


def asked_by(count: int, shared: Together[int, int, list[int]]) -> list[Callable[[], list[int]]]:
    """Return what gives the result that each of some threads got, or raises what it met."""
    with ThreadPoolExecutor(count) as threads:
        return [future.result for future in [threads.submit(shared.result) for _ in range(count)]]


def test_each_item_is_done_once_and_by_whoever_asks() -> None:
    """Four threads that meet inside do an item each; all get the results in the items' order, made once."""
    meet, done, made = threading.Barrier(4, timeout=60), list[int](), list[int]()

    def work(item: int) -> int:
        if item < 4:
            meet.wait()  # as long as not four threads take part
        done.append(item)
        return item * item

    def result(parts: object) -> list[int]:
        assert isinstance(parts, list)
        made.append(1)
        return [int(part) for part in parts]

    shared = Together(range(9), work, result)
    assert [found() for found in asked_by(4, shared)] == [[item * item for item in range(9)]] * 4
    assert sorted(done) == list(range(9))
    assert shared.result() == [item * item for item in range(9)]
    assert made == [1]


def test_what_an_item_raises_meets_every_thread() -> None:
    """Nobody waits for ever, and nobody gets a result."""

    def work(item: int) -> int:
        if item == 3:
            raise OSError(5, "Input/output error")
        return item

    for found in asked_by(3, Together(range(5), work, list)):
        with pytest.raises(OSError, match="Input/output"):
            found()
