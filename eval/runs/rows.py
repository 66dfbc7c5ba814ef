"""One line of samples, as lm-eval writes them, and the answer that it holds.

On disk every leaf of `resps` and `filtered_resps` is a string, log-probabilities and booleans included; in memory they
keep their types. Both are read.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.errors import CheckpointError, MalformedResults
from k2quant.eval.runs.answers import Item, Key

_SHOWN = 600  # characters of a prompt's end, and of an answer
_MOST_REPEATS = 2**20
_JSON = json.JSONEncoder(sort_keys=True)


def parse_row(line: bytes, place: str) -> dict[str, Any]:
    """Return a sample with everything that is used of it checked.

    Args:
        line: of a file of samples.
        place: what a message calls it.

    Raises:
        MalformedResults: it is cut, or no sample.
    """
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
    repeat, cut = row.get("repeat", 0), row.get("cut_in_thought")
    if type(repeat) is not int or not 0 <= repeat < _MOST_REPEATS:
        raise ValueError(f"repeat {repeat!r:.100}")
    if cut is not None and type(cut) is not bool:
        raise ValueError(f"cut_in_thought {cut!r:.100}")


def is_binary(value: object) -> bool:
    """Tell whether a score says right or wrong."""
    return isinstance(value, bool | int | float) and value in {0, 1}


def answer_of(row: Mapping[str, Any], metric: str | None) -> Item:
    """Return the answer that a checked row holds; without a metric it counts as wrong.

    Raises:
        RecursionError: its lists are nested too deep.
    """
    options = [found for response in row["resps"] if (found := _log_probability(response)) is not None]
    is_choice = len(options) == len(row["resps"]) > 1
    texts = [str(_innermost(answer)) for answer in row["filtered_resps"]]
    answer = str(options.index(max(options))) if is_choice else " | ".join(texts)
    cut = row.get("cut_in_thought")
    return Item(
        key=Key(row["doc_hash"], _prompt_hash(row), row["target_hash"]),
        doc_id=row["doc_id"],
        right=metric is not None and bool(row.get(metric)) and not cut,
        prompt=_prompt(row)[-_SHOWN:],
        target=str(row.get("target", ""))[:_SHOWN],
        answer=answer[:_SHOWN],
        output_digest=_digest(_strings(row["resps"])),
        choices=len(options) if is_choice else None,
        hollow=not cut and _is_hollow(row["resps"], options),  # a thought without an answer says something
        repeat=row.get("repeat", 0),
        cut_in_thought=cut,
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
    return _spoken(str(_innermost(first[0]) if isinstance(first, list) and first else first))


def _spoken(prompt: str) -> str:
    """Return a prompt for people: chat messages, which lm-eval writes as JSON, as who says what."""
    if not prompt.startswith('[{"role": "'):
        return prompt
    try:
        said = "\n".join(f"{message['role']}: {message['content']}" for message in json.loads(prompt))
        return said.encode(errors="replace").decode()  # JSON may spell half a character
    except (ValueError, LookupError, TypeError, RecursionError):
        return prompt  # a text that only begins like them


def _strings(value: Any) -> Any:
    """Return nested lists with every leaf as a string, as they lie on the disk."""
    return [_strings(part) for part in value] if isinstance(value, list) else str(value)


def _digest(value: Any) -> str:
    return hashlib.sha256(_JSON.encode(value).encode()).hexdigest()
