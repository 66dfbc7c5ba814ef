"""Requests with tools, as chat completions take them: one a line of a file, or the set that ships."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2quant.checkpoint.files.paths import open_regular
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.errors import MalformedFile, UsageError
from k2quant.eval.asking.sampling import HOTTEST, LAST_SEED
from k2quant.eval.runs.identity import digest
from k2quant.ground.saying.showing import brief

BUILTIN = "k2-tools"
"""Names the set that ships."""
SAMPLING = ("temperature", "top_p", "max_tokens", "seed")
"""Keys of a request that say how an answer is drawn; what is asked does not depend on them."""

_LINE_LIMIT = 2**24  # bytes; the longest of K2-Vendor-Verifier's have some 100 kB
_ROWS = 100_000
_OURS = {"expect"}  # a key of ours, which no server gets
_NOT_SENT = {"model", "stream", "stream_options", "user", "store", "metadata", *_OURS}
"""Who is asked, and how the answer travels; neither is part of what is asked."""
_ROLES = {"system", "developer", "user", "assistant", "tool"}
_SYSTEM = "_input"  # what K2-Vendor-Verifier's file calls some of its system messages
_LEAST = {"max_tokens": 1}
_MOST = {"temperature": HOTTEST, "top_p": 1, "max_tokens": 2**31, "seed": LAST_SEED}
_SHOWN = 600  # characters of a prompt's end, for people


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request."""

    place: str
    """File and line, for messages."""
    digest: str
    """SHA-256 over all that is asked, sampling aside: what makes requests of two files the same."""
    body: Mapping[str, Any]
    """As a server gets it, without model and sampling."""
    sampling: Mapping[str, Any]
    """What the file says of `SAMPLING`."""
    tools: Mapping[str, Any]
    """The JSON schema of each function's arguments, by its name."""
    expects: tuple[str, ...] | None
    """The functions that a right answer calls, none or some; None where the file does not say."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    @property
    def shown(self) -> str:
        """The end of the conversation, for people."""
        last = self.body["messages"][-1]
        content = last.get("content")
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        return f"{last['role']}: {text}"[-_SHOWN:]


def read_requests(source: str) -> tuple[Asked, ...]:
    """Read requests.

    Args:
        source: `BUILTIN`, or a file in JSON Lines: a body of `/chat/completions` a line, and perhaps `expect`, the
            names of the functions that a right answer calls (`[]` for none).

    Returns:
        the requests in order; one that stands more than once as often as it does.

    Raises:
        MalformedFile: a line is no request, or says what none can say.
        UsageError: there is no such file.
    """
    if source == BUILTIN:
        return builtin()
    path = Path(source)
    if not path.is_file():
        raise UsageError(f"{source}: no file of requests; `requests=` takes one in JSON Lines, or {BUILTIN}")
    found = tuple(request_of(row, place) for place, row in rows(path))
    if not any(request.tools for request in found):
        raise MalformedFile("no request has tools", file=path, expected='"tools": [{"type": "function", ...}]')
    said = {request.expects is None for request in found}
    if len(said) > 1:
        first = next(request.place for request in found if request.expects is None)
        raise MalformedFile(
            "some requests say what they expect and this one does not", file=first, remedy='give it "expect", or none'
        )
    return found


def rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a file in JSON Lines, each with its place.

    Raises:
        MalformedFile: a line is no JSON object, or too long, there are too many, or none.
    """
    count = 0
    with os.fdopen(open_regular(path), "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_LINE_LIMIT + 1), b""), start=1):
            place = f"{path}, line {number}"
            if len(line) > _LINE_LIMIT:
                raise MalformedFile("a line is too long", file=place, expected=f"at most {_LINE_LIMIT:,} bytes")
            if not line.strip():
                continue
            count += 1
            if count > _ROWS:
                raise MalformedFile("too many lines", file=path, expected=f"at most {_ROWS:,}")
            yield place, parse_object(line, file=place)
    if not count:
        raise MalformedFile("holds nothing", file=path, expected="a JSON object a line")


def request_of(row: Mapping[str, Any], place: str) -> Asked:
    """Return a request with everything that is used of it checked.

    Raises:
        MalformedFile: it is none.
    """
    with_fault = _faulty(place)
    messages = with_fault("messages", lambda: [_message(one) for one in _list(row.get("messages"))])
    tools = with_fault("tools", lambda: _tools(row.get("tools")))
    expects = with_fault("expect", lambda: _expected(row["expect"], tools) if "expect" in row else None)
    if row.get("n", 1) != 1 and row["n"] is not None:
        raise MalformedFile("n: asks for several answers", file=place, remedy="leave it out; `repeats=` asks again")
    body = {
        key: value for key, value in row.items() if key not in {*_NOT_SENT, *SAMPLING, "n", "max_completion_tokens"}
    }
    body["messages"] = messages
    sampling = {key: row[key] for key in SAMPLING if row.get(key) is not None}
    if row.get("max_completion_tokens") is not None:
        sampling["max_tokens"] = row["max_completion_tokens"]
    with_fault("sampling", lambda: _check_numbers(sampling))
    return Asked(place=place, digest=digest(body), body=body, sampling=sampling, tools=tools, expects=expects)


def _faulty(place: str) -> Callable[[str, Callable[[], Any]], Any]:
    def read(what: str, part: Callable[[], Any]) -> Any:
        try:
            return part()
        except (TypeError, ValueError) as error:
            raise MalformedFile(f"{what}: {str(error)[:200]}", file=place) from error

    return read


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"expected a list that holds something, found {value!r:.100}")
    return value


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TypeError(f"expected objects, found {message!r:.100}")
    role = "system" if message.get("role") == _SYSTEM else message.get("role")
    if role not in _ROLES:
        raise ValueError(f"unknown role {role!r:.100}")
    return {**message, "role": role}


def _tools(tools: Any) -> dict[str, Any]:
    """Return the schemas of functions; one without `parameters` takes none.

    https://platform.openai.com/docs/api-reference/chat/create: omitting `parameters` defines an empty list of them.
    """
    found: dict[str, Any] = {}
    for tool in [] if tools is None else _list(tools):
        function = tool.get("function") if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not 0 < len(name) <= 200:
            raise ValueError(f"expected functions with a name, found {tool!r:.100}")
        if name in found:
            raise ValueError(f"{name} stands twice")
        schema = function.get("parameters")
        found[name] = {"type": "object"} if schema is None or schema == {} else schema
    return found


def _expected(names: Any, tools: Mapping[str, Any]) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"expected a list of names, found {names!r:.100}")
    if strange := [name for name in names if name not in tools]:
        raise ValueError(f"{strange[0]!r:.100} is none of its tools")
    return tuple(sorted(set(names)))


def _check_numbers(sampling: Mapping[str, Any]) -> None:
    for key, value in sampling.items():
        whole = key in {"max_tokens", "seed"}
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            raise TypeError(f"{key} {value!r:.100}")
        if not _LEAST.get(key, 0) <= value <= _MOST[key]:
            raise ValueError(f"{key} {value!r:.100}")


def builtin() -> tuple[Asked, ...]:
    """Return the requests that ship: of our own writing, Apache-2.0."""
    home = Path(__file__).parent / "builtin"
    tools, asked = (
        parse_object((home / name).read_bytes(), file=home / name) for name in ("tools.json", "requests.json")
    )
    found = []
    for number, row in enumerate(asked["requests"], start=1):
        body = {**row, "tools": [{"type": "function", "function": tools[name]} for name in row["tools"]]}
        found.append(request_of(body, f"{BUILTIN}, request {number}"))
    return tuple(found)


def check_schemas(requests: tuple[Asked, ...], unusable: Callable[[Any], str | None]) -> None:
    """Refuse a file with a schema that nothing can be checked against.

    Args:
        requests: all of them; a schema that stands in many is looked at once.
        unusable: says why a schema is of no use.

    Raises:
        MalformedFile: there is one.
    """
    seen: set[str] = set()
    for request in requests:
        for name, schema in request.tools.items():
            mark = digest(schema)
            if mark not in seen and (why := unusable(schema)):
                raise MalformedFile(
                    f"the schema of {name!r:.100} is of no use", file=request.place, found=why, remedy="mend or drop it"
                )
            seen.add(mark)
