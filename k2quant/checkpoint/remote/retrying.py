"""What to do when a server or the way to it fails for a moment: wait, and ask again, a few times."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping
from email.utils import parsedate_to_datetime
from typing import TypeVar

from k2quant.checkpoint.remote.secrets import clean
from k2quant.errors import CheckpointError, K2QuantError
from k2quant.ground import pool

_log = logging.getLogger(__name__)

T = TypeVar("T")

pause: Callable[[float], None] = pool.pause
"""Waits for some seconds, at most until the run is ended; tests put something quicker here."""

TRIES = 8
"""How often one thing is tried; the waits between them come to half a minute, or a whole one."""
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds
_LONGEST_ASKED = 600.0  # seconds that a server's Retry-After may ask for; the hub counts requests over five minutes
WORTH = 2**16
"""Bytes that an answer must bring each minute, and in all; less counts as a try that failed. At a thousand bytes a
second a terabyte takes thirty years: a server that sends a byte now and then is one that does not answer."""
_MINUTE = 60.0  # seconds
clock: Callable[[], float] = time.monotonic
"""Tells seconds; tests put another one here."""
AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})
"""Statuses of an answer that another try may mend; those above 511 are of servers that stand before others."""

_TRANSIENT = {  # by name, so that none of these libraries need be loaded; their classes that mean a broken connection
    "TransportError",  # httpx
    "RequestError",
    "StreamError",
    "ClientConnectionError",  # aiohttp
    "ClientPayloadError",
    "HTTPClientError",  # botocore
    "EndpointConnectionError",
    "IncompleteReadError",
    "ResponseStreamingError",
    "IncompleteRead",  # http.client
    "FSTimeoutError",
}
_FINAL = {"OfflineModeIsEnabled", "UnsupportedProtocol", "TooManyRedirects", "InvalidURL", "SSLCertVerificationError"}


class Transient(Exception):
    """What failed, and may go well another time."""

    def __init__(self, found: str, *, after: float | None = None) -> None:
        """Keep what was found; `after`: seconds that the server asks to wait for."""
        self.found, self.after = found, after
        super().__init__(found)


class Pace:
    """Whether an answer comes fast enough to be worth waiting for."""

    def __init__(self) -> None:
        """Begin with the answer."""
        self._since, self._count = clock(), 0

    def is_slow(self, count: int) -> bool:
        """Hear that so many bytes came; tell whether a minute has brought too few."""
        self._count += count
        if self._count >= WORTH:
            self._since, self._count = clock(), 0
        return clock() - self._since > _MINUTE


def retried(what: str, work: Callable[[], T]) -> T:
    """Return what `work` comes to; where it fails for a moment, wait as the server asks, or ever longer, and try again.

    Args:
        what: is read or written, for messages: an address.
        work: is called again from the beginning.

    Raises:
        CheckpointError: it failed as often as it is tried, or the run was ended while it waited.
        Exception: what `work` raises that no other try will mend.
    """
    for number in range(1, TRIES + 1):
        try:
            return work()
        except Exception as error:
            fault = transient(error)
            if fault is None:
                raise
            if number == TRIES:
                raise CheckpointError(
                    f"cannot be reached, tried {TRIES} times",
                    file=what,
                    found=clean(fault.found),
                    remedy="look at the network and the server; when that is mended, run the same command again",
                ) from None
            wait = _wait(number, fault)
            _log.info("%s: %s; again in %.1f s", what, clean(fault.found), wait)
        pause(wait)
    raise AssertionError


def _wait(number: int, fault: Transient) -> float:
    longest: float = min(_FIRST_WAIT * 2 ** (number - 1), _LONGEST_WAIT)
    own = longest * random.uniform(0.5, 1.0)  # noqa: S311  so that many threads do not come back at once
    return own if fault.after is None else max(own, min(fault.after, _LONGEST_ASKED))


def transient(error: BaseException) -> Transient | None:
    """Return an error as one that may pass, if it is one; it may be any of the libraries that reach places."""
    if isinstance(error, Transient):
        return error
    if isinstance(error, K2QuantError):
        return None
    chain = _chain(error)
    names = {kind.__name__ for each in chain for kind in type(each).__mro__}
    for each in chain:
        status, headers = _answer(each)
        if status is not None:
            found = f"status {status}"
            return Transient(found, after=retry_after(headers)) if status in AGAIN else None
    if names & _FINAL:
        return None
    passing = names & _TRANSIENT or any(isinstance(each, ConnectionError | TimeoutError) for each in chain)
    return Transient(_said(error)) if passing else None


def _chain(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    found: BaseException | None = error
    while found is not None and found not in chain and len(chain) < 8:
        chain.append(found)
        found = found.__cause__
    return chain


def status_of(error: BaseException) -> int | None:
    """Return the status of the answer that an error of some library stands for."""
    return next((status for each in _chain(error) if (status := _answer(each)[0]) is not None), None)


def code_of(error: BaseException | None) -> str | None:
    """Return the name that S3 gives to what went wrong, such as `NoSuchBucket`; None for other errors."""
    for _ in range(8):
        if error is None:
            return None
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code"))
        error = error.__cause__
    return None


def _said(error: BaseException) -> str:
    text = clean(" ".join(str(error).split()))[:300]  # cleaned whole: half a secret is not known for one
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _answer(error: BaseException) -> tuple[int | None, Mapping[str, str]]:
    """Return the status and headers of the answer that an error of some library holds."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        facts = response.get("ResponseMetadata", {})
        status, headers = facts.get("HTTPStatusCode"), facts.get("HTTPHeaders", {})
    elif response is not None:  # httpx
        status, headers = getattr(response, "status_code", None), getattr(response, "headers", {})
    else:  # aiohttp, gcsfs
        status, headers = getattr(error, "status", getattr(error, "code", None)), getattr(error, "headers", None)
    if isinstance(status, str) and status.isdecimal():
        status = int(status)
    return (status if isinstance(status, int) and 100 <= status < 600 else None), headers or {}


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that an answer asks to wait for: Retry-After, as a number or as a date (RFC 9110, 10.2.3)."""
    said = headers.get("retry-after") or headers.get("Retry-After")
    if not said:
        return None
    try:
        return float(int(said)) if said.strip().isdecimal() else parsedate_to_datetime(said).timestamp() - time.time()
    except (ValueError, OverflowError, OSError):
        return None
