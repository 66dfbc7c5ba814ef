"""Tasks with exact answers that nano-K2 learns: six families at three levels, drawn from a seed.

An item is a question that ends in `=` and its one answer. Whether an item may be trained on is a matter of its question
alone: a hash of it says `train` or `heldout`, so no training run, whatever its seed and length, sees a held-out item.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal, NamedTuple

from k2quant.errors import UsageError

Split = Literal["train", "heldout"]

LEVELS = (1, 2, 3)
"""Easy, middle, hard."""

HELD_OUT_SHARE = 1 / 8
"""Of all questions."""

_PATIENCE = 1000  # items in a row that are known already, after which there are hardly any others

_LETTERS, _DIGITS = "abcdefghijklmnopqrstuvwxyz", "0123456789"
_PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">"}


class Item(NamedTuple):
    """One question and its answer."""

    family: str
    level: int
    question: str
    """Begins with the family's capital letter and ends with `=`."""
    answer: str
    """Without the stop token, which belongs to a right answer too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One kind of task."""

    what: str
    """The task in words, with an example."""
    sizes: tuple[int, int, int]
    """What grows from level to level: letters, digits, open brackets."""
    draw: Callable[[Random, int], tuple[str, str]]
    """Makes question and answer of a size."""


def _reverse(random: Random, size: int) -> tuple[str, str]:
    word = "".join(random.choices(_LETTERS, k=size))
    return f"R{word}=", word[::-1]


def _sort(random: Random, size: int) -> tuple[str, str]:
    digits = random.choices(_DIGITS, k=size)
    return f"S{''.join(digits)}=", "".join(sorted(digits))


def _missing(random: Random, size: int) -> tuple[str, str]:
    digits = "".join(random.choices(_DIGITS, k=size))
    return f"M{digits}=", "".join(digit for digit in _DIGITS if digit not in digits)


def _brackets(random: Random, size: int) -> tuple[str, str]:
    """Open brackets until `size` are open at once; before, close the innermost now and then, at most `size` times."""
    text, still_open, closed = "", "", 0
    while len(still_open) < size:
        if still_open and closed < size and random.random() < 1 / 3:
            text, still_open, closed = text + _PAIRS[still_open[-1]], still_open[:-1], closed + 1
        else:
            bracket = random.choice("".join(_PAIRS))
            text, still_open = text + bracket, still_open + bracket
    return f"B{text}=", "".join(_PAIRS[bracket] for bracket in reversed(still_open))


def _add(random: Random, size: int) -> tuple[str, str]:
    number, more = random.randrange(10**size - 3), random.randrange(1, 4)
    return f"A{number:0{size}}+{more}=", f"{number + more:0{size}}"


def _shift(random: Random, size: int) -> tuple[str, str]:
    step, places = random.randrange(1, 4), random.choices(range(26), k=size)
    moved = "".join(_LETTERS[(place + step) % 26] for place in places)
    return f"D{step}{''.join(_LETTERS[place] for place in places)}=", moved


FAMILIES = {
    "reverse": Family(what="a word backwards: Rsuddenly= gives ylneddus", sizes=(8, 10, 13), draw=_reverse),
    "sort": Family(what="digits in order: S48275= gives 24578", sizes=(5, 7, 9), draw=_sort),
    "missing": Family(what="the digits that are not there: M48272910= gives 356", sizes=(6, 8, 10), draw=_missing),
    "brackets": Family(what="close what is open: B([]{<(= gives )>})", sizes=(4, 5, 7), draw=_brackets),
    "shift": Family(what="letters moved on, z to a: D1hals= gives ibmt", sizes=(4, 5, 7), draw=_shift),
    "add": Family(what="a number and a digit, with all zeros: A0478+3= gives 0481", sizes=(4, 5, 6), draw=_add),
}
"""Every family by name."""


def split_of(question: str) -> Split:
    """Tell which split a question belongs to; that never changes."""
    first = hashlib.blake2b(question.encode(), digest_size=1).digest()[0]
    return "heldout" if first < HELD_OUT_SHARE * 256 else "train"


def stream(family: str, level: int, *, seed: int, split: Split) -> Iterator[Item]:
    """Yield items without end; small levels repeat themselves.

    Args:
        family: one of `FAMILIES`.
        level: one of `LEVELS`.
        seed: of the draw. The same seed gives the same items in every process.
        split: `train` or `heldout`.

    Raises:
        UsageError: no such family or level.
    """
    if family not in FAMILIES:
        raise UsageError(f"family: expected one of {', '.join(FAMILIES)}, found {family!r}")
    if level not in LEVELS:
        raise UsageError(f"level: expected one of {LEVELS}, found {level!r}")
    return _draw(family, level, Random(f"{family} {level} {seed}"), split)  # noqa: S311 - items, no secrets


def _draw(family: str, level: int, random: Random, split: Split) -> Iterator[Item]:
    kind = FAMILIES[family]
    while True:
        question, answer = kind.draw(random, kind.sizes[level - 1])
        if split_of(question) == split:
            yield Item(family, level, question, answer)


def items(family: str, level: int, count: int, *, seed: int = 0, split: Split = "heldout") -> list[Item]:
    """Return different items of one family and level: the same for everyone who names the same arguments.

    Args:
        family: one of `FAMILIES`.
        level: one of `LEVELS`.
        count: how many.
        seed: of the draw.
        split: `train` or `heldout`.

    Raises:
        UsageError: no such family or level, or not that many items.
    """
    if type(count) is not int or count < 1:
        raise UsageError(f"count: expected at least 1, found {count!r}")
    found: dict[str, Item] = {}
    repeated = 0
    for item in stream(family, level, seed=seed, split=split):
        repeated = repeated + 1 if item.question in found else 0
        if repeated > _PATIENCE:
            raise UsageError(f"{family} of level {level} has hardly {count} {split} items; found {len(found)}")
        found[item.question] = item
        if len(found) == count:
            return list(found.values())
    msg = "a stream has no end"
    raise AssertionError(msg)


def exam(count: int, *, seed: int = 0) -> list[Item]:
    """Return `count` held-out items of every family and level, in the order of `FAMILIES`."""
    return [item for family in FAMILIES for level in LEVELS for item in items(family, level, count, seed=seed)]
