"""Items side by side in rows of one length, so that no time is spent on padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from k2quant.nano import tasks, vocabulary
from k2quant.nano.tasks import Item

ROW = 64
"""Tokens of a row: two to four items."""

NO_TARGET = -100
"""Target of a token after which nothing is to be learnt, as `cross_entropy` wants it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Rows of items; all tensors are int64 `[rows, ROW]`."""

    tokens: Tensor
    positions: Tensor
    """Within the item; where they begin again, transformers lets no token look back."""
    targets: Tensor
    """The next token where it belongs to an answer, else `NO_TARGET`."""

    def parts(self, count: int) -> list[Batch]:
        """Return the rows in so many batches, as equal as can be."""
        pieces = (tensor.tensor_split(count) for tensor in (self.tokens, self.positions, self.targets))
        return [
            Batch(tokens=tokens, positions=positions, targets=targets)
            for tokens, positions, targets in zip(*pieces, strict=True)
        ]


def tokens_of(item: Item) -> tuple[list[int], list[int]]:
    """Return an item's tokens, BOS to the last of its answer, and for each the next one if it is to be answered."""
    question = [vocabulary.BOS, *vocabulary.encode(item.question)]
    answer = [*vocabulary.encode(item.answer), vocabulary.EOS]
    return question + answer[:-1], [NO_TARGET] * (len(question) - 1) + answer


def mixture(seed: int) -> Iterator[Item]:
    """Yield items to train on without end: every family and level equally often, in a random order."""
    kinds = [(family, level) for family in tasks.FAMILIES for level in tasks.LEVELS]
    streams = [tasks.stream(family, level, seed=seed, split="train") for family, level in kinds]
    random = Random(f"mixture {seed}")  # noqa: S311 - items, no secrets
    while True:
        yield from map(next, random.sample(streams, len(streams)))


def batches(items: Iterable[Item], rows: int) -> Iterator[Batch]:
    """Yield batches of `rows` rows, filled with items in their order."""
    filled: list[list[tuple[int, int, int]]] = [[]]
    for item in items:
        cells = [(token, place, target) for place, (token, target) in enumerate(zip(*tokens_of(item), strict=True))]
        if len(filled[-1]) + len(cells) > ROW:
            if len(filled) == rows:
                yield _batch(filled)
                filled = []
            filled.append([])
        filled[-1] += cells


def _batch(rows: list[list[tuple[int, int, int]]]) -> Batch:
    padding = [(vocabulary.PAD, place, NO_TARGET) for place in range(ROW)]
    cells = torch.tensor([row + padding[: ROW - len(row)] for row in rows])
    tokens, positions, targets = cells.unbind(-1)
    return Batch(tokens=tokens, positions=positions, targets=targets)
