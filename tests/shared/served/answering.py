"""One HTTP request to a server of the hub, answered, with the fault that is its lot."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator, Mapping
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import parse_qsl, unquote, urlsplit

from served.faults import Fault, Link, Seen

if TYPE_CHECKING:
    from served.hub import Hub
    from served.repos import Blob

PIECE = 64 * 1024
"""Bytes between two looks at the faults and the line."""


class Server(ThreadingHTTPServer):
    """One of the hub's hosts."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, hub: Hub, host: str, address: str) -> None:
        """Listen on a free port of `address`; `host` is this server's part: hub, cdn or other."""
        self.hub = hub
        self.host = host
        super().__init__((address, 0), Handler)

    @property
    def url(self) -> str:
        """Its address, without a slash at the end."""
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class Gone(Exception):
    """The connection is to be closed without another word."""


class Handler(BaseHTTPRequestHandler):
    """Reads a request, lets the hub's routes answer it, notes what happened."""

    protocol_version = "HTTP/1.1"
    server: Server
    seen: Seen
    fault: Fault | None

    def setup(self) -> None:
        """Small answers leave at once."""
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def log_message(self, format: str, *args: Any) -> None:
        """The hub's list of requests is the log."""

    def answer(self) -> None:
        """Any method."""
        hub = self.server.hub
        self.parts = urlsplit(self.path)
        self.query = dict(parse_qsl(self.parts.query))
        self.steps = [unquote(step) for step in self.parts.path.strip("/").split("/")]
        headers = {name.lower(): value for name, value in self.headers.items()}
        kind, file = hub.routes.kind(self)
        self.seen = Seen(self.command, self.server.host, self.path, kind, file, headers)
        self.fault = hub.noted(self.seen)
        self._unread = int(headers.get("content-length", 0))
        if hub.latency:
            time.sleep(hub.latency)
        try:
            if not self._faulty():
                hub.routes.answer(self)
            if self._unread or "chunked" in headers.get("transfer-encoding", ""):
                self.close_connection = True  # what was not read would be taken for the next request
        except (Gone, OSError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer  # noqa: N815

    # What comes in

    def pieces(self) -> Iterator[bytes]:
        """The request's body."""
        stop = self.fault.after if self.fault and self.fault.kind == "drop" else None
        link = Link(self.fault.rate) if self.fault and self.fault.kind == "slow" else self.server.hub.link
        for piece in self._chunks() if "chunked" in self.seen.headers.get("transfer-encoding", "") else self._plain():
            link.carry(len(piece))
            self.seen.received += len(piece)
            if stop is not None and self.seen.received > stop:
                raise Gone
            yield piece

    def _plain(self) -> Iterator[bytes]:
        while self._unread:
            piece = self.rfile.read(min(PIECE, self._unread))
            if not piece:
                raise Gone
            self._unread -= len(piece)
            yield piece

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline().split(b";")[0], 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        self.seen.headers = {**self.seen.headers, "transfer-encoding": ""}

    def body(self) -> bytes:
        """The request's body, small."""
        return b"".join(self.pieces())

    # What goes out

    def head(self, status: int, headers: Mapping[str, str], length: int) -> None:
        """The status line and the headers."""
        self.seen.status = status
        self.send_response(status)
        for name, value in {"Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def date_time_string(self, timestamp: float | None = None) -> str:
        """The date of an answer."""
        return formatdate(timestamp, usegmt=True)

    def say(self, status: int, value: object, headers: Mapping[str, str] | None = None) -> None:
        """An answer in JSON."""
        self.send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def refuse(self, status: int, code: str, message: str) -> None:
        """An error as the hub tells it: in headers and in JSON."""
        self.say(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def send(self, status: int, data: bytes, headers: Mapping[str, str] | None = None) -> None:
        """A small answer."""
        self.head(status, headers or {}, len(data))
        if self.command != "HEAD":
            self.wfile.write(data)
            self.seen.sent += len(data)

    def redirect(self, url: str, headers: Mapping[str, str] | None = None) -> None:
        """302."""
        self.send(302, b"", {"Location": url, **(headers or {})})

    def serve(self, blob: Blob, headers: Mapping[str, str]) -> None:
        """The bytes of a file, or the range that was asked."""
        fault = self.fault.kind if self.fault else ""
        size = self.fault.size if self.fault and fault in ("shrink", "grow") else blob.size
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.seen.range or "")
        start, end, status = 0, size, 200
        if asked and any(asked.groups()) and fault != "whole":
            first, last = asked.groups()
            start = int(first) if first else max(0, size - int(last))
            end = min(size, int(last) + 1) if first and last else size
            status = 206
            if start >= size:
                self.send(416, b"", {"Content-Range": f"bytes */{size}"})
                return
        if fault == "shifted":
            start, end = (start - 1, end - 1) if start else (start, max(1, end - 1))
        told = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
        if status == 206 and fault != "bare":
            told["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
        self.head(status, told, end - start)
        if self.command != "HEAD":
            self._stream(blob, start, end)

    def _stream(self, blob: Blob, start: int, end: int) -> None:
        fault = self.fault.kind if self.fault else ""
        link = Link(self.fault.rate) if self.fault and fault == "slow" else self.server.hub.link
        left = self.fault.after if self.fault and fault == "drop" else end - start
        file: BinaryIO | None = None if isinstance(blob.content, bytes) else blob.content.open("rb")
        try:
            for at in range(start, min(end, start + left), PIECE):
                stop = min(at + PIECE, end, start + left)
                piece = _read(blob, file, at, stop).ljust(stop - at, b"\0")
                if fault == "wrong" and at == start:
                    piece = piece[:-1] + bytes([piece[-1] ^ 0xFF])
                link.carry(len(piece))
                self.wfile.write(piece)
                self.seen.sent += len(piece)
        finally:
            if file is not None:
                file.close()
        if fault == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
            raise Gone

    def _faulty(self) -> bool:
        """Whether the fault is the whole answer."""
        fault = self.fault
        kind = fault.kind if fault else ""
        if fault is None or kind == "hang":
            time.sleep(fault.seconds if fault else 0)
        elif kind == "then" and fault.then:
            fault.then()
        elif kind == "drop" and fault.after == 0:
            self.connection.shutdown(socket.SHUT_RDWR)
            raise Gone
        elif kind == "status":
            self.send(fault.status, fault.body, fault.headers)
        elif kind == "html":
            self.send(200, b"<!doctype html><title>Please log in</title>", {"Content-Type": "text/html"})
        elif kind == "junk":
            self.say(200, ["what", {"was": None}])
        elif kind == "loop":
            self.redirect(self.path)
        elif kind == "elsewhere":
            self.redirect(self.server.hub.elsewhere(self.seen))
        return kind in ("status", "html", "junk", "loop", "elsewhere")


def _read(blob: Blob, file: BinaryIO | None, start: int, end: int) -> bytes:
    if file is None:
        return blob.read(start, end)
    file.seek(start)
    return file.read(end - start)
