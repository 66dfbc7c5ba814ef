"""The rows that a model is calibrated on, in parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from k2quant.data.learning import Census
from k2quant.data.packing import NO_TARGET, Rows
from k2quant.ground.saying.showing import brief
from k2quant.ground.units import counted

PARTS = ("train", "validation", "test")
"""What is measured, what judges it, and what nobody looks at before the end."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """Packed documents. Those of a row do not see one another: each begins at position 0, and padding does too."""

    tokens: Tensor
    """int64 `[N, T]`."""
    positions: Tensor
    """int64 `[N, T]`, within the document."""
    real: Tensor
    """bool `[N, T]`: False for padding, which is not to be counted anywhere."""
    hashes: tuple[str, ...]
    """SHA-256 of each document in the rows, as `documents.hash_of` has it; in the order of the rows."""
    digest: str
    """SHA-256 of tokens, positions, which are real, and their shape."""

    @classmethod
    def of(cls, rows: Rows, hashes: tuple[str, ...]) -> Part:
        """Return packed documents as a part: whatever has a target is real."""
        real = rows.targets != NO_TARGET
        return cls(
            tokens=rows.tokens.long(), positions=rows.positions.long(), real=real, hashes=hashes, digest=rows.digest
        )

    @property
    def count(self) -> int:
        """Real tokens."""
        return int(torch.count_nonzero(self.real))

    def __repr__(self) -> str:
        """Return it in one line."""
        rows, length = self.tokens.shape
        return f"Part({counted(len(self.hashes), 'document')}, {self.count:,} tokens in {rows} rows of {length})"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """What a calibration reads."""

    train: Part
    """What is measured."""
    validation: Part
    """What judges each matrix: no statistic of it enters a scale."""
    test: Part
    """What a final figure may be taken on."""
    wanted: int
    """Rows that were asked for, of `train`."""
    duplicates: int
    """Documents that were left out since they stand in the same data before."""
    reasoning: str
    """What becomes of reasoning that the chat template drops: see `read_samples`."""
    census: Census
    """What the rows hold that were read."""
    unread: str
    """Characters of the documents that the tokenizer passes over or does not know, each once."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    @property
    def parts(self) -> dict[str, Part]:
        """All three, by name."""
        return {name: getattr(self, name) for name in PARTS}

    def notes(self) -> Iterator[str]:
        """Yield what the user should know of it."""
        rows, length = self.train.tokens.shape
        if rows < self.wanted:
            yield (
                f"the data has {self.train.count:,} tokens to measure in {counted(rows, 'row')}, and `samples=` asks "
                f"for {self.wanted:,} rows of {length:,}: all of it is read"
            )
        if self.duplicates:
            yield f"left out, since the data has them already: {counted(self.duplicates, 'document')}"
        if self.census.losing:
            what = {"split": "each such turn is read as it is asked for, with its reasoning", "drop": "it is left out"}
            yield (
                "given a whole conversation, the chat template drops reasoning: "
                f"{counted(self.census.losing, 'conversation')}; {what[self.reasoning]}"
            )
        if self.census.left_out:
            yield f"left out, since no turn of theirs has weight: {counted(self.census.left_out, 'conversation')}"
        if self.unread:
            yield f"the tokenizer does not know these characters: {self.unread[:50]!r}"
