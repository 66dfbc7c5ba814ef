"""Bytes of a file by HTTP: range requests that follow redirects, and send a token to nobody but its hub (RFC 9110, 14).

A hub answers with a redirect to wherever it keeps large files, by an address that is signed and good for a while. That
is remembered for each file, so that the hub itself is not asked for each piece.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol
from urllib.parse import urljoin, urlsplit

from k2quant.checkpoint.remote.retrying import AGAIN, WORTH, Pace, Transient, retried, retry_after, transient
from k2quant.errors import CheckpointError
from k2quant.ground import pool

_REDIRECTS = {301, 302, 303, 307, 308}
_HOPS = 8  # redirects of one request, at most
_EXPIRED = {400, 401, 403, 404, 410}  # what places of large files answer to an address that is not good any more
_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)", re.ASCII)
CONNECT_SECONDS, READ_SECONDS = 20.0, 60.0
"""Seconds to wait for a connection, and for the next bytes of an answer."""


def origin(url: str) -> tuple[str, str, int | None]:
    """Return what an address shares with others of the same server: scheme, host and port."""
    parts = urlsplit(url)
    port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme.lower(), (parts.hostname or "").lower(), port


class Answer(Protocol):
    """What a client answers: httpx's response, in whichever release huggingface_hub brings."""

    @property
    def status_code(self) -> int:
        """Its status."""

    @property
    def headers(self) -> Mapping[str, str]:
        """Its headers, by names in any case."""

    def read(self) -> bytes:
        """Return the body."""

    def iter_raw(self) -> Iterator[bytes]:
        """Yield the body as it comes."""

    def iter_bytes(self) -> Iterator[bytes]:
        """Yield the body, unpacked where it came packed."""


class Client(Protocol):
    """Who asks: httpx's client."""

    def stream(self, method: str, url: str, **options: Any) -> AbstractContextManager[Answer]:
        """Ask, and give the answer as long as the block runs."""


class Ranges:
    """Reads pieces of files of one server, and of those that it leads to."""

    def __init__(
        self,
        session: Callable[[], Client],
        headers: Callable[[], Mapping[str, str]],
        refused: Callable[[Answer, str], CheckpointError],
    ) -> None:
        """Keep what requests are made with.

        Args:
            session: returns the client, which keeps connections.
            headers: returns what is sent to the server itself, a token among it.
            refused: returns the error that an answer which is no content comes to, for a file.
        """
        self._session, self._headers, self._refused = session, headers, refused
        self._moved: dict[str, str] = {}
        self._lock = threading.Lock()

    def read_into(self, url: str, what: str, start: int, buffer: memoryview, size: int) -> None:
        """Fill a buffer, from as many answers as that takes; what came is kept when one fails.

        Args:
            url: of the file, at its server.
            what: the file, for messages.
            start: first byte.
            buffer: where to put them.
            size: bytes of the whole file.

        Raises:
            CheckpointError: the server refuses or cannot be reached, or the file is another one.
        """
        done = 0

        def go_on() -> None:
            nonlocal done
            while done < len(buffer):
                pool.check()
                count = self._read(url, what, start + done, buffer[done:], size)
                done += count
                if count < WORTH and done < len(buffer):
                    raise Transient(f"an answer that ended after {count:,} bytes, or brought no more in a minute")

        retried(what, go_on)

    def _read(self, url: str, what: str, start: int, buffer: memoryview, size: int) -> int:
        """Fill as much of a buffer as one answer brings; return how much that was, at least one byte.

        Raises:
            Transient: nothing came, and may another time.
            CheckpointError: the server refuses, or the file is another one.
        """
        with self._lock:
            moved = self._moved.get(url)
        if moved is not None:
            done = self._get(moved, url, what, start, buffer, size)
            if done is not None:
                return done
            with self._lock:
                self._moved.pop(url, None)
        done = self._get(url, url, what, start, buffer, size)
        if done is None:
            raise Transient("an address that was good for no request")
        return done

    def _get(self, address: str, url: str, what: str, start: int, buffer: memoryview, size: int) -> int | None:
        """Follow an address to the bytes; None where it is one that was good once."""
        home, begun, stop = origin(url), address, start + len(buffer)
        for _ in range(_HOPS):
            at_home = origin(address) == home
            headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
            if at_home:
                headers = {**self._headers(), **headers}
            timeout = (CONNECT_SECONDS, READ_SECONDS, READ_SECONDS, READ_SECONDS)
            with self._session().stream(
                "GET", address, headers=headers, follow_redirects=False, timeout=timeout
            ) as answer:
                if answer.status_code in _REDIRECTS:
                    address = _next(address, answer.headers.get("location"), what)
                    continue
                if not at_home and answer.status_code in _EXPIRED and begun != url:
                    return None
                self._check(answer, what, start, stop, size)
                done = _fill(answer, buffer)
            if not at_home:
                with self._lock:
                    self._moved[url] = address
            return done
        raise CheckpointError("redirects without end", file=what, remedy="look at the server, or HF_ENDPOINT")

    def _check(self, answer: Answer, what: str, start: int, stop: int, size: int) -> None:
        """Refuse an answer that does not hold just the bytes that were asked for."""
        status = answer.status_code
        if status in AGAIN:
            raise Transient(f"status {status}", after=retry_after(answer.headers))
        if status == 416:
            raise changed(what, f"{size:,} bytes", "a file that ends before what its header names")
        if status >= 300 or status < 200:
            raise self._refused(answer, what)
        if answer.headers.get("content-encoding", "identity") != "identity":
            raise Transient("an answer in another encoding than was asked for")
        if status == 200:
            if (start, stop) == (0, size) and answer.headers.get("content-length") in {None, str(size)}:
                return
            raise Transient("status 200, a whole answer where a range was asked for (206)")
        found = _CONTENT_RANGE.fullmatch(answer.headers.get("content-range", ""))
        if status != 206 or found is None:
            raise Transient(f"status {status} without the range that it holds")
        first, last, total = int(found[1]), int(found[2]), found[3]
        if total != "*" and int(total) != size:
            raise changed(what, f"{size:,} bytes", f"{int(total):,} bytes")
        if (first, last) != (start, stop - 1):
            raise Transient(f"bytes {first} to {last} where {start} to {stop - 1} were asked for")


def _next(address: str, location: str | None, what: str) -> str:
    """Return where a redirect leads.

    Raises:
        CheckpointError: to nothing that could be asked, or from a safe line to an open one.
    """
    try:
        there = urljoin(address, location or "")
        scheme, host, _ = origin(there) if location else ("", "", None)
    except ValueError as error:  # a port or a host that none can be
        raise CheckpointError("a redirect that leads nowhere", file=what) from error
    if scheme not in {"http", "https"} or not host:
        raise CheckpointError("a redirect that leads nowhere", file=what, found=ascii(scheme)[:50])
    if scheme == "http" and origin(address)[0] == "https":
        raise CheckpointError("a redirect from https to http", file=what, found=f"http://{host}/...")
    return there


def _fill(answer: Answer, buffer: memoryview) -> int:
    """Copy what comes into a buffer, as long as it comes fast enough; return how much, if it was anything.

    Raises:
        Transient: more came than was asked for, or nothing did.
    """
    done, more, pace = 0, False, Pace()
    try:
        for chunk in answer.iter_raw():
            more = done + len(chunk) > len(buffer)
            if more:
                break
            buffer[done : done + len(chunk)] = chunk
            done += len(chunk)
            if pace.is_slow(len(chunk)):
                break
    except Exception as error:
        if transient(error) is None or not done:
            raise
    if more:
        raise Transient("more bytes than were asked for")
    if not done:
        raise Transient("an empty answer")
    return done


def changed(what: object, expected: str, found: str) -> CheckpointError:
    """Return what is said of a file that is not the one that was listed any more."""
    return CheckpointError(
        "changed while it was read",
        file=what,
        expected=expected,
        found=found,
        remedy="begin anew, with an address that does not move, such as a commit",
    )
