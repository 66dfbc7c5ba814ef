"""torch held to one thread for each thread of ours: then a product's bits do not depend on how many there are."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from k2quant.kernels.devices.threads import set_own_threads

_lock = threading.Lock()
_inside = 0
_before = 1


@contextmanager
def single_threaded() -> Iterator[int]:
    """Have torch compute on the thread that asks, here and in threads that are started inside; yield its former number.

    A BLAS may cut a product differently for another number of threads, and add in another order. It keeps one number
    for the whole process, so products of other threads, whose number is their own, are slowed down too, but never
    changed. Threads of ours that work side by side begin inside, and each has a core to itself.
    """
    global _inside, _before  # noqa: PLW0603  the BLAS' number is the process's too
    own = torch.get_num_threads()
    with _lock:
        if not _inside:
            _before = own
        _inside += 1
        torch.set_num_threads(1)
    try:
        yield own
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                torch.set_num_threads(_before)
        set_own_threads(own)
