"""Work that every thread which needs its result takes part in, so that none waits idly."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Generic, TypeVar

Item = TypeVar("Item")
Part = TypeVar("Part")
Result = TypeVar("Result")


class Together(Generic[Item, Part, Result]):
    """Some items, what is done with each, and what comes of all; in their order, whoever did which."""

    def __init__(
        self, items: Sequence[Item], work: Callable[[Item], Part], result: Callable[[Sequence[Part]], Result]
    ) -> None:
        """Do nothing yet.

        Args:
            items: what there is to do.
            work: does one, in any thread.
            result: makes of what came of all, once, what they were done for.
        """
        self._items, self._work, self._make = items, work, result
        self._parts: tuple[Future[Part], ...] = tuple(Future() for _ in items)
        self._result: Future[Result] = Future()
        self._taken, self._lock = 0, threading.Lock()

    def result(self) -> Result:
        """Take part, then wait for what others have taken; return what came of all of it.

        Raises:
            BaseException: what an item raised, in every thread.
        """
        while (number := self._next()) < len(self._items):
            _fill(self._parts[number], partial(self._work, self._items[number]))
        if number == len(self._items):  # one thread alone finds just that
            _fill(self._result, lambda: self._make([part.result() for part in self._parts]))
        return self._result.result()

    def _next(self) -> int:
        with self._lock:
            self._taken += 1
            return self._taken - 1


def _fill(future: Future[Result], work: Callable[[], Result]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # noqa: BLE001  raised in every thread that asks for it
        future.set_exception(error)
