"""Held-out answers: how many are wholly right, and what the right ones cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from k2quant.ground.intervals import wilson
from k2quant.nano import vocabulary
from k2quant.nano.batches import NO_TARGET, tokens_of
from k2quant.nano.tasks import Item

_AT_ONCE = 256  # items of a forward pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """A share of answers wholly right."""

    right: int
    count: int

    @property
    def share(self) -> float:
        """Right of all, 0 to 1."""
        return self.right / self.count

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of the share: where the accuracy on all held-out items plausibly lies."""
        return wilson(self.right, self.count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a model made of items; two scores of the same items can be compared item by item."""

    items: Sequence[Item]
    right: Sequence[bool]
    """For each item, whether greedy decoding gives its answer and then stops."""
    losses: Sequence[float]
    """For each item, the mean loss of its answer's tokens, stop token included, in nats."""

    @property
    def loss(self) -> tuple[float, float]:
        """The mean of the items' losses and its standard error, in nats."""
        return mean(self.losses)

    def accuracy(self, family: str | None = None, level: int | None = None) -> Accuracy:
        """Return how many items of a family and level are right; None for all."""
        chosen = [
            right
            for item, right in zip(self.items, self.right, strict=True)
            if family in {None, item.family} and level in {None, item.level}
        ]
        return Accuracy(right=sum(chosen), count=len(chosen))

    def known(self, most: int = 3) -> list[Item]:
        """Return items that are answered wholly right, each of another family, the surest first.

        Args:
            most: how many at most; a model that has learnt little knows fewer, or none.
        """
        right = [place for place, good in enumerate(self.right) if good]
        surest: dict[str, Item] = {}
        for place in sorted(right, key=lambda place: self.losses[place]):
            surest.setdefault(self.items[place].family, self.items[place])
        return list(surest.values())[:most]


def mean(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    middle = math.fsum(values) / len(values)
    square = math.fsum((value - middle) ** 2 for value in values) / max(1, len(values) - 1)
    return middle, math.sqrt(square / len(values))


@torch.no_grad()
def score(model: Any, items: Iterable[Item]) -> Score:
    """Answer items and say what is right.

    An answer is wholly right if greedy decoding gives its every character and then the stop token. That is so exactly
    when the likeliest token is the right one at every place behind the right ones before it: one forward pass tells.

    Args:
        model: any causal language model of transformers over nano-K2's tokens, on any device, in any dtype.
        items: such as `tasks.exam(64)`.
    """
    items = list(items)
    right, losses = [False] * len(items), [0.0] * len(items)
    order = sorted(range(len(items)), key=lambda place: len(items[place].question + items[place].answer))
    for first in range(0, len(order), _AT_ONCE):
        places = order[first : first + _AT_ONCE]
        answers = _answer(model, [items[place] for place in places])
        for place, good, loss in zip(places, *answers, strict=True):
            right[place], losses[place] = good, loss
    return Score(items=items, right=right, losses=losses)


def _answer(model: Any, items: list[Item]) -> tuple[list[bool], list[float]]:
    """Return for each item whether it is right, and the mean loss of its answer."""
    rows = [tokens_of(item) for item in items]
    # Nothing looks at what follows it, so padding at the right end needs no mask.
    tokens = _filled([row for row, _ in rows], vocabulary.PAD).to(model.device)
    targets = _filled([row for _, row in rows], NO_TARGET).to(model.device)
    logits = model(input_ids=tokens, use_cache=False).logits.float()
    asked = targets != NO_TARGET
    good = (logits.argmax(-1) == targets) | ~asked
    losses = functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=NO_TARGET)
    return good.all(1).tolist(), (losses.sum(1) / asked.sum(1)).tolist()


def _filled(rows: list[list[int]], filling: int) -> Tensor:
    """Return rows of different lengths as int64 `[rows, longest]`."""
    longest = max(map(len, rows))
    return torch.tensor([row + [filling] * (longest - len(row)) for row in rows])
