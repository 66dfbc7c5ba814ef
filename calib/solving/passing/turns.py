"""What threads computed side by side, added in one order: so that the sum has equal bits however many they are."""

from __future__ import annotations

from collections.abc import Callable
from threading import Condition

Work = Callable[[], None]


class Turns:
    """Pieces of work with numbers from 0, done one at a time in the order of their numbers.

    Tasks that end in a call of `hand` are begun in that order, so the lowest that is not done yet is always at work and
    whoever waits does so for a task that goes on.
    """

    def __init__(self, most: int) -> None:
        """Begin with number 0.

        Args:
            most: pieces that may wait for their turn; whoever hands in another one waits with it.
        """
        self._most = most
        self._next, self._busy, self._stopped = 0, False, False
        self._waiting: dict[int, Work] = {}
        self._changed = Condition()

    def hand(self, number: int, work: Work, *, wait: bool = False) -> None:
        """Have work done when it is its turn, by whichever thread is there.

        Args:
            number: its place.
            work: what is done.
            wait: whether the caller stays until it is done.

        Raises:
            Exception: what work raises, be it this one or another that waited.
        """
        with self._changed:
            self._waiting[number] = work
        self._drain()
        with self._changed:
            while not self._stopped and (number >= self._next if wait else len(self._waiting) > self._most):
                self._changed.wait()  # whoever is at work goes on with what waits

    def _drain(self) -> None:
        while (work := self._take()) is not None:
            try:
                work()
            finally:
                with self._changed:
                    self._next, self._busy = self._next + 1, False
                    self._changed.notify_all()

    def _take(self) -> Work | None:
        with self._changed:
            if self._busy or self._stopped or self._next not in self._waiting:
                return None
            self._busy = True
            return self._waiting.pop(self._next)

    def stop(self) -> None:
        """Let go of all who wait: a task has failed, and what is not done will not be."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
