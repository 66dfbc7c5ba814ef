"""tiktoken.model: the tokens of a byte-pair encoding, a line each, `BASE64 RANK`; a file of people we do not know.

The rank of a token is its id, and the order in which pairs are merged. Special tokens follow behind the last rank.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable
from pathlib import Path

from k2quant.checkpoint.files.paths import read_limited
from k2quant.errors import MalformedFile

TIKTOKEN = "tiktoken.model"

_LIMIT = 2**24
"""Bytes of the file; that of K2 has 2.8 million."""
_MOST = 2**20
"""Tokens; K2 has 163,584."""
_LONGEST = 1024
"""Bytes of a token; the longest of K2 are runs of 128 blanks."""
_REMEDY = "take tiktoken.model from the model's release"


def read_ranks(path: Path) -> dict[bytes, int]:
    """Return the rank of each token.

    Raises:
        MalformedFile: a line is no token and its rank, a token or a rank stands twice, ranks leave a gap, one of the
            256 bytes is no token, or the file is larger than any vocabulary.
        OSError: it cannot be read.
    """
    data = read_limited(path, _LIMIT)
    if (ends := data.count(b"\n") + data.count(b"\r")) > _MOST:
        raise _wrong(
            path, "more tokens than any vocabulary", expected=f"at most {_MOST:,} tokens", found=f"{ends:,} lines"
        )
    lines = [(number, line) for number, line in enumerate(data.splitlines(), 1) if line]
    ranks: dict[bytes, int] = {}
    taken = bytearray(len(lines))
    for number, line in lines:
        token, rank = _entry(path, number, line)
        if rank >= len(lines):
            expected = f"ranks from 0 to {len(lines) - 1}, one for each line"
            raise _wrong(path, f"line {number}: a rank that leaves a gap", expected=expected, found=rank)
        if token in ranks or taken[rank]:
            what = "token" if token in ranks else "rank"
            raise _wrong(path, f"line {number}: a {what} stands twice", found=line[:100])
        ranks[token], taken[rank] = rank, 1
    _check_bytes(path, ranks)
    return ranks


def _entry(path: Path, number: int, line: bytes) -> tuple[bytes, int]:
    """Return the token and the rank of a line."""
    word, _, rank = line.partition(b" ")
    token = _decoded(word)
    if token is None or not rank.isdigit() or len(rank) > len(str(_MOST)):
        expected = "a token in base64, a blank and its rank"
        raise _wrong(path, f"line {number} is no token", expected=expected, found=line[:100])
    if not 0 < len(token) <= _LONGEST:
        expected = f"1 to {_LONGEST} bytes"
        raise _wrong(path, f"line {number}: the length of a token", expected=expected, found=len(token))
    return token, int(rank)


def _decoded(word: bytes) -> bytes | None:
    try:
        return base64.b64decode(word, validate=True)
    except binascii.Error:
        return None


def _check_bytes(path: Path, ranks: Iterable[bytes]) -> None:
    """Refuse ranks that cannot spell every text."""
    missing = sorted({bytes([value]) for value in range(256)} - set(ranks))
    if missing:
        found = f"{256 - len(missing)} of them; the first that is missing is {missing[0]!r}"
        raise _wrong(path, "not every byte is a token", expected="the 256 single bytes", found=found)


def _wrong(path: Path, message: str, *, expected: object = None, found: object = None) -> MalformedFile:
    return MalformedFile(message, file=path, expected=expected, found=found, remedy=_REMEDY)
