"""The text on which two models are compared: read from a file, as tokens, in chunks that know nothing of each other."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k2quant.checkpoint.files.paths import read_limited
from k2quant.errors import CheckpointError, K2QuantError, MalformedFile, UsageError

SAMPLE = Path(__file__).with_name("sample_text.txt")
"""What is read when the user names no text: some of everything, written for this purpose."""

_LIMIT = 2**26
"""Bytes of a text file."""
_LAST = 100
"""Tokens below which a last chunk is dropped: it would be all beginnings, which nobody can predict."""
_LEAST = 3
"""Tokens of the shortest text: two predictions, so that there is a spread."""
_LETTERS = 64
"""Characters that are tokenised for each token that is wanted; a real token has about four."""
_AT_ONCE = 1024
"""Tokens of a batch, unless one chunk has more: its logits over K2's vocabulary are 300 MB in BF16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A text as a model reads it."""

    name: str
    """The file's name."""
    hash: str
    """SHA-256 of its token ids, chunk by chunk."""
    batches: tuple[Tensor, ...]
    """int64 `[B, T]`: each row a chunk, those of equal length together."""
    unread: str
    """Characters of the text that its tokenizer passes over in silence, each once."""

    @property
    def chunks(self) -> int:
        """How many there are."""
        return sum(len(batch) for batch in self.batches)

    @property
    def predictions(self) -> int:
        """Tokens that are predicted: all but the first of each chunk."""
        return sum(batch[:, 1:].numel() for batch in self.batches)


def read_text(
    path: str | os.PathLike[str] | None,
    tokenizer: Any,
    *,
    context: int = 512,
    limit_tokens: int = 4096,
    lines: bool = False,
) -> Text:
    """Read a text, tokenise it and cut it into chunks.

    Args:
        path: a plain text file in UTF-8, whatever its name; None for the sample that k2quant brings.
        tokenizer: of transformers. Where it puts a token before every text, such as [BOS], each chunk begins with it.
        context: tokens of a chunk. A last piece below 100 is dropped, unless it is the only one.
        limit_tokens: how much of the text to read.
        lines: whether each line is a text of its own, and so a chunk, or several where it is longer than one.

    Raises:
        MalformedFile: the file cannot be read, is too large, or no text in UTF-8.
        CheckpointError: the tokenizer cannot read it.
        UsageError: an option makes no sense, or the text has fewer than 3 tokens.
    """
    for name, value, least in (("context", context, 2), ("tokens", limit_tokens, _LEAST)):
        if type(value) is not int or value < least:
            raise UsageError(f"{name}: expected at least {least}, found {value!r}")
    file = SAMPLE if path is None else Path(path)
    text = _characters(file)[: limit_tokens * _LETTERS]
    parts = [line for line in text.splitlines() if line.strip()] if lines else [text]
    ids, first, unread = _tokens(parts, tokenizer, file)
    chunks: list[list[int]] = []
    count = 0
    for own in ids:
        kept = own[: limit_tokens - count]
        count += len(kept)
        chunks += [[*first, *piece] for piece in _cut(kept, max(context - len(first), 2))]
    chunks = [chunk for chunk in chunks if len(chunk) > 1]
    if count < _LEAST or sum(len(chunk) - 1 for chunk in chunks) < _LEAST - 1:
        raise UsageError(f"{file}: expected a text of at least {_LEAST} tokens, found {count}")
    return Text(name=file.name, hash=_hash(chunks), batches=_batches(chunks), unread=unread)


def _characters(file: Path) -> str:
    try:
        text = read_limited(file, _LIMIT).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#04x} at {error.start}"
        raise MalformedFile("no plain text", file=file, expected="UTF-8", found=found) from error
    except OSError as error:
        raise MalformedFile("cannot be read", file=file, found=error.strerror) from error
    if "\0" in text:
        raise MalformedFile("no plain text", file=file, expected="UTF-8", found="a character of code 0")
    return text


def _tokens(parts: list[str], tokenizer: Any, file: Path) -> tuple[list[list[int]], list[int], str]:
    """Return the tokens of each part, what the tokenizer puts before it, and the characters that it passes over."""
    seen = [character for character in dict.fromkeys("".join(parts)) if not character.isspace()]
    try:
        ids = tokenizer(parts, add_special_tokens=False, verbose=False).input_ids if parts else []
        alone = tokenizer(seen, add_special_tokens=False).input_ids if seen else []
        framed = tokenizer("a").input_ids
    except (KeyboardInterrupt, SystemExit, K2QuantError):
        raise
    except BaseException as error:  # compiled code of a tokenizer may panic
        found = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError("the tokenizer cannot read it", file=file, found=found) from error
    first = [framed[0]] if len(framed) > 1 and framed[0] == tokenizer.bos_token_id else []
    return list(ids), first, "".join(character for character, own in zip(seen, alone, strict=True) if not own)


def _cut(ids: list[int], size: int) -> list[list[int]]:
    """Cut tokens into pieces; no piece is too short to predict anything."""
    pieces = [ids[start : start + size] for start in range(0, len(ids), size)]
    if len(pieces) > 1 and len(pieces[-1]) < min(_LAST, size):
        pieces.pop()
    return pieces


def _batches(chunks: list[list[int]]) -> tuple[Tensor, ...]:
    """Put chunks of equal length together, as many as a batch may have."""
    groups: dict[int, list[list[int]]] = {}
    for chunk in chunks:
        groups.setdefault(len(chunk), []).append(chunk)
    return tuple(
        torch.tensor(group[start : start + rows], dtype=torch.int64)
        for size, group in groups.items()
        for rows in [max(_AT_ONCE // size, 1)]
        for start in range(0, len(group), rows)
    )


def _hash(chunks: list[list[int]]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(f"{len(chunk)} ".encode())
        digest.update(torch.tensor(chunk, dtype=torch.int64).numpy().tobytes())
    return digest.hexdigest()
