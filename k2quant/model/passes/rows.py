"""Texts of their own, one a line of JSON: a prompt that is only context, and the completion that is to be predicted."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.errors import MalformedFile

SUFFIX = ".jsonl"
"""Of a file of such rows; a file of any other name is plain text."""

_SHAPES = '{"prompt": "...", "completion": "..."} or {"text": "..."}'
_KEYS = (("prompt", "completion"), ("text",))


class Row(NamedTuple):
    """One text."""

    prompt: str
    """What the completion follows; empty where all of the text is to be predicted."""
    completion: str


def parse_rows(data: bytes, file: Path, letters: int) -> list[Row]:
    """Read rows until they have enough letters; those that follow are not looked at.

    Args:
        data: JSON Lines. Other keys of a row than prompt and completion, or text, play no part.
        file: where they come from, for messages.
        letters: how many are enough.

    Raises:
        MalformedFile: a row is none.
    """
    rows: list[Row] = []
    count = 0
    for number, line in enumerate(data.split(b"\n"), 1):
        if count >= letters:
            break
        if line.strip():
            rows.append(_row(line, f"{file}, line {number}"))
            count += len(rows[-1].prompt) + len(rows[-1].completion)
    return rows


def _row(line: bytes, where: str) -> Row:
    found = parse_object(line, file=where)
    keys = next((keys for keys in _KEYS if all(isinstance(found.get(key), str) for key in keys)), None)
    if keys is None:
        remedy = f"a file of plain text may have any name that does not end in {SUFFIX}"
        raise MalformedFile("not a text", file=where, expected=_SHAPES, found=_shown(found), remedy=remedy)
    *prompt, completion = (found[key] for key in keys)
    if not completion:
        raise MalformedFile(f"an empty {keys[-1]}", file=where, expected="what the model is to predict")
    return Row("".join(prompt), completion)


def _shown(found: dict[str, object]) -> str:
    kinds = [f"{key} ({type(value).__name__})" for key, value in found.items()]
    return ", ".join(kinds)[:200] or "no keys"
