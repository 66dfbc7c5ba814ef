"""What one machine of a cluster does: it takes shards as they are given, and says how far it is. No Ray stands here."""

from __future__ import annotations

import os
import pickle
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from k2quant.checkpoint.remote.address import spot
from k2quant.checkpoint.remote.secrets import clean
from k2quant.conversion.spreading.order import order_from
from k2quant.conversion.spreading.writing import Hand
from k2quant.conversion.stream import Record
from k2quant.errors import K2QuantError

_ALONE = 90.0
"""Seconds without a word from the driver after which a worker ends itself: nobody waits for its shards any more."""


class News(NamedTuple):
    """What happened since the last time."""

    read: int
    """Bytes of weights read of shards that are not finished yet."""
    records: list[Record]
    """Of shards that stand at the target now."""
    idle: bool
    """Whether it has nothing to do."""
    error: BaseException | None


class Worker:
    """Writes shards of an order in a thread of its own."""

    def __init__(self, asked: object, *, attempt: str, workers: int) -> None:
        """Make the plan.

        Args:
            asked: the order, as JSON.
            attempt: letters that are this worker's alone.
            workers: threads.

        Raises:
            K2QuantError: see `Hand`.
        """
        self._hand = Hand(order_from(asked), workers=workers)
        self._attempt = attempt
        self._given: queue.SimpleQueue[Sequence[str]] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._read = 0
        self._records: list[Record] = []
        self._pending = 0
        self._error: BaseException | None = None
        self._heard = time.monotonic()
        for name in (self._work, self._watch):
            threading.Thread(target=name, name="k2quant-cluster", daemon=True).start()

    def step(self, files: Sequence[str], wait: float) -> News:
        """Take more shards, if any, and return what happened; wait up to `wait` seconds for a finished batch."""
        self._heard = time.monotonic()
        with self._changed:
            if files:
                self._pending += 1
                self._given.put(files)
            self._changed.wait_for(lambda: self._records or self._error or not self._pending, wait)
            records, self._records = self._records, []
            return News(self._read, records, not self._pending, self._error)

    def _work(self) -> None:
        while True:
            files = self._given.get()
            try:
                records = self._hand.write(files, attempt=self._attempt, progress=self._tell)
            except BaseException as error:  # noqa: BLE001  whoever asks for news hears of it
                with self._changed:
                    self._error = sendable(error)
                    self._changed.notify_all()
                return
            with self._changed:
                self._read = 0
                self._records += records
                self._pending -= 1
                self._changed.notify_all()

    def _tell(self, done: int, _total: int) -> None:
        self._read = done

    def _watch(self) -> None:
        while time.monotonic() - self._heard < _ALONE:
            time.sleep(1)
        os._exit(1)


def look(asked: object, workers: int) -> dict[str, Any]:
    """Return what a dry run says of this machine: room at the target, and the seconds for all of the work alone.

    Raises:
        K2QuantError: this machine cannot make the plan.
    """
    from k2quant.conversion.estimate import estimate
    from k2quant.conversion.spreading.order import made

    found = order_from(asked)
    plan, rounder = made(found)
    cost = estimate(plan, spot(found.destination), done={}, workers=workers, rounder=rounder)
    return {"seconds": cost.seconds, "disk_free": cost.disk_free, "peak_memory": cost.peak_memory}


def sendable(error: BaseException) -> BaseException:
    """Return an error that another process can read and show: itself, or its words where it does not travel.

    Words of libraries go without the secrets that this machine knows: the one that shows them may not know which they
    are.
    """
    words = f"{type(error).__name__}: {clean(str(error))}"
    if not isinstance(error, K2QuantError) and clean(str(error)) != str(error):
        return RuntimeError(words)
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301  its own
    except Exception:  # noqa: BLE001  whatever its class does
        return RuntimeError(words)
    return error
