"""Rows of a matrix shared out among threads, cheaply enough for a call that takes a few hundred microseconds.

Where torch has its OpenMP library, its threads do the work: after an operation they spin for some milliseconds, ready
for the next one, and any other thread would have to fight them for their cores. Measured on two cores, in calls between
torch operations: what takes 1.0 ms with OpenMP's threads takes 1.1 to 1.8 ms with threads of our own. The same team
also makes torch operations within `work` run on one thread, as they should.

Elsewhere, and in a forked child, where OpenMP's threads are lost, threads of our own wait at a queue.

Either way the rows are cut into some pieces for each thread, and who is free takes the next: a thread that comes late,
or not at all, costs its share of speed but never the result. Threads start together if `work` gives up Python's lock
at once: a thread that finds it taken falls asleep, and wakes 40 us later.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from functools import cache
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch

PIECES = 2
"""Pieces for each thread: they even out threads of different speed. On idle cores 1 to 4 take the same time."""

Work = Callable[[int, int], object]


def over_rows(rows: int, multiple: int, work: Work, *, threads: int | None = None) -> None:
    """Call work(first, last) for ranges that cover rows 0 to `rows`, on several threads.

    Args:
        rows: how many rows there are; with none, `work` is not called.
        multiple: every range but the last has a multiple of so many rows.
        work: does one range; it should release the GIL.
        threads: how many at most; None: `torch.get_num_threads()`.

    Raises:
        BaseException: the first error of `work`, after all ranges that were begun have ended.
    """
    blocks = -(-rows // multiple)
    threads = min(threads or torch.get_num_threads(), blocks)
    if threads <= 1:
        if rows:
            work(0, rows)
        return
    pieces = min(threads * PIECES, blocks)
    job = _Job([min(piece * blocks // pieces * multiple, rows) for piece in range(pieces + 1)], work)
    _share(job, threads)
    job.finish()


def without_lock(entry: int, parameters: int) -> bool:
    """Have all of torch's threads call a C function once with the address of its parameters, none with Python's lock.

    Returns:
        Whether it was done; not where torch has another OpenMP library, or none.
    """
    openmp = _openmp()
    if openmp is None:
        return False
    openmp.GOMP_parallel(ctypes.cast(entry, _CALLBACK), parameters, torch.get_num_threads(), 0)
    return True


def set_own_threads(threads: int) -> None:
    """Set how many threads OpenMP gives to what this thread alone asks for; the process's number stays what it is."""
    openmp = _openmp()
    if openmp is not None:
        openmp.omp_set_num_threads(threads)


class _Job:
    """Pieces that any number of threads take one after the other."""

    def __init__(self, cuts: list[int], work: Work) -> None:
        self._cuts, self._work = cuts, work
        self._taken, self._ended = count(), count(1)  # next() of a count is atomic
        self._last_ended = threading.Lock()
        self._last_ended.acquire()
        self._error: BaseException | None = None
        self._caller = threading.get_ident()
        self.left = False
        """Whether the thread that made the job has come to the end of `run`."""

    def run(self, _unused: object = None) -> None:
        """Take pieces until there are none; after an error the remaining ones are only counted."""
        pieces = len(self._cuts) - 1
        while (piece := next(self._taken)) < pieces:
            try:
                if self._error is None:
                    self._work(self._cuts[piece], self._cuts[piece + 1])
            except BaseException as error:  # noqa: BLE001  raised again in the caller's thread
                self._error = self._error or error
            if next(self._ended) == pieces:
                self._last_ended.release()
        if threading.get_ident() == self._caller:
            self.left = True

    def finish(self) -> None:
        """Wait for the pieces that other threads have taken, and raise the first error."""
        self._last_ended.acquire()
        if self._error is not None:
            raise self._error


def _share(job: _Job, threads: int) -> None:
    """Run the job on this thread and, as far as they come, on others.

    Raises:
        KeyboardInterrupt: Ctrl-C stopped this thread outside `work`.
    """
    openmp = _openmp()
    if openmp is not None:
        openmp.GOMP_parallel(_CALLBACK(job.run), None, threads, 0)
        if not job.left:  # what a signal raises in a callback of C is printed and passed over
            raise KeyboardInterrupt
        return
    crew = _crew()
    crew.call(job, threads - 1)
    job.run()


_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _openmp() -> Any:
    """Return the OpenMP library that torch has loaded; nothing where it has another one, or none."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        try:
            library = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            library.GOMP_parallel.argtypes = [_CALLBACK, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            library.GOMP_parallel.restype = None
        except (OSError, AttributeError):
            continue
        return library
    return None


class _Crew:
    """Threads of our own, which wait for jobs at a queue."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._threads = 0

    def call(self, job: _Job, helpers: int) -> None:
        while self._threads < helpers:
            self._threads += 1
            threading.Thread(target=self._serve, name=f"k2quant-rows-{self._threads}", daemon=True).start()
        for _ in range(helpers):
            self._jobs.put(job)

    def _serve(self) -> None:
        while True:
            self._jobs.get().run()


@cache
def _crew() -> _Crew:
    return _Crew()


def _after_fork() -> None:
    """Forget threads that the child does not have; OpenMP would wait for them for ever."""
    _crew.cache_clear()
    globals()["_openmp"] = lambda: None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
