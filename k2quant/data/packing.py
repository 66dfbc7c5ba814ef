"""Documents side by side in rows of one length, and which rows an optimizer step takes."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from k2quant.data.learning import Census
from k2quant.errors import UsageError

NO_TARGET = -100
"""Target of a token after which nothing is to be learnt, as `cross_entropy` wants it."""

_SEEDS = 2**64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Document:
    """Tokens that see one another and nothing else."""

    tokens: NDArray[np.int32]
    """`[T]`, from the first to the last that is to be learnt."""
    learnt: NDArray[np.bool_]
    """`[T]`: whether a token is to be predicted from those before it. That of the first has no effect."""
    divisible: bool
    """Whether a document longer than a row goes on in the next one; otherwise the row ends it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """Packed documents; all tensors are int32 `[N, length]`.

    A model is to be given `positions` and no attention mask and no cache: then transformers lets no token look back
    past the last position 0, that is, into another document.
    """

    tokens: Tensor
    positions: Tensor
    """Within the document. Padding is a document of its own."""
    targets: Tensor
    """The next token where it is to be learnt, else `NO_TARGET`. Shifted already, unlike transformers' `labels`."""
    documents: int
    """How many there are; each piece of a long text is one."""
    learnt: int
    """How many targets there are."""
    cut: int
    """Examples of which only the beginning fits into a row. Of all that were read, in parts of a split too."""
    dropped: int
    """Examples left out because nothing of what they teach fits into a row. Of all that were read, as `cut`."""
    unread: str
    """Characters of the examples that the tokenizer passes over or does not know, each once."""
    digest: str
    """SHA-256 of the three tensors and their shape."""
    census: Census = field(default_factory=Census)
    """What the rows held that were read, in parts of a split too."""

    def notes(self) -> Iterator[str]:
        """Yield what the user should know of the data."""
        if self.cut:
            yield f"{self.cut} examples were longer than a row and were cut at its end"
        if self.dropped:
            yield f"{self.dropped} examples had nothing to learn within a row and were left out"
        if self.unread:
            yield f"the tokenizer does not know these characters: {self.unread[:50]!r}"
        yield from self.census.notes()


def pack(documents: Iterable[Document], *, length: int, padding: int) -> Rows:
    """Put documents into rows in their order; one that does not fit into what is left of a row begins the next.

    A document of T tokens takes T - 1 places, for the last token only is a target. Each target stands once.

    Args:
        documents: those without a target, or whose targets are all beyond the end of a row, are left out.
        length: tokens of a row, at least 2.
        padding: id of the token at the end of a row that is not full.

    Raises:
        UsageError: `length` is below 2.
    """
    if type(length) is not int or length < 2:
        raise UsageError(f"length: expected rows of at least 2 tokens, found {length!r}")
    pieces: list[_Piece] = []
    cut = dropped = 0
    for document in documents:
        own = _pieces(document, length)
        pieces += own
        dropped += not own
        cut += bool(own) and not document.divisible and len(document.tokens) - 1 > length
    cells = _laid_out(pieces, length, padding)
    return _rows(*(torch.from_numpy(part) for part in cells), cut=cut, dropped=dropped)


_Piece = tuple[NDArray[np.int32], NDArray[np.int32]]  # tokens and targets of a document that fits into a row


def _pieces(document: Document, length: int) -> list[_Piece]:
    tokens = document.tokens[:-1]
    targets = np.where(document.learnt[1:], document.tokens[1:], np.int32(NO_TARGET))
    starts = range(0, len(tokens), length) if document.divisible else (0,)
    spans = (slice(start, start + length) for start in starts)
    return [(tokens[span], targets[span]) for span in spans if (targets[span] != NO_TARGET).any()]


def _laid_out(pieces: list[_Piece], length: int, padding: int) -> tuple[NDArray[np.int32], ...]:
    """Return tokens, positions and targets, `[N, length]`."""
    places, ends = _places([len(tokens) for tokens, _ in pieces], length)
    shape = len(ends), length
    all_tokens, all_targets = np.full(shape, padding, np.int32), np.full(shape, NO_TARGET, np.int32)
    positions, steps = np.empty(shape, np.int32), np.arange(length, dtype=np.int32)
    for (tokens, targets), (row, start) in zip(pieces, places, strict=True):
        end = start + len(tokens)
        all_tokens[row, start:end], all_targets[row, start:end] = tokens, targets
        positions[row, start:end] = steps[: len(tokens)]
    for row, end in enumerate(ends):
        positions[row, end:] = steps[: length - end]
    return all_tokens, positions, all_targets


def _places(sizes: list[int], length: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Return row and column for each size, and the column at which each row's padding begins."""
    places: list[tuple[int, int]] = []
    ends: list[int] = []
    for size in sizes:
        if not ends or ends[-1] + size > length:
            ends.append(0)
        places.append((len(ends) - 1, ends[-1]))
        ends[-1] += size
    return places, ends


def _rows(tokens: Tensor, positions: Tensor, targets: Tensor, *, cut: int, dropped: int, unread: str = "") -> Rows:
    wanted = targets.numpy().ravel() != NO_TARGET
    starts = np.flatnonzero(positions.numpy().ravel() == 0)
    by_document = np.logical_or.reduceat(wanted, starts) if len(starts) else wanted
    digest = hashlib.sha256(f"{tuple(tokens.shape)} ".encode())
    for tensor in (tokens, positions, targets):
        digest.update(np.ascontiguousarray(tensor.numpy(), dtype="<i4").data)
    return Rows(
        tokens=tokens,
        positions=positions,
        targets=targets,
        documents=int(np.count_nonzero(by_document)),  # padding is the one that teaches nothing
        learnt=int(np.count_nonzero(wanted)),
        cut=cut,
        dropped=dropped,
        unread=unread,
        digest=digest.hexdigest(),
    )


def split(rows: Rows, held_out: int) -> tuple[Rows, Rows]:
    """Return the rows to train on and the last `held_out` rows, which are never trained on.

    A text longer than a row may have pieces on both sides of the line.

    Raises:
        UsageError: `held_out` is negative, or leaves nothing to train on.
    """
    most = len(rows.tokens) - 1
    if type(held_out) is not int or not 0 <= held_out <= most:
        raise UsageError(f"held_out: expected 0 to {most} of {most + 1} rows of training data, found {held_out!r}")
    return _part(rows, slice(0, most + 1 - held_out)), _part(rows, slice(most + 1 - held_out, None))


def _part(rows: Rows, span: slice) -> Rows:
    parts = (tensor[span] for tensor in (rows.tokens, rows.positions, rows.targets))
    found = _rows(*parts, cut=rows.cut, dropped=rows.dropped, unread=rows.unread)
    return replace(found, census=rows.census)


def order(step: int, count: int, per_step: int, seed: int) -> Tensor:
    """Return the rows of an optimizer step, a pure function of the arguments.

    Each epoch takes every row once, in an order of its own; a step may take its last rows from one epoch and the rest
    from the next. The numbers are the same everywhere: rows are sorted by raw words of Philox, which numpy promises
    never to change. Shuffling functions, numpy's and torch's alike, come with no such promise.

    Args:
        step: from 0.
        count: rows of the training data.
        per_step: rows of a step, over all ranks and micro-batches.
        seed: 0 to 2**64 - 1.

    Returns:
        int64 `[per_step]`, from 0 to `count - 1`.

    Raises:
        UsageError: an argument is out of its range.
    """
    for name, value, least in (("step", step, 0), ("rows", count, 1), ("rows of a step", per_step, 1)):
        if value < least:
            raise UsageError(f"{name}: expected at least {least}, found {value}")
    if not 0 <= seed < _SEEDS:
        raise UsageError(f"seed: expected 0 to 2**64 - 1, found {seed}")
    first, end = step * per_step, (step + 1) * per_step
    epochs = range(first // count, (end - 1) // count + 1)
    chosen = np.concatenate([_epoch(count, seed, epoch) for epoch in epochs])
    skipped = epochs[0] * count
    return torch.from_numpy(chosen[first - skipped : end - skipped].copy())


@functools.lru_cache(maxsize=2)  # the epoch that a step is in, and the next
def _epoch(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(count)
    return np.argsort(words, kind="stable").astype(np.int64)


def share(indices: Tensor, rank: int, world: int) -> Tensor:
    """Return the part of a step's rows that one process of a data-parallel job takes.

    Args:
        indices: `[per_step]`.
        rank: of the process, from 0.
        world: how many processes there are.

    Returns:
        `[per_step / world]`: the parts of all ranks, in their order, are `indices`.

    Raises:
        UsageError: there is no such rank, or the rows cannot be shared equally.
    """
    if not 0 <= rank < world:
        raise UsageError(f"rank: expected 0 to {world - 1}, found {rank}")
    if len(indices) % world:
        raise UsageError(f"rows of a step: expected a multiple of the {world} processes, found {len(indices)}")
    size = len(indices) // world
    return indices[rank * size : (rank + 1) * size]


def batch(rows: Rows, indices: Tensor) -> dict[str, Tensor]:
    """Return rows as a model takes them: `input_ids`, `position_ids`, and `targets` for the loss.

    Args:
        rows: of N rows.
        indices: int64 `[B]`, from 0 to N - 1.

    Returns:
        int64 `[B, length]` each. `input_ids` and `position_ids` go to the model, with `use_cache=False` and no mask.
    """
    parts = {"input_ids": rows.tokens, "position_ids": rows.positions, "targets": rows.targets}
    return {name: tensor.index_select(0, indices).long() for name, tensor in parts.items()}
