"""How the driver meets a cluster: its head, the actor that it sends to each node, and the words of Ray's own errors."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Sequence
from typing import Any

from k2quant.checkpoint.remote.secrets import clean
from k2quant.errors import ClusterError, printable

_ANSWER = 10.0  # seconds in which a head answers
_HEAD = re.compile(r"(?:ray://)?(.+):([0-9]{1,5})")


def knock(address: str) -> None:
    """Refuse a head that does not answer; Ray itself would try for minutes.

    Raises:
        ClusterError: nobody listens there.
    """
    found = _HEAD.fullmatch(os.environ.get("RAY_ADDRESS", "") if address == "auto" else address)
    if found is None:  # Ray knows where it is
        return
    try:
        socket.create_connection((found[1].strip("[]"), int(found[2])), timeout=_ANSWER).close()
    except OSError as error:
        raise silent(address, error) from error


def silent(address: str, error: Exception) -> ClusterError:
    """Return the error of a head that does not answer."""
    return ClusterError(
        "no cluster answers",
        file=address,
        found=words(error),
        remedy="start one (`ray start` on each machine), or name the address of its head; the same command resumes",
    )


def seat_class() -> Any:
    """Return the actor. Ray carries it to the nodes as it stands here, so that one without k2quant can say so."""
    import ray

    class Seat:
        def meet(self) -> dict[str, Any]:
            import sys

            try:
                from k2quant.ground.version import __version__ as version
            except ImportError:
                return {"version": None, "python": sys.executable}
            return {"version": version, "python": sys.executable}

        def begin(self, asked: dict[str, Any], attempt: str, threads: int) -> BaseException | None:
            from k2quant.conversion.spreading.worker import Worker, sendable

            try:
                self.worker = Worker(asked, attempt=attempt, workers=threads)
            except Exception as error:  # noqa: BLE001  a value, which comes without Ray's own words around it
                return sendable(error)
            return None

        def step(self, files: Sequence[str], wait: float) -> tuple[int, list[Any], bool, BaseException | None]:
            read, records, idle, error = self.worker.step(files, wait)
            return read, records, idle, error  # a plain tuple, which the driver reads whatever its k2quant

        def look(self, asked: dict[str, Any], threads: int) -> tuple[BaseException | None, Any]:
            from k2quant.conversion.spreading.worker import look, sendable

            try:
                return None, look(asked, threads)
            except Exception as error:  # noqa: BLE001  the same
                return sendable(error), None

    return ray.remote(Seat)


def words(error: BaseException) -> str:
    """Return the first line of what an error says, without secrets, as short as a sentence."""
    said = next((line.strip() for line in clean(str(error)).splitlines() if line.strip()), "")
    return printable(f"{type(error).__name__}: {said}"[:300])
