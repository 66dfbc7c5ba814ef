"""Answers that somebody has already: of a run, or of K2-Vendor-Verifier's results. No file of them is believed."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from k2quant.checkpoint.files.paths import inside, open_regular, read_limited
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.errors import MalformedFile, MalformedResults, UsageError
from k2quant.eval.runs.folder import MANIFEST
from k2quant.eval.tools.calling import Answer, of_chat, read_answer
from k2quant.eval.tools.requests import Asked, request_of, rows
from k2quant.ground.saying.showing import brief

_LIMIT = 2**28  # bytes of a manifest
_HEAD = 2**16  # bytes in which a summary shows itself

# https://github.com/MoonshotAI/K2-Vendor-Verifier, tool_calls_eval.py (of 14 February 2026): a line of its results
_VERIFIER = {"request", "response", "status"}
_SUMMARY = (b'"success_count"', b'"finish_tool_calls"')


class Taken(NamedTuple):
    """Requests with answers."""

    requests: tuple[Asked, ...]
    """Each once, in order."""
    answers: Mapping[tuple[str, int], Answer]
    """By a request's digest and the number of the repeat; every request has all of `repeats`."""
    repeats: int
    model: str
    """Who answered, as it was named."""
    model_hash: str | None = None
    """SHA-256 over its config and weights, where a run has recorded it."""
    tokenizer_hash: str | None = None
    """SHA-256 over its tokenizer's files, likewise."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    def first(self) -> dict[str, Answer]:
        """Return the first answer to each request."""
        return {key: answer for (key, repeat), answer in self.answers.items() if repeat == 0}


def take(path: str | os.PathLike[str]) -> Taken:
    """Read answers.

    Args:
        path: a run of `k2quant eval tools`, or the results of K2-Vendor-Verifier, a file in JSON Lines. Where requests
            stand in it more than once, as often as the one that stands there least counts.

    Raises:
        UsageError: there is no such file.
        MalformedResults: it holds something else, is cut or was changed, or cannot be read.
        UnsafePath: the manifest names a file outside of the run.
    """
    place = Path(path)
    try:
        if place.is_dir():
            return _of_run(place)
        if not place.is_file():
            raise UsageError(f"{place}: neither a run of k2quant eval tools nor a file of answers")
        return _gathered(_of_verifier(place))
    except MalformedFile as error:
        raise MalformedResults(str(error)) from error
    except OSError as error:
        found = error.strerror or str(error)
        raise MalformedResults("cannot be read", file=error.filename or place, found=found) from error


def _gathered(found: Iterable[tuple[Asked, Answer, str]]) -> Taken:
    requests: dict[str, Asked] = {}
    answers: defaultdict[str, list[Answer]] = defaultdict(list)
    named: Counter[str] = Counter()
    for request, answer, who in found:
        requests.setdefault(request.digest, request)
        answers[request.digest].append(answer)
        named[who] += 1
    repeats = min(map(len, answers.values()))
    placed = {(key, number): each[number] for key, each in answers.items() for number in range(repeats)}
    return Taken(tuple(requests.values()), placed, repeats, named.most_common(1)[0][0])


def _of_run(folder: Path) -> Taken:
    path = folder / MANIFEST
    if not path.is_file():
        raise MalformedResults("holds no finished run", file=folder, expected=f"{MANIFEST}, of k2quant eval tools")
    manifest = parse_object(read_limited(path, _LIMIT), file=path)
    calls = manifest.get("calls")
    if not isinstance(calls, Mapping) or not isinstance(calls.get("file"), str):
        raise MalformedResults("a run of benchmarks, not of tool calls", file=path)
    answers = inside(folder, calls["file"])
    with os.fdopen(open_regular(answers), "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != calls.get("sha256"):
        raise MalformedResults(
            "changed since the run wrote it", file=answers, remedy="run it again into an empty folder"
        )
    who = str(manifest.get("model", ""))
    taken = _gathered((*_kept(row, place), who) for place, row in rows(answers))
    model_hash, tokenizer_hash = (
        value if isinstance(value := manifest.get(key), str) else None for key in ("model_hash", "tokenizer_hash")
    )
    return taken._replace(model_hash=model_hash, tokenizer_hash=tokenizer_hash)


def _kept(row: Mapping[str, Any], place: str) -> tuple[Asked, Answer]:
    request = row.get("request")
    try:
        return request_of(request if isinstance(request, Mapping) else {}, place), read_answer(row.get("answer"))
    except ValueError as error:
        raise MalformedResults("no answer of a run", file=place, found=str(error)[:200]) from error


def _of_verifier(path: Path) -> Iterator[tuple[Asked, Answer, str]]:
    with os.fdopen(open_regular(path), "rb") as file:
        head = file.read(_HEAD)
    if all(mark in head for mark in _SUMMARY):
        raise MalformedResults(
            "a summary of K2-Vendor-Verifier holds counts alone, and answers are paired one by one",
            file=path,
            remedy="name the file of its results, in JSON Lines",
        )
    for place, row in rows(path):
        if not row.keys() >= _VERIFIER or not isinstance(row["request"], Mapping):
            raise MalformedResults(
                "no results of K2-Vendor-Verifier",
                file=place,
                expected=f"{', '.join(sorted(_VERIFIER))} in each line",
                found=", ".join(row)[:200],
            )
        if "messages" not in row["request"] and "prompt" in row["request"]:
            raise MalformedResults(
                "an answer to a raw prompt, with neither the messages nor the tools that it is judged by",
                file=place,
                remedy="let K2-Vendor-Verifier ask by chat messages, as it does unless told otherwise",
            )
        request = request_of(row["request"], place)
        yield request, _verified(row, place), str(row["request"].get("model") or "")


def _verified(row: Mapping[str, Any], place: str) -> Answer:
    response = row["response"]
    if row["status"] != "success":
        said = response.get("error") if isinstance(response, Mapping) else response
        return Answer(fault=f"{row['status']}: {said}"[:200])
    try:
        return of_chat(response)
    except ValueError as error:
        raise MalformedResults("no answer in it", file=place, found=str(error)[:200]) from error
