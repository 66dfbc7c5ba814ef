"""One file of samples, as lm-eval writes them: a JSON object a line, one for each document and filter.

On disk every leaf of `resps` and `filtered_resps` is a string, log-probabilities and booleans included; in memory they
keep their types. Both are read.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from k2quant.checkpoint.files.paths import open_regular
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.errors import CheckpointError, MalformedResults
from k2quant.eval.runs.items import Item, Key
from k2quant.ground.saying.showing import brief

_LINE_LIMIT = 2**26  # bytes; a prompt of 128k tokens, five shots and all, is below 1 MB
_SHOWN = 600  # characters of a prompt's end, and of an answer


class Samples(NamedTuple):
    """What a file of samples holds, by one metric behind one filter."""

    metric: str
    filter: str
    items: tuple[Item, ...]
    """In the order of `doc_id`."""
    digest: str
    """SHA-256 of the file."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)


def read_samples(path: Path) -> Samples:
    """Read a file of samples by its first filter and the first metric that is 0 or 1 for every item.

    Raises:
        MalformedResults: a line is cut, is no sample, stands twice, or scores what is neither right nor wrong.
    """
    digest = hashlib.sha256()
    rows: dict[int, dict[str, Any]] = {}
    first: str | None = None
    for number, line in enumerate(_lines(path, digest), start=1):
        row = _row(line, f"{path}, line {number}")
        first = row["filter"] if first is None else first
        if row["filter"] != first:
            continue
        if row["doc_id"] in rows:
            raise MalformedResults(
                f"document {row['doc_id']} stands twice",
                file=f"{path}, line {number}",
                remedy="two runs mixed in one file? run the evaluation again into an empty folder",
            )
        rows[row["doc_id"]] = row
    if first is None:
        raise MalformedResults("holds no sample", file=path, remedy="run the evaluation again")
    metric = _metric(rows.values(), path)
    try:
        items = tuple(_item(rows[number], metric) for number in sorted(rows))
    except RecursionError as error:
        raise MalformedResults("lists nested too deep", file=path) from error
    return Samples(metric, first, items, digest.hexdigest())


def _lines(path: Path, digest: Any) -> Iterator[bytes]:
    """Yield the lines of a file, each whole."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            while line := file.readline(_LINE_LIMIT + 1):
                digest.update(line)
                if not line.endswith(b"\n"):
                    what = "a line is too long" if len(line) > _LINE_LIMIT else "cut off in its last line"
                    raise MalformedResults(what, file=path, remedy="run the evaluation again; it resumes")
                yield line
    except OSError as error:
        raise MalformedResults("cannot be read", file=path, found=error.strerror or str(error)) from error
    except CheckpointError as error:  # a pipe, a device
        raise MalformedResults(str(error)) from error


def _row(line: bytes, place: str) -> dict[str, Any]:
    """Return a sample with everything that is used of it checked."""
    try:
        row = parse_object(line, file=place)
    except CheckpointError as error:
        raise MalformedResults(f"{error}; no line of samples") from error
    try:
        _check(row)
    except KeyError as error:
        raise MalformedResults(
            "no sample of lm-eval",
            file=place,
            expected=f"a key {error}",
            remedy="write samples with `lm_eval --log_samples`, version 0.4.4 or later",
        ) from error
    except (TypeError, ValueError) as error:
        raise MalformedResults("no sample of lm-eval", file=place, found=str(error)[:200]) from error
    return row


def _check(row: Mapping[str, Any]) -> None:
    number = row["doc_id"]
    if type(number) is not int or not 0 <= number < 2**53:
        raise ValueError(f"doc_id {number!r:.100}")
    for key in ("doc_hash", "prompt_hash", "target_hash", "filter"):
        if not isinstance(row[key], str) or not 0 < len(row[key]) <= 200:
            raise ValueError(f"{key} {row[key]!r:.100}")
    for key in ("resps", "filtered_resps"):
        if not isinstance(row[key], list):
            raise TypeError(f"{key} {row[key]!r:.100}")
    metrics = row["metrics"]
    if not isinstance(metrics, list) or not metrics or not all(isinstance(name, str) for name in metrics):
        raise ValueError(f"metrics {metrics!r:.100}")


def _metric(rows: Any, path: Path) -> str:
    """Return the first metric that says right or wrong of every item."""
    names: list[str] = next(iter(rows))["metrics"]
    graded: dict[str, Any] = {}
    for name in names:
        odd = [row.get(name) for row in rows if not _is_binary(row.get(name))]
        if not odd:
            return name
        graded[name] = odd[0]
    found = ", ".join(f"{name} {value!r:.60}" for name, value in graded.items())
    raise MalformedResults(
        "no metric says right or wrong of every item",
        file=path,
        expected="0 or 1",
        found=found,
        remedy="gate tasks whose answers are right or wrong, such as exact_match, acc or pass@1",
    )


def _is_binary(value: object) -> bool:
    return isinstance(value, bool | int | float) and value in {0, 1}


def _item(row: Mapping[str, Any], metric: str) -> Item:
    options = [found for response in row["resps"] if (found := _log_probability(response)) is not None]
    is_choice = len(options) == len(row["resps"]) > 1
    texts = [str(_innermost(answer)) for answer in row["filtered_resps"]]
    answer = str(options.index(max(options))) if is_choice else " | ".join(texts)
    return Item(
        key=Key(row["doc_hash"], _prompt_hash(row), row["target_hash"]),
        doc_id=row["doc_id"],
        right=bool(row[metric]),
        prompt=_prompt(row)[-_SHOWN:],
        target=str(row.get("target", ""))[:_SHOWN],
        answer=answer[:_SHOWN],
        output_digest=_digest(_strings(row["resps"])),
        choices=len(options) if is_choice else None,
        hollow=_is_hollow(row["resps"], options),
    )


def _innermost(value: Any) -> Any:
    """Return what stands inside lists of one."""
    while isinstance(value, list) and len(value) == 1:
        value = value[0]
    return value


def _log_probability(response: Any) -> float | None:
    """Return the log-probability of a response `[["-1.5", "True"]]`, or None for one that is text."""
    pair = _innermost(response)
    if not isinstance(pair, list) or len(pair) != 2 or str(pair[1]) not in {"True", "False"}:
        return None
    try:
        value = float(pair[0])
    except (TypeError, ValueError, OverflowError):
        return None
    return None if math.isnan(value) else value


def _is_hollow(responses: list[Any], options: list[float]) -> bool:
    """Tell whether an output says nothing: no text, or log-probabilities that are all the same, or zero."""
    if len(options) == len(responses) and options:
        return len(set(options)) == 1 and (len(options) > 1 or options[0] == 0)
    return not any(str(_innermost(response)).strip() for response in responses)


def _prompt_hash(row: Mapping[str, Any]) -> str:
    """Return a hash over all requests; lm-eval's own covers the first one's context alone."""
    arguments = row.get("arguments")
    return _digest(arguments) if arguments else str(row["prompt_hash"])


def _prompt(row: Mapping[str, Any]) -> str:
    arguments = row.get("arguments")
    if isinstance(arguments, dict):
        arguments = [list(part.values()) for part in arguments.values() if isinstance(part, dict)]
    first = arguments[0] if isinstance(arguments, list) and arguments else [""]
    return str(first[0]) if isinstance(first, list) and first else str(first)


def _strings(value: Any) -> Any:
    """Return nested lists with every leaf as a string, as they lie on the disk."""
    return [_strings(part) for part in value] if isinstance(value, list) else str(value)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
