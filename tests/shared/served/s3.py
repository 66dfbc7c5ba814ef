"""An object store on the loopback address: moto's server of S3, with faults on demand.

It runs in a thread of the test's process. Processes that tests start reach it too, by the variables of `environment`.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from moto.s3.models import s3_backends
from werkzeug.serving import make_server

KEY, SECRET = "AKIAPLANTEDKEY000000", "plantedSecretOfTheStore/000000"
"""Credentials that no file and no message may have; moto takes any."""
_ACCOUNT = "123456789012"  # moto's own

_CODES = {
    "SlowDown": "503 Slow Down",
    "InternalError": "500 Internal Server Error",
    "ExpiredToken": "400 Bad Request",
    "InvalidAccessKeyId": "403 Forbidden",
    "AccessDenied": "403 Forbidden",
    "NotImplemented": "501 Not Implemented",
}
"""Errors of S3 by their names, with the statuses that go with them (AWS, Error responses)."""


class Asked(NamedTuple):
    """A request, as faults are chosen by it."""

    number: int
    """Counted from 0, since the store began or `ask` was emptied."""
    method: str
    path: str
    query: str


Fault = Callable[[Asked], str | None]
"""Returns what becomes of a request: the name of an error of S3, `drop` for a connection that breaks, None: nothing."""


class _Quiet(MotoRequestHandler):
    def log(self, *_: object) -> None:
        """Say nothing of requests."""


class Store:
    """A server of S3."""

    def __init__(self) -> None:
        """Begin to listen, on a port that is free."""
        self.fault: Fault = lambda _: None
        """What goes wrong; tests put something here."""
        self.asked: list[Asked] = []
        """All requests."""
        self._change = threading.Condition()
        self._busy = 0
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Quiet)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to know to reach it."""
        return {
            "AWS_ENDPOINT_URL_S3": self.url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def make(self, bucket: str) -> str:
        """Make a bucket, or empty it; return its name."""
        if s3_backends[_ACCOUNT]["aws"].buckets.pop(bucket, None) is not None:
            s3_backends.bucket_accounts.pop(bucket)
        s3_backends[_ACCOUNT]["aws"].create_bucket(bucket, "us-east-1")
        return bucket

    def contents(self, bucket: str, prefix: str = "") -> dict[str, bytes]:
        """Return every object of a bucket below a prefix, by its name without that."""
        keys = s3_backends[_ACCOUNT]["aws"].buckets[bucket].keys
        return {name.removeprefix(prefix): bytes(keys[name].value) for name in list(keys) if name.startswith(prefix)}

    def put(self, bucket: str, name: str, data: bytes) -> None:
        """Have an object in a bucket."""
        s3_backends[_ACCOUNT]["aws"].put_object(bucket, name, data)

    def uploads(self, bucket: str) -> list[str]:
        """Return the names of objects for which a multipart upload is open."""
        return sorted(upload.key_name for upload in s3_backends[_ACCOUNT]["aws"].buckets[bucket].multiparts.values())

    def begin_upload(self, bucket: str, name: str) -> str:
        """Open a multipart upload, as somebody else does; return its id."""
        backend: Any = s3_backends[_ACCOUNT]["aws"]
        return str(backend.create_multipart_upload(bucket, name, {}, "STANDARD", {}, None, None, None).id)

    @contextlib.contextmanager
    def failing(self, fault: Fault) -> Iterator[None]:
        """Have requests go wrong as long as the block runs; they are counted from its beginning."""
        self.asked.clear()
        self.fault = fault
        try:
            yield
        finally:
            with self._change:  # what a killed process asked for last is done before anybody looks
                assert self._change.wait_for(lambda: not self._busy, 300)
            self.fault = lambda _: None

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        with self._change:  # each request has a number of its own
            path = environ.get("PATH_INFO", "")
            asked = Asked(len(self.asked), environ["REQUEST_METHOD"], path, environ.get("QUERY_STRING", ""))
            self.asked.append(asked)
            self._busy += 1
        try:
            return self._answered(asked, environ, start_response)
        finally:
            with self._change:
                self._busy -= 1
                self._change.notify_all()

    def _answered(self, asked: Asked, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        what = self.fault(asked)
        if what == "drop":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            raise ConnectionResetError  # which the server takes for a client that went away
        if what is None:
            return self._app(environ, start_response)  # type: ignore[no-any-return]
        body = f'<?xml version="1.0"?><Error><Code>{what}</Code><Message>as the test asked for</Message></Error>'
        start_response(_CODES[what], [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
        return [b"" if asked.method == "HEAD" else body.encode()]


@contextlib.contextmanager
def serving() -> Iterator[Store]:
    """Have a store as long as the block runs."""
    store = Store()
    try:
        yield store
    finally:
        store.close()
