"""Threads that work together, and end together."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from k2quant.errors import CheckpointError
from k2quant.ground import pool


def test_a_pause_ends_with_the_run() -> None:
    """When a task fails, others do not sit out their waits, whoever they have handed work to; then all are told."""
    paused, cut, told = threading.Barrier(3, timeout=60), [], []

    def wait(name: str) -> None:
        paused.wait()
        try:
            pool.pause(60.0)
        except CheckpointError:
            cut.append(name)

    def inner(name: str) -> None:
        pool.run(iter([name, "idle"]), lambda each: wait(each) if each == name else None, workers=2)

    def work(name: str) -> None:
        if name == "fails":
            paused.wait()
            raise ValueError(name)
        (inner if name == "inner" else wait)(name)

    with pytest.raises(ValueError, match="fails"):
        pool.run(iter(["waits", "inner", "fails"]), work, workers=3, stop=lambda: told.append(len(cut)))
    assert sorted(cut) == ["inner", "waits"]
    assert len(told) == 1


def test_work_that_is_handed_on_ends_by_its_own_event() -> None:
    """It goes on before, and no more after; who handed it is not concerned."""
    stop = threading.Event()
    check = pool.handed(pool.check, stop)
    check()
    stop.set()
    with pytest.raises(CheckpointError, match="the run was ended"):
        check()
    pool.check()


def test_an_error_is_heard_while_the_next_task_is_waited_for() -> None:
    """Whoever waits for the next task holds all others up; what that waits for is ended, and the error is the first."""
    waiting, ended = threading.Event(), threading.Event()

    def tasks() -> Iterator[str]:
        yield "fails"
        waiting.set()
        assert ended.wait(60), "nobody ends it"
        raise CheckpointError("the run was ended")

    def work(name: str) -> None:
        waiting.wait()
        raise ValueError(name)

    with pytest.raises(ValueError, match="fails"):
        pool.run(tasks(), work, workers=2, stop=ended.set)
