"""All answers of a task as columns: what a gate needs of each, in a hundred bytes instead of kilobytes of text."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from k2quant.eval.runs.answers import Item
from k2quant.ground.saying.showing import brief

_DIGEST = 16  # bytes: two of a million answers share one with a chance of 1e-27
_MOST_CHOICES = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Columns:
    """One entry for each answer, ordered by document and then by repeat; each document has as many answers."""

    repeats: int
    """Answers to each item."""
    doc_id: NDArray[np.int64]
    document: NDArray[np.bytes_]
    """`S16`, a digest of the document."""
    key: NDArray[np.bytes_]
    """`S16`, a digest of document, prompt and target."""
    output: NDArray[np.bytes_]
    """`S16`, a digest of the raw responses."""
    right: NDArray[np.bool_]
    cut: NDArray[np.bool_]
    """Whether an answer never left its reasoning."""
    looked: bool
    """Whether anybody looked for that."""
    hollow: NDArray[np.bool_]
    choices: NDArray[np.int32]
    """Of a multiple choice, how many there are; 0 where the model wrote its answer."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    @property
    def items(self) -> int:
        """How many items were asked."""
        return len(self.doc_id) // self.repeats

    def of_items(self, column: NDArray[Any]) -> NDArray[Any]:
        """Return what a column says of each item where it says the same of all its answers: `[items]`."""
        return column[:: self.repeats]

    def counted(self, column: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return how many answers to each item a column marks: int64 `[items]`."""
        counts: NDArray[np.int64] = column.reshape(-1, self.repeats).sum(axis=1, dtype=np.int64)
        return counts


class Stored(Sequence[Item]):
    """Answers whose texts lie elsewhere, and whose columns are at hand."""

    columns: Columns


class Growing:
    """Columns while answers come in, in any order."""

    def __init__(self) -> None:
        """Begin without any."""
        self.doc_ids, self.repeats, self.choices = array("q"), array("q"), array("i")
        self._documents, self._keys, self._outputs = bytearray(), bytearray(), bytearray()
        self._cut, self._hollow = bytearray(), bytearray()
        self._looked = False

    def add(self, item: Item) -> None:
        """Take an answer in; whether it is right is said at the end."""
        self.doc_ids.append(item.doc_id)
        self.repeats.append(item.repeat)
        self.choices.append(min(item.choices or 0, _MOST_CHOICES))
        document, key, output = digests(item)
        self._documents += document
        self._keys += key
        self._outputs += output
        self._cut.append(item.cut_in_thought is True)
        self._hollow.append(item.hollow)
        self._looked |= item.cut_in_thought is not None

    def order(self) -> NDArray[np.int64]:
        """Return the places of the answers by document, then repeat; those that stand twice as they came."""
        return np.lexsort((self.repeats, self.doc_ids))

    def columns(self, order: NDArray[np.int64], right: bytearray, repeats: int) -> Columns:
        """Return the columns.

        Args:
            order: as `order` gives it.
            right: a byte for each answer as it came.
            repeats: how many there are of each item.
        """

        def ordered(content: Any, dtype: Any) -> NDArray[Any]:
            return np.frombuffer(content, dtype)[order]

        return Columns(
            repeats=repeats,
            doc_id=ordered(self.doc_ids, np.int64),
            document=ordered(self._documents, f"S{_DIGEST}"),
            key=ordered(self._keys, f"S{_DIGEST}"),
            output=ordered(self._outputs, f"S{_DIGEST}"),
            right=ordered(right, np.bool_),
            cut=ordered(self._cut, np.bool_),
            looked=self._looked,
            hollow=ordered(self._hollow, np.bool_),
            choices=ordered(self.choices, np.int32),
        )


def columns_of(items: Sequence[Item]) -> Columns:
    """Return the columns of items that are in memory, as they are ordered there."""
    growing = Growing()
    for item in items:
        growing.add(item)
    right = bytearray(item.right for item in items)
    repeats = 1 + max((item.repeat for item in items), default=0)
    return growing.columns(np.arange(len(items)), right, repeats)


def digests(item: Item) -> tuple[bytes, bytes, bytes]:
    """Return what columns know of the words of an item: digests of its document, its key and its output."""
    return _digest([item.key.doc_hash]), _digest(item.key), _digest([item.output_digest])


def _digest(words: Iterable[str]) -> bytes:
    # Each with its length, so that no two lists of words look the same.
    joined = "".join(f"{len(word)}:{word}" for word in words).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(joined, digest_size=_DIGEST).digest()
