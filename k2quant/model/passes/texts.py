"""The text on which two models are compared: read from a file, as tokens, in chunks that know nothing of each other."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from k2quant.checkpoint.files.paths import read_limited
from k2quant.errors import CheckpointError, K2QuantError, MalformedFile, UsageError
from k2quant.ground.saying.faults import said
from k2quant.model.passes.rows import SUFFIX, parse_rows

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
    scored: tuple[Tensor, ...]
    """bool `[B, T - 1]` for each batch: whether the next token is one to be predicted; those of prompts are not."""
    completions: bool
    """Whether there are prompts, so that only what follows them is scored."""
    unread: str
    """Characters of the text that its tokenizer passes over in silence, each once."""

    @property
    def chunks(self) -> int:
        """How many there are."""
        return sum(len(batch) for batch in self.batches)

    @property
    def predictions(self) -> int:
        """Tokens that are predicted: all but the first of each chunk, and all but the prompts'."""
        return sum(int(some.sum()) for some in self.scored)


class _Chunk(NamedTuple):
    """Tokens that a model reads at once."""

    ids: list[int]
    first: int
    """The number of the first token that is to be predicted, at least 1: those before it are context."""


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
        path: a plain text file in UTF-8; or, if its name ends in `.jsonl`, rows as `rows` reads them, each a text of
            its own, of which only completions are scored. None for the sample that k2quant brings.
        tokenizer: of transformers. Where it puts a token before every text, such as [BOS], each chunk begins with it.
        context: tokens of a chunk. A last piece below 100 is dropped, unless it is the only one. A row that is longer
            loses the beginning of its prompt, and the end of a completion that does not fit either.
        limit_tokens: how much of the text to read, prompts included; of rows, whole ones.
        lines: whether each line is a text of its own, and so a chunk, or several where it is longer than one.

    Raises:
        MalformedFile: the file cannot be read, is too large, or no text in UTF-8; or a row is none.
        CheckpointError: the tokenizer cannot read it.
        UsageError: an option makes no sense, or the text has fewer than 3 tokens, or not 2 to predict.
    """
    for name, value, least in (("context", context, 2), ("tokens", limit_tokens, _LEAST)):
        if type(value) is not int or value < least:
            raise UsageError(f"{name}: expected at least {least} tokens, found {value!r}")
    file = SAMPLE if path is None else Path(path)
    if file.suffix.lower() == SUFFIX:
        rows = parse_rows(_content(file), file, limit_tokens * _LETTERS)
        most = context * _LETTERS  # what cannot fit into a chunk need not become tokens
        parts = [part for row in rows for part in (row.prompt[-most:], row.completion[:most])]
        ids, first, unread = _tokens(parts, tokenizer, file)
        chunks = _completions(ids, first, context, limit_tokens)
        ids = ids[1::2]
    else:
        rows = []
        text = _characters(file)[: limit_tokens * _LETTERS]
        parts = [line for line in text.splitlines() if line.strip()] if lines else [text]
        ids, first, unread = _tokens(parts, tokenizer, file)
        chunks = _pieces(ids, first, context, limit_tokens)
    what = "completions" if rows else "a text"
    if sum(len(chunk.ids) - chunk.first for chunk in chunks) < _LEAST - 1:
        raise UsageError(f"{file}: expected {what} of at least {_LEAST} tokens, found {sum(map(len, ids))}")
    batches, counted = _batches(chunks)
    return Text(
        name=file.name,
        hash=_hash(chunks),
        batches=batches,
        scored=counted,
        completions=any(row.prompt for row in rows),
        unread=unread,
    )


def _pieces(ids: list[list[int]], first: list[int], context: int, limit: int) -> list[_Chunk]:
    """Cut the tokens of plain texts into chunks, all of whose tokens are scored."""
    chunks: list[list[int]] = []
    count = 0
    for own in ids:
        kept = own[: limit - count]
        count += len(kept)
        chunks += [[*first, *piece] for piece in _cut(kept, max(context - len(first), 2))]
    return [_Chunk(chunk, 1) for chunk in chunks if len(chunk) > 1] if count >= _LEAST else []


def _completions(ids: list[list[int]], first: list[int], context: int, limit: int) -> list[_Chunk]:
    """Make a chunk of each prompt and its completion."""
    chunks: list[_Chunk] = []
    size, count = max(context - len(first), 2), 0
    for prompt, completion in zip(ids[::2], ids[1::2], strict=True):
        room = max(size - len(completion), size // 2)
        before = [*first, *prompt[max(len(prompt) - room, 0) :]]
        chunk = [*before, *completion][: size + len(first)]
        count += len(chunk) - len(first)
        if count > limit and chunks:
            break
        start = max(len(before), 1)
        if len(chunk) > start:
            chunks.append(_Chunk(chunk, start))
    return chunks


def _content(file: Path) -> bytes:
    try:
        return read_limited(file, _LIMIT)
    except OSError as error:
        raise MalformedFile("cannot be read", file=file, found=error.strerror) from error


def _characters(file: Path) -> str:
    try:
        text = _content(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte {error.object[error.start]:#04x} at {error.start}"
        raise MalformedFile("no plain text", file=file, expected="UTF-8", found=found) from error
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
        raise CheckpointError("the tokenizer cannot read it", file=file, found=said(error)) from error
    first = [framed[0]] if len(framed) > 1 and framed[0] == tokenizer.bos_token_id else []
    return list(ids), first, "".join(character for character, own in zip(seen, alone, strict=True) if not own)


def _cut(ids: list[int], size: int) -> list[list[int]]:
    """Cut tokens into pieces; no piece is too short to predict anything."""
    pieces = [ids[start : start + size] for start in range(0, len(ids), size)]
    if len(pieces) > 1 and len(pieces[-1]) < min(_LAST, size):
        pieces.pop()
    return pieces


def _batches(chunks: list[_Chunk]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Put chunks of equal length together, as many as a batch may have; and say of each token what is scored."""
    groups: dict[int, list[_Chunk]] = {}
    for chunk in chunks:
        groups.setdefault(len(chunk.ids), []).append(chunk)
    parts = [
        group[start : start + rows]
        for size, group in groups.items()
        for rows in [max(_AT_ONCE // size, 1)]
        for start in range(0, len(group), rows)
    ]
    batches = tuple(torch.tensor([chunk.ids for chunk in part], dtype=torch.int64) for part in parts)
    return batches, tuple(_scored(part) for part in parts)


def _scored(chunks: list[_Chunk]) -> Tensor:
    firsts = torch.tensor([chunk.first for chunk in chunks])
    return torch.arange(1, len(chunks[0].ids)) >= firsts[:, None]


def _hash(chunks: list[_Chunk]) -> str:
    digest = hashlib.sha256()
    for chunk in chunks:
        prompt = f"{chunk.first} " if chunk.first > 1 else ""
        digest.update(f"{len(chunk.ids)} {prompt}".encode())
        digest.update(torch.tensor(chunk.ids, dtype=torch.int64).numpy().tobytes())
    return digest.hexdigest()
