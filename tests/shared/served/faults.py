"""What goes wrong on purpose, and what a server saw."""

from __future__ import annotations

import fnmatch
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

KINDS = {
    "slow": "the body comes at `rate` bytes a second",
    "drop": "the connection closes after `after` bytes of the body",
    "status": "the answer is `status`, with `headers` and `body`",
    "wrong": "one byte of the content is another one",
    "shrink": "the file has only `size` bytes, in Content-Length, Content-Range and body",
    "grow": "the file has `size` bytes, zeros behind its own",
    "elsewhere": "a redirect to another host, which serves the content and notes whether a token came along",
    "bare": "206 without Content-Range",
    "whole": "200 and the whole file in place of the range",
    "shifted": "206 and another range than what was asked",
    "html": "200 and a page of HTML",
    "junk": "200 and JSON that is not what was asked",
    "loop": "a redirect to the same address, for ever",
    "hang": "nothing for `seconds`, then what was asked",
    "then": "what was asked, after `then()` was called (a branch moves, for example)",
}
"""The faults by name."""


@dataclass
class Fault:
    """One fault and the requests that it meets.

    Attributes:
        kind: A name in `KINDS`.
        file: Pattern of the path of a file in its repository.
        on: The kind of request (`Seen.kind`).
        method: HTTP's word, or any.
        nth: The first matching request that it meets, counted from 1.
        times: How many it meets; None for all from then on.
        start: The first byte of the ranges that it meets, at least.
    """

    kind: str
    file: str = "*"
    on: str = "content"
    method: str | None = None
    nth: int = 1
    times: int | None = 1
    start: int = 0
    rate: float = 1e6
    after: int = 0
    size: int = 0
    seconds: float = 1.0
    status: int = 503
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    then: Callable[[], object] | None = None
    met: int = 0
    fired: int = 0

    def meets(self, seen: Seen) -> bool:
        """Count a request if it matches; whether this fault is its lot."""
        if self.on != seen.kind or self.method not in (None, seen.method) or not fnmatch.fnmatch(seen.file, self.file):
            return False
        if self.start and int((seen.range or "bytes=0-").removeprefix("bytes=").partition("-")[0]) < self.start:
            return False
        self.met += 1
        if self.met < self.nth or (self.times is not None and self.met >= self.nth + self.times):
            return False
        self.fired += 1
        return True


@dataclass
class Seen:
    """One request as it came, and what was answered.

    Attributes:
        kind: info, tree, paths, refs, resolve, content, whoami, yaml, create, branch, preupload, batch, put, complete,
            verify, commit or other. The bytes of a file are "content", wherever they come from.
        host: Which server took it: hub, cdn or other.
        file: Path in the repository, "" if the request is for no file.
        sent: Bytes of the body that were sent; `received`: of the request's.
    """

    method: str
    host: str
    path: str
    kind: str
    file: str
    headers: Mapping[str, str]
    status: int = 0
    sent: int = 0
    received: int = 0
    fault: str | None = None

    @property
    def range(self) -> str | None:
        """The header Range as it came."""
        return self.headers.get("range")

    @property
    def token(self) -> str | None:
        """What came as Authorization."""
        return self.headers.get("authorization")


class Link:
    """A line that all connections share: so many bytes a second together."""

    def __init__(self, rate: float | None = None) -> None:
        """A line of `rate` bytes a second; None for one without a limit."""
        self.rate = rate
        self._lock = threading.Lock()
        self._free = 0.0

    def carry(self, size: int) -> None:
        """Wait until `size` bytes have gone through."""
        if not self.rate:
            return
        with self._lock:
            begin = max(self._free, time.monotonic())
            self._free = begin + size / self.rate
            until = self._free
        time.sleep(max(0.0, until - time.monotonic()))
