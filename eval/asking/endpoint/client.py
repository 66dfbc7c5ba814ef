"""Requests to a server: as many under way as it is allowed, asked again while it may recover, answers as they come.

A loop of its own in a thread of its own does the talking, so that the caller's thread is free to keep what came, may
itself stand in a loop, as in a notebook, and hears Ctrl-C at once; connections that are under way are then closed,
and servers stop writing what nobody reads.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import queue
import random
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.errors import HarnessFault, MalformedFile
from k2quant.eval.asking.endpoint.headers import hidden
from k2quant.eval.asking.endpoint.patience import LONGEST_ASKED, PASSING, asked_for, wait
from k2quant.ground.units import counted, duration

_LARGEST = 2**27  # bytes of an answer: 131,072 tokens with their log-probabilities take a fifth
_WORDS = 2**16  # bytes of a refusal that are read; keys are hidden in all of them, for half a key is one, too
_SHOWN = 400  # letters of it that are shown
_CONNECTING = 60.0  # seconds
_QUIET = 30.0  # seconds between two remarks
_RESUMES = "the same command goes on where this one stopped"

Body = Mapping[str, Any]
_Arrived = tuple[int, dict[str, Any]] | str  # an answer with its place, or a remark
Each = Callable[[int, dict[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """What talks to one address of a server."""

    url: str
    """Where requests are posted."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Of each request, secrets among them: none is shown, in no message either."""
    concurrency: int = 8
    """Requests under way at the same time."""
    timeout: float = 3600.0
    """Seconds for one answer; those of a reasoning model are long."""
    retries: int = 8
    """How often a request is sent again."""
    first_wait: float = 1.0
    """Seconds before it is sent again for the first time; each further wait is twice as long, up to a minute."""
    remark: Callable[[str], None] | None = field(default=None, repr=False)
    """Called in the caller's thread, now and then, with why nothing comes."""

    def post(self, body: Body) -> dict[str, Any]:
        """Return the answer to one request.

        Raises:
            HarnessFault: the server refuses it, or does not answer however often it is asked.
        """
        found: list[dict[str, Any]] = []
        self.answers([body], lambda _, answer: found.append(answer))
        return found[0]

    def answers(self, bodies: Iterable[Body], each: Each) -> None:
        """Post requests, `concurrency` of them at any time, and hand on answers in the order in which they come.

        Args:
            bodies: of the requests, as JSON objects; taken one by one, in another thread, as room is made for them.
            each: called with the place of a request and the object that answers it, in this thread; what it raises
                ends the requests under way.

        Raises:
            HarnessFault: the server refuses a request, or does not answer however often it is asked. What it had
                answered before was handed on.
        """
        with contextlib.closing(self._arriving(bodies)) as arriving:
            for place, answer in arriving:
                each(place, answer)

    def _arriving(self, bodies: Iterable[Body]) -> Generator[tuple[int, dict[str, Any]], None, None]:
        arrived: queue.SimpleQueue[_Arrived | BaseException | None] = queue.SimpleQueue()
        loop = asyncio.new_event_loop()
        talk = loop.create_task(self._talk(bodies, arrived.put))

        def drive() -> None:
            try:
                loop.run_until_complete(talk)
            except asyncio.CancelledError:
                pass
            except BaseException as error:  # noqa: BLE001  raised in the caller's thread
                arrived.put(error)
            arrived.put(None)

        thread = threading.Thread(target=drive, name="k2quant requests", daemon=True)
        thread.start()
        try:
            while (found := arrived.get()) is not None:
                if isinstance(found, BaseException):
                    raise found
                if not isinstance(found, str):
                    yield found
                elif self.remark:
                    self.remark(found)
        finally:
            loop.call_soon_threadsafe(talk.cancel)
            thread.join()
            loop.close()

    async def _talk(self, bodies: Iterable[Body], put: Callable[[_Arrived], None]) -> None:
        import aiohttp

        places = iter(enumerate(bodies))
        tell = _now_and_then(put)

        async def work(session: aiohttp.ClientSession) -> None:
            for place, body in places:
                put((place, await self._answer(session, json.dumps(body, allow_nan=False).encode(), tell)))

        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self.concurrency),
            headers={**self.headers, "Content-Type": "application/json"},
            timeout=aiohttp.ClientTimeout(total=self.timeout, sock_connect=min(_CONNECTING, self.timeout)),
            cookie_jar=aiohttp.DummyCookieJar(),
        ) as session:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(self.concurrency):
                        group.create_task(work(session))
            except BaseExceptionGroup as failed:
                raise failed.exceptions[0] from failed.exceptions[0].__cause__

    async def _answer(self, session: Any, data: bytes, tell: Callable[[str], None]) -> dict[str, Any]:
        """Send a request until it is answered.

        Raises:
            HarnessFault: it never is.
        """
        began = time.monotonic()
        for tries in range(1, self.retries + 2):
            try:
                return await self._once(session, data)
            except _Passing as failed:
                asked = failed.asked
                if tries > self.retries or (asked or 0.0) > LONGEST_ASKED:
                    took = f"in {counted(tries, 'try', 'tries')}, {duration(time.monotonic() - began)}"
                    later = f", and asks for {duration(asked)} of rest" if asked and asked > LONGEST_ASKED else ""
                    raise self._fault(f"the server gave no usable answer {took}{later}", failed.said) from failed
                chance = random.random()  # noqa: S311  no secret
                seconds = wait(tries, first=self.first_wait, asked=asked, chance=chance)
                tell(f"{self.url}: {self._shown(failed.said)}; asked again in {duration(seconds)}")
                await asyncio.sleep(seconds)
        raise AssertionError  # the last try returns or raises

    async def _once(self, session: Any, data: bytes) -> dict[str, Any]:
        import aiohttp

        try:
            async with session.post(self.url, data=data, allow_redirects=False, proxy=_proxy(self.url)) as response:
                if 300 <= response.status < 400:
                    raise self._fault(
                        f"the server answers {response.status} and sends requests elsewhere",
                        response.headers.get("Location", ""),
                        remedy="give that address as `base_url=` if you trust it with the key",
                    )
                limit = _LARGEST if response.ok else _WORDS
                body = await _read(response, limit)
                asked = asked_for(response.headers.get("Retry-After"), datetime.now(UTC))
                return self._checked(response.status, body, limit, asked)
        except aiohttp.ClientSSLError as error:
            remedy = "the certificates that are trusted are those of the system, or of SSL_CERT_FILE"
            raise self._fault("no safe connection", f"{type(error).__name__}: {error}", remedy=remedy) from error
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError, UnicodeError) as error:  # the last: of a host's name
            raise self._fault("no address of a server", type(error).__name__) from error
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _Passing(f"{type(error).__name__}: {error}".removesuffix(": "), None) from error

    def _checked(self, status: int, body: bytes, limit: int, asked: float | None) -> dict[str, Any]:
        """Return the object that a server answered with.

        Raises:
            HarnessFault: it refuses the request, or the answer is none, and will be none the next time.
            _Passing: it may answer the next time.
        """
        if not 200 <= status < 300:
            said = f"{status} {body[:_WORDS].decode('utf-8', 'replace')}"
            if status in PASSING:
                raise _Passing(said, asked)
            raise self._fault("the server refuses a request", said, remedy=self._mended(status))
        if len(body) > limit:
            raise self._fault(f"an answer of more than {limit:,} bytes", None)
        try:
            answer = parse_object(body, file=self.url, half_characters=True)
        except MalformedFile as error:
            said = f"{error.message}: {error.found}: {body[:_WORDS].decode('utf-8', 'replace')}"
            if body.lstrip()[:1] in {b"{", b""}:  # cut on the way
                raise _Passing(said, asked) from error
            raise self._fault("no answer of an OpenAI-style server", said, remedy="") from error
        return self._without_error(answer, asked)

    def _without_error(self, answer: dict[str, Any], asked: float | None) -> dict[str, Any]:
        """Return an answer that is none of an error: some servers say 200 and then what went wrong behind them.

        Raises:
            HarnessFault: it is one.
            _Passing: it is one that passes.
        """
        error = answer.get("error")
        if not error or "choices" in answer:
            return answer
        code = error.get("code") if isinstance(error, dict) else None
        said = f"200 {json.dumps(answer)}"
        if type(code) is int and code in PASSING:
            raise _Passing(said, asked)
        raise self._fault("the server refuses a request", said, remedy="")

    def _mended(self, status: int) -> str:
        """Return what most often ends such a refusal, or nothing."""
        if status in {401, 403}:
            return "its key is that of OPENAI_API_KEY, or of a variable that `headers=` names"
        if status in {404, 405} and not self.url.endswith("/chat/completions"):
            return "if it takes nothing but chat messages, ask it by `chat=True`"
        return ""

    def _fault(self, message: str, said: str | None, *, remedy: str = _RESUMES) -> HarnessFault:
        found = None if said is None else self._shown(said)
        return HarnessFault(message, file=self.url, found=found, remedy=remedy or None)

    def _shown(self, said: str) -> str:
        return " ".join(hidden(said, {**self.headers, **_of_proxy(_proxy(self.url))}).split())[:_SHOWN]


def _now_and_then(put: Callable[[str], None]) -> Callable[[str], None]:
    """Hand on the first of what is said, then one in each half minute: of many requests under way, all stumble."""
    last = -math.inf

    def tell(said: str) -> None:
        nonlocal last
        if time.monotonic() - last >= _QUIET:
            last = time.monotonic()
            put(said)

    return tell


class _Passing(Exception):
    """What a server may get over."""

    def __init__(self, said: str, asked: float | None) -> None:
        """Keep the words, and for how many seconds the server asks to be left alone."""
        self.said, self.asked = said, asked
        super().__init__()


async def _read(response: Any, limit: int) -> bytes:
    """Read a body up to a byte behind a limit, whatever its headers say of its size."""
    data = bytearray()
    async for part in response.content.iter_any():
        data += part[: limit + 1 - len(data)]
        if len(data) > limit:
            break
    return bytes(data)


def _of_proxy(proxy: str | None) -> dict[str, str]:
    """Return the password in a proxy's address, which aiohttp repeats, as if it stood in a header."""
    names, _, _ = (proxy or "").rpartition("@")
    return {"Proxy-Authorization": names.partition("//")[2].partition(":")[2]}


def _proxy(url: str) -> str | None:
    """Return the proxy of the environment for an address; aiohttp's own way would take keys from ~/.netrc, too."""
    parts = urlsplit(url)
    return None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)
