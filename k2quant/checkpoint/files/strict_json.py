"""JSON as a hostile file may hold it: no duplicate keys, no surprises by depth, by numbers or by text."""

from __future__ import annotations

import codecs
import json
import math
from typing import Any

from k2quant.errors import MalformedFile


def _refuse_constant(literal: str) -> None:
    msg = f"{literal} is not JSON"
    raise ValueError(msg)


def _finite(literal: str) -> float:
    value = float(literal)
    if math.isinf(value):
        msg = f"{literal[:50]} is too large"
        raise ValueError(msg)
    return value


def _whole(literal: str) -> int:
    if literal == "-0":  # a float to readers such as serde's, which therefore refuse it as a size
        msg = "-0 is no integer"
        raise ValueError(msg)
    return int(literal)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        seen: set[str] = set()
        key = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        msg = f"duplicate key {key!r}"
        raise ValueError(msg)
    return mapping


_OTHER_UNICODE = {  # by the mark that they begin with; UTF-32's first, for UTF-16's is a part of it
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def without_mark(data: bytes, *, file: object) -> bytes:
    """Return a text's bytes without the byte-order mark that some editors put before UTF-8.

    Raises:
        MalformedFile: the mark is that of another encoding.
    """
    other = next((name for mark, name in _OTHER_UNICODE.items() if data.startswith(mark)), None)
    if other is not None:
        raise MalformedFile("the encoding", file=file, expected="UTF-8", found=other, remedy="save it as UTF-8")
    return data.removeprefix(codecs.BOM_UTF8)


def parse_object(data: bytes, *, file: object, half_characters: bool = False) -> dict[str, Any]:
    """Parse bytes that must hold one JSON object; a byte-order mark of UTF-8 before it is passed over.

    Args:
        data: the bytes.
        file: where they stand, for the message.
        half_characters: whether a text may hold half of a surrogate pair, as JSON has it that is sent piece by piece.

    Raises:
        MalformedFile: they do not, a key stands twice, the nesting is too deep, or other readers would not take it.
    """
    try:
        value = json.loads(
            without_mark(data, file=file).decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_float=_finite,
            parse_int=_whole,
        )
        if b"\\u" in data and not half_characters:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#04x}"
        raise MalformedFile(
            "not valid JSON", file=file, expected="UTF-8", found=found, remedy="save it as UTF-8"
        ) from error
    except RecursionError as error:
        raise MalformedFile(
            "not valid JSON",
            file=file,
            found="brackets within brackets, deeper than any reader goes",
            remedy="no checkpoint has such; take the file from its release again",
        ) from error
    except ValueError as error:
        raise MalformedFile("not valid JSON", file=file, found=str(error)[:200]) from error
    if not isinstance(value, dict):
        raise MalformedFile("not a JSON object", file=file, found=type(value).__name__)
    return value
