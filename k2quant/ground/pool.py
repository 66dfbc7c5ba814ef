"""Run many small tasks on a few threads, stop all at the first error, and let the caller watch."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar, copy_context
from typing import ParamSpec, TypeVar

from k2quant.errors import CheckpointError, UsageError

Task = TypeVar("Task")
P = ParamSpec("P")
T = TypeVar("T")

_TICK_SECONDS = 0.1

MOST_WORKERS = 256
"""More threads than this only fight over the interpreter's lock."""


_STOP: ContextVar[threading.Event | None] = ContextVar("stop", default=None)


def stop_by(event: threading.Event | None) -> None:
    """Have waits of this thread end from now on when an event is set, and those of threads that it hands work to."""
    _STOP.set(event)


def handed(work: Callable[P, T], stop: threading.Event | None = None) -> Callable[P, T]:
    """Return some work for another thread, where its waits end as they would here, or by an event of its own."""
    context = copy_context()
    if stop is not None:
        context.run(_STOP.set, stop)

    def run(*given: P.args, **named: P.kwargs) -> T:
        return context.run(work, *given, **named)

    return run


def check() -> None:
    """Go on, unless what this thread works for was ended.

    Raises:
        CheckpointError: it was.
    """
    stop = _STOP.get()
    if stop is not None and stop.is_set():
        raise CheckpointError("not gone on with: the run was ended")


def pause(seconds: float) -> None:
    """Wait, at most until what this thread works for is ended.

    Raises:
        CheckpointError: it was.
    """
    stop = _STOP.get()
    if stop is None:
        time.sleep(seconds)
    else:
        stop.wait(seconds)
        check()


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
    tasks: Iterator[Task],
    work: Callable[[Task], None],
    *,
    workers: int,
    tick: Callable[[], None] | None = None,
    stop: Callable[[], None] | None = None,
) -> None:
    """Do every task, in the order of the iterator as far as threads allow.

    The iterator is advanced by one thread at a time. One worker runs inline, in the caller's thread, so that a debugger
    sees everything.

    Args:
        tasks: the tasks; they are taken one by one, when a thread is free.
        work: does one task.
        workers: how many threads.
        tick: called about ten times a second while the threads work, from the caller's thread.
        stop: called when an error or Ctrl-C ends it, before threads are waited for: whatever they wait for is to end.
            Pauses (`pause`) end by themselves.

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
    try:
        crew.watch(workers, tick)
    finally:
        crew.end(stop)
    if crew.error is not None:
        raise crew.error


class _Crew:
    """What the threads of one run share."""

    def __init__(self, tasks: Iterator[Task], work: Callable[[Task], None]) -> None:
        self._tasks: Iterator[object] = tasks
        self._work: Callable[[Task], None] = work
        self._lock = threading.Lock()
        self._first = threading.Lock()  # one of its own: who holds the other may wait for what an error is to end
        self.stopped = threading.Event()
        self.error: BaseException | None = None
        self._threads: list[threading.Thread] = []

    def watch(self, workers: int, tick: Callable[[], None] | None) -> None:
        """Start threads, and stay until they have ended, or are to."""
        for number in range(workers):
            work = handed(self.run, self.stopped)
            thread = threading.Thread(target=work, name=f"k2quant-{number}", daemon=True)
            thread.start()
            self._threads.append(thread)
        for thread in self._threads:
            while thread.is_alive() and not self.stopped.is_set():
                thread.join(_TICK_SECONDS)
                if tick:
                    tick()
                check()

    def end(self, stop: Callable[[], None] | None) -> None:
        """Wait for the threads; those that have not ended are to."""
        if any(thread.is_alive() for thread in self._threads):
            self.stopped.set()
            if stop:
                stop()
        for thread in self._threads:
            thread.join()

    def run(self) -> None:
        try:
            while not self.stopped.is_set():
                with self._lock:
                    task = next(self._tasks, self)  # `self` marks the end
                if task is self:
                    return
                self._work(task)  # type: ignore[arg-type]
        except BaseException as error:  # noqa: BLE001  handed to the caller's thread
            with self._first:
                self.error = self.error or error
            self.stopped.set()
