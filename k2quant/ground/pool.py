"""Run many small tasks on a few threads, stop all at the first error, and let the caller watch."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from k2quant.errors import UsageError

Task = TypeVar("Task")

_TICK_SECONDS = 0.1

MOST_WORKERS = 256
"""More threads than this only fight over the interpreter's lock."""


def checked_workers(workers: int | None) -> int:
    """Return how many threads to use.

    Raises:
        UsageError: the number makes no sense.
    """
    if workers is not None and not 1 <= workers <= MOST_WORKERS:
        raise UsageError(f"{workers} workers; expected 1 to {MOST_WORKERS}")
    return workers or min(available_cores(), MOST_WORKERS)


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(
    tasks: Iterator[Task], work: Callable[[Task], None], *, workers: int, tick: Callable[[], None] | None = None
) -> None:
    """Do every task, in the order of the iterator as far as threads allow.

    The iterator is advanced by one thread at a time. One worker runs inline, in the caller's thread, so that a debugger
    sees everything.

    Args:
        tasks: the tasks; they are taken one by one, when a thread is free.
        work: does one task.
        workers: how many threads.
        tick: called about ten times a second while the threads work, from the caller's thread.

    Raises:
        Exception: the first error of a task or of the iterator, after every thread has ended.
    """
    if workers == 1:
        for task in tasks:
            work(task)
            if tick:
                tick()
        return
    crew = _Crew(tasks, work)
    threads = [threading.Thread(target=crew.run, name=f"k2quant-{number}", daemon=True) for number in range(workers)]
    started: list[threading.Thread] = []
    try:
        for thread in threads:
            thread.start()
            started.append(thread)
        for thread in threads:
            while thread.is_alive():
                thread.join(_TICK_SECONDS)
                if tick:
                    tick()
    finally:
        crew.stop()
        for thread in started:
            thread.join()
    if crew.error is not None:
        raise crew.error


class _Crew:
    """What the threads of one run share."""

    def __init__(self, tasks: Iterator[Task], work: Callable[[Task], None]) -> None:
        self._tasks: Iterator[object] = tasks
        self._work: Callable[[Task], None] = work
        self._lock = threading.Lock()
        self._stopped = False
        self.error: BaseException | None = None

    def stop(self) -> None:
        self._stopped = True

    def run(self) -> None:
        try:
            while not self._stopped:
                with self._lock:
                    task = next(self._tasks, self)  # `self` marks the end
                if task is self:
                    return
                self._work(task)  # type: ignore[arg-type]
        except BaseException as error:  # noqa: BLE001  handed to the caller's thread
            with self._lock:
                self.error = self.error or error
            self._stopped = True
