"""A client outlasts a server that stumbles, and stops at once where a request is refused."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from k2quant.errors import HarnessFault
from k2quant.eval.asking.endpoint import client as tested
from k2quant.eval.asking.endpoint.client import Client


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What the server does with one request."""

    content: bytes = b"{}"
    """Sent as the body."""
    status: int = 200
    """Its status."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Besides the length."""
    length: int | None = None
    """What the header says of the length; None for what is true."""
    seconds: float = 0.0
    """Slept before anything is sent."""
    silent: bool = False
    """Whether the connection is closed before anything is sent."""


def saying(**answer: Any) -> Reply:
    """Return a reply with a JSON object."""
    return Reply(content=json.dumps(answer).encode())


Script = Callable[[dict[str, Any], int], Reply]
"""Called with a request's body and how many there were before it."""


@dataclass(slots=True)
class Seen:
    """What a server saw."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    at_once: int = 0
    """Requests under way now."""
    most: int = 0
    """The most that were under way."""


@pytest.fixture
def serve() -> Iterator[Callable[[Script], Seen]]:
    """Start servers on the loopback address that answer each POST by a script; each tells what it saw."""
    servers: list[ThreadingHTTPServer] = []

    def start(script: Script) -> Seen:
        seen, lock = Seen(), threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    place = len(seen.bodies)
                    seen.bodies.append(body)
                    seen.headers.append(dict(self.headers))
                    seen.paths.append(self.path)
                    seen.at_once += 1
                    seen.most = max(seen.most, seen.at_once)
                reply = script(body, place)
                time.sleep(reply.seconds)
                with lock:  # before the answer: the next request comes as soon as it is read
                    seen.at_once -= 1
                if not reply.silent:
                    self._send(reply)
                self.close_connection = reply.silent or reply.length is not None

            def _send(self, reply: Reply) -> None:
                with contextlib.suppress(ConnectionError):
                    self.send_response(reply.status)
                    for name, value in reply.headers.items():
                        self.send_header(name, value)
                    length = len(reply.content) if reply.length is None else reply.length
                    self.send_header("Content-Length", str(length))
                    self.end_headers()
                    self.wfile.write(reply.content)

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        seen.url = f"http://127.0.0.1:{server.server_port}/v1/completions"
        return seen

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


Serve = Callable[[Script], Seen]


def quick(url: str, **options: Any) -> Client:
    """Return a client that does not wait long."""
    return Client(url=url, **{"first_wait": 0.01, "retries": 3, "timeout": 20.0, **options})


def asked(client: Client, count: int) -> list[int]:
    """Ask for the double of each number; return the places of answers as they came, each with the right one."""
    places: list[int] = []

    def each(place: int, answer: dict[str, Any]) -> None:
        assert answer == {"double": 2 * place}
        places.append(place)

    client.answers([{"n": number} for number in range(count)], each)
    assert sorted(places) == list(range(count))
    return places


def double(body: dict[str, Any], _: int = 0) -> Reply:
    """Answer as `asked` expects."""
    return saying(double=2 * body["n"])


@pytest.mark.parametrize(
    "stumble",
    [
        Reply(silent=True),
        Reply(content=b'{"double', length=1000),
        Reply(content=b'{"double": 1'),
        Reply(content=b""),
        *(Reply(status=status, content=b"busy") for status in (408, 425, 429, 500, 502, 503, 504)),
        Reply(content=b'{"error": {"code": 502, "message": "upstream"}}'),
    ],
    ids=lambda reply: f"{reply.status} {reply.content.decode() or 'nothing'}",
)
def test_every_second_answer_may_go_wrong(serve: Serve, stumble: Reply) -> None:
    """Dropped before or in the middle of an answer, cut JSON, statuses that pass: asked again, each answer is there."""
    turns: dict[int, int] = {}

    def script(body: dict[str, Any], _: int) -> Reply:
        turns[body["n"]] = turns.get(body["n"], 0) + 1
        return stumble if turns[body["n"]] < 3 and body["n"] % 2 else double(body)

    asked(quick(serve(script).url, concurrency=4), 12)
    assert {turns[number] for number in range(0, 12, 2)} == {1}
    assert {turns[number] for number in range(1, 12, 2)} == {3}


def test_it_gives_up_in_the_end(serve: Serve) -> None:
    """With the address, what was tried, the server's last words, and that nothing is lost."""
    seen = serve(lambda *_: Reply(status=503, content=b"out of\nmemory"))
    with pytest.raises(HarnessFault, match=r"in 4 tries, .*503 out of memory.*same command") as caught:
        quick(seen.url).post({})
    assert seen.url in str(caught.value)
    assert len(seen.bodies) == 4


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_what_is_wrong_with_a_request_does_not_pass(serve: Serve, status: int) -> None:
    """It is asked once; the server's words are shown."""
    seen = serve(lambda *_: Reply(status=status, content=b'{"error": "too many words"}'))
    with pytest.raises(HarnessFault, match=f"{status} .*too many words"):
        quick(seen.url).post({})
    assert len(seen.bodies) == 1


@pytest.mark.parametrize(
    ("status", "path", "remedy"),
    [
        (401, "/v1/completions", "`headers=`"),
        (403, "/v1/chat/completions", "OPENAI_API_KEY"),
        (404, "/v1/completions", "`chat=True`"),
        (405, "/v1/completions", "`chat=True`"),
        (404, "/v1/chat/completions", None),
        (400, "/v1/completions", None),
    ],
)
def test_a_refusal_names_its_usual_remedy(serve: Serve, status: int, path: str, remedy: str | None) -> None:
    """Where the key goes, and that many servers take nothing but chat messages; else the server's words alone."""
    seen = serve(lambda *_: Reply(status=status, content=b"no"))
    with pytest.raises(HarnessFault) as caught:
        quick(seen.url.partition("/v1")[0] + path).post({})
    assert caught.value.remedy is None if remedy is None else remedy in str(caught.value.remedy)


@pytest.mark.parametrize(
    "reply",
    [
        Reply(content=b"<html>Welcome</html>", headers={"Content-Type": "text/html"}),
        Reply(content=b"[1]"),
        Reply(content=b'"text"'),
        Reply(content=b'{"error": "no such model"}'),
    ],
    ids=lambda reply: reply.content.decode(),
)
def test_what_is_no_answer_is_not_asked_for_again(serve: Serve, reply: Reply) -> None:
    """A page, another JSON value or an error under a 200 is shown at once."""
    seen = serve(lambda *_: reply)
    with pytest.raises(HarnessFault) as caught:
        quick(seen.url).post({})
    assert reply.content.decode()[:8] in str(caught.value)
    assert len(seen.bodies) == 1


def test_the_type_of_content_decides_nothing(serve: Serve) -> None:
    """Some servers say text/plain of their JSON."""
    seen = serve(lambda *_: Reply(content=b'{"double": 1}', headers={"Content-Type": "text/plain; charset=latin-1"}))
    assert quick(seen.url).post({}) == {"double": 1}


@pytest.mark.parametrize("content", [b'{"a": NaN}', b'{"a": 1, "a": 2}', b'{"a": 1e999}', b"{" + b'"a":{' * 10**5])
def test_json_is_read_strictly(serve: Serve, content: bytes) -> None:
    """What readers take differently, or break of, is no answer."""
    seen = serve(lambda *_: Reply(content=content))
    with pytest.raises(HarnessFault, match="not valid JSON"):
        quick(seen.url, retries=0).post({})


def test_a_huge_answer_is_not_read_to_its_end(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its headers say of its length."""
    monkeypatch.setattr(tested, "_LARGEST", 1000)
    seen = serve(lambda *_: Reply(content=b'{"a": "' + b"x" * 10**7))
    with pytest.raises(HarnessFault, match="more than 1,000 bytes"):
        quick(seen.url).post({})
    assert len(seen.bodies) == 1


def test_a_slow_answer_is_asked_for_again(serve: Serve) -> None:
    """Seconds are of a whole answer, and the connection is not kept waiting."""
    seen = serve(lambda body, place: Reply(seconds=5.0) if place == 0 else double(body))
    began = time.monotonic()
    asked(quick(seen.url, timeout=0.3), 1)
    assert time.monotonic() - began < 4
    assert len(seen.bodies) == 2


def test_a_server_is_left_alone_as_long_as_it_asks(serve: Serve) -> None:
    """`Retry-After` is waited for, and one of a day is no wait: the run is resumed another day."""
    times: list[float] = []

    def script(body: dict[str, Any], place: int) -> Reply:
        times.append(time.monotonic())
        return Reply(status=429, headers={"Retry-After": "1"}) if place == 0 else double(body)

    asked(quick(serve(script).url), 1)
    assert times[1] - times[0] >= 1.0
    seen = serve(lambda *_: Reply(status=429, headers={"Retry-After": "86400"}))
    with pytest.raises(HarnessFault, match=r"asks for 24 h 00 min of rest"):
        quick(seen.url).post({})
    assert len(seen.bodies) == 1


@pytest.mark.parametrize("concurrency", [1, 3, 16])
def test_as_many_are_under_way_as_allowed(serve: Serve, concurrency: int) -> None:
    """So many are reached, and never one more; a slow answer holds up none of the others."""
    together = threading.Barrier(concurrency)

    def script(body: dict[str, Any], place: int) -> Reply:
        if place < concurrency:
            together.wait(20)
        return Reply(content=double(body).content, seconds=1.5 if body["n"] == 0 else 0.02)

    seen = serve(script)
    places = asked(quick(seen.url, concurrency=concurrency), 48)
    assert seen.most == concurrency
    assert places.index(0) == (0 if concurrency == 1 else 47)


def test_answers_are_handed_on_as_they_come_in_this_thread(serve: Serve) -> None:
    """The first is there while the second is being written."""
    release = threading.Event()
    threads: list[threading.Thread] = []

    def script(body: dict[str, Any], _: int) -> Reply:
        assert body["n"] == 0 or release.wait(10)
        return double(body)

    def each(place: int, _: dict[str, Any]) -> None:
        threads.append(threading.current_thread())
        if place == 0:
            release.set()

    quick(serve(script).url, concurrency=2).answers([{"n": 0}, {"n": 1}], each)
    assert threads == [threading.current_thread()] * 2


def test_what_was_answered_before_a_fault_is_handed_on(serve: Serve) -> None:
    """A request that is refused ends the rest, and loses none of the answers before it."""

    def script(body: dict[str, Any], _: int) -> Reply:
        return Reply(status=400, content=b"no") if body["n"] == 5 else double(body)

    places: list[int] = []
    with pytest.raises(HarnessFault, match="400"):
        quick(serve(script).url, concurrency=1).answers(
            [{"n": number} for number in range(9)], lambda place, _: places.append(place)
        )
    assert places == [0, 1, 2, 3, 4]


def test_an_error_of_the_caller_ends_what_is_under_way(serve: Serve) -> None:
    """Such as a full disk: it is raised as it is, at once, and nothing more is sent."""
    seen = serve(lambda body, _: Reply(content=double(body).content, seconds=0.0 if body["n"] == 0 else 3.0))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    began = time.monotonic()
    with pytest.raises(OSError, match="No space left"):
        quick(seen.url, concurrency=2).answers([{"n": number} for number in range(50)], full)
    assert time.monotonic() - began < 2
    assert len(seen.bodies) <= 4
    assert not [thread for thread in threading.enumerate() if thread.name == "k2quant requests"]


def test_control_c_is_heard_at_once(serve: Serve) -> None:
    """While every request waits for the server; connections are closed, so that it can stop writing."""
    seen = serve(lambda *_: Reply(seconds=5.0))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer = threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            quick(seen.url).answers([{"n": number} for number in range(50)], lambda *_: None)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - began < 3
    assert not [thread for thread in threading.enumerate() if thread.name == "k2quant requests"]


def test_a_loop_may_run_already(serve: Serve) -> None:
    """As in a notebook, where asyncio.run refuses."""
    url = serve(double).url

    async def cell() -> list[int]:
        return asked(quick(url), 3)

    assert sorted(asyncio.run(cell())) == [0, 1, 2]


def test_requests_are_made_when_there_is_room(serve: Serve) -> None:
    """A million prompts need not be in memory: after a fault, most were never made."""
    made: list[int] = []

    def bodies() -> Any:
        for number in range(1000):
            made.append(number)
            yield {"n": number}

    seen = serve(lambda *_: Reply(status=400))
    with pytest.raises(HarnessFault):
        quick(seen.url, concurrency=4).answers(bodies(), lambda *_: None)
    assert len(made) <= 4


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_key_goes_to_no_other_address(serve: Serve, status: int) -> None:
    """A redirection is shown, not followed."""
    other = serve(double)
    seen = serve(lambda *_: Reply(status=status, headers={"Location": other.url}))
    with pytest.raises(HarnessFault, match="elsewhere") as caught:
        quick(seen.url, headers={"Authorization": "Bearer secret-key"}).post({"n": 1})
    assert other.url in str(caught.value)
    assert not other.bodies


def test_a_key_is_in_no_message(serve: Serve) -> None:
    """Even where the server repeats it, in whatever it says; a client shows none either."""
    key = 'sk-"quoted"-0123456789'
    client = quick("http://127.0.0.1:1/v1", headers={"Authorization": f"Bearer {key}", "X-Team": "team-secret"})
    assert "secret" not in repr(client)
    assert "sk-" not in repr(client)
    words = json.dumps({"error": f"wrong key {key} of team-secret"}).encode()
    for status in (200, 401, 500):
        seen = serve(lambda *_, status=status: Reply(status=status, content=words))
        with pytest.raises(HarnessFault) as caught:
            quick(seen.url, headers=client.headers, retries=0).post({})
        assert "wrong key ***" in str(caught.value)
        assert "0123456789" not in str(caught.value)
        assert "team-secret" not in str(caught.value)
        assert seen.headers[0]["Authorization"] == f"Bearer {key}"


def test_half_a_key_is_in_no_message(serve: Serve) -> None:
    """Wherever a message is cut, the key was hidden before."""
    key = "sk-" + "0123456789" * 30
    for before in range(200, 400, 25):
        words = b'{"no JSON"' + b" " * 100 + b"x" * before + key.encode()
        seen = serve(lambda *_, words=words: Reply(content=words))
        with pytest.raises(HarnessFault) as caught:
            quick(seen.url, headers={"Authorization": f"Bearer {key}"}, retries=0).post({})
        assert "012" not in str(caught.value)


def test_the_password_of_a_proxy_is_in_no_message(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Aiohttp names the proxy that refuses, with all of its address."""
    proxy = serve(lambda *_: Reply())  # knows no CONNECT
    address = proxy.url.removesuffix("/v1/completions").replace("//", "//me:pass-word@")
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, address)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(HarnessFault, match="Proxy") as caught:
        quick("https://k2.invalid/v1", retries=0).post({})
    assert "pass-word" not in str(caught.value)


@pytest.mark.parametrize("host", ["a..b", "a" * 70 + ".org"])
def test_a_host_whose_name_is_none(host: str) -> None:
    """It is a fault at once, and no error of the encoder of names."""
    with pytest.raises(HarnessFault, match="no address of a server"):
        quick(f"http://{host}/v1", retries=1000, first_wait=100.0).post({})


def test_a_proxy_of_the_environment_is_asked(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where `http_proxy` names one and `no_proxy` does not spare the host; a key in ~/.netrc is never sent."""
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    proxy = serve(double)
    monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1/completions"))
    asked(quick("http://k2.invalid/v1/completions"), 1)
    assert proxy.paths == ["http://k2.invalid/v1/completions"]
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    seen = serve(double)
    asked(quick(seen.url), 1)
    assert len(seen.bodies) == 1


def test_nobody_listens() -> None:
    """A refused connection passes too, for a server may be starting; in the end it is named."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(HarnessFault, match=r"in 3 tries.*ClientConnectorError"):
        quick(url, retries=2).post({})


def test_a_connection_that_is_not_safe_is_none(serve: Serve) -> None:
    """Of a server that speaks no TLS, nothing is sent and nothing is tried again."""
    seen = serve(double)
    began = time.monotonic()
    with pytest.raises(HarnessFault, match=r"no safe connection.*SSL_CERT_FILE"):
        quick(seen.url.replace("http:", "https:"), first_wait=5.0).post({})
    assert time.monotonic() - began < 4
    assert not seen.bodies


def test_a_wait_is_told_of_now_and_then(serve: Serve) -> None:
    """Once in half a minute, however many requests stumble: why, and how long until the next try; without the key."""
    seen = serve(lambda body, place: Reply(status=503, content=b"no key-12345") if place < 6 else double(body))
    told: list[tuple[str, threading.Thread]] = []
    client = quick(
        seen.url,
        headers={"X-Key": "key-12345"},
        concurrency=3,
        remark=lambda said: told.append((said, threading.current_thread())),
    )
    asked(client, 4)
    assert told == [(f"{seen.url}: 503 no ***; asked again in 0.0 s", threading.current_thread())]
