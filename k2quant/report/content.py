"""What a report is about, with the sums that the page shows."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from datetime import datetime
from heapq import nsmallest
from math import prod
from typing import Any, NamedTuple, TypeVar

from k2quant.formats.bf16 import Bf16
from k2quant.formats.known import FORMATS
from k2quant.ground.names import TENSOR_CLASSES
from k2quant.ground.saying.showing import brief
from k2quant.kernels.codecs.figures import Figures
from k2quant.merge.figures import MergeFigures
from k2quant.report.choices.beside import Beside
from k2quant.report.choices.budgets import Budget
from k2quant.report.choices.searches import Fold, Scales, Search
from k2quant.report.origins import Exported, Origin, Unknown, label


class Way(NamedTuple):
    """What was done with a tensor."""

    source: str | None
    """Its format before; None for one that is no weight."""
    target: str | None
    """Its format afterwards; None for one that stays in its own."""
    substituted: bool = False
    """Whether other values took the place of the source's: trained ones, or those with an update added."""

    @property
    def copied(self) -> bool:
        """Whether every byte is the source's."""
        return self.target is None and not self.substituted

    @property
    def coded(self) -> bool:
        """Whether it stands in the output as codes and scales."""
        return self.written is not None and FORMATS[self.written].quantised

    @property
    def written(self) -> str | None:
        """The format in which it stands in the output; None for a tensor that is no weight."""
        return self.target or self.source


NARROWED = Way(Bf16.name, Bf16.name)
"""The way of F16 and F32 weights that became BF16; a weight that is BF16 already is copied."""

_Key = TypeVar("_Key", bound=Hashable)


class Tensor(NamedTuple):
    """One tensor that was converted or copied."""

    name: str
    kind: str
    """One of `TENSOR_CLASSES`."""
    layer: int | None
    way: Way
    shape: tuple[int, ...]
    figures: Figures | None
    """What rounding did, where there was rounding; of an export's tensor that moved, how far it is from the base's."""
    update: MergeFigures | None = None
    """What rounding left of an update."""
    scales: Scales | None = None
    """What a search of its scales came to."""
    fold: Fold | None = None
    """What was tried of moving powers of two between it and its neighbour."""


@dataclass(slots=True)
class Sum:
    """What some tensors come to together."""

    tensors: int = 0
    values: int = 0
    figures: Figures | None = None
    """Of those that were rounded; None where none was."""
    updated: int = 0
    """How many of them have figures of an update."""
    update: MergeFigures | None = None
    """Theirs."""
    lowest: float = math.inf
    """SQNR of the worst tensor among them, dB."""
    highest: float = -math.inf
    """SQNR of the best, dB; infinite where one lost nothing."""

    def add(self, tensor: Tensor) -> None:
        """Count a tensor."""
        self.tensors += 1
        self.values += prod(tensor.shape)
        figures = tensor.figures
        if figures is not None:
            ratio = figures.sqnr_db
            self.figures = self.figures + figures if self.figures else figures
            self.lowest = min(self.lowest, ratio)
            self.highest = max(self.highest, ratio)
        if tensor.update is not None:
            self.updated += 1
            self.update = self.update + tensor.update if self.update else tensor.update

    def merge(self, other: Sum) -> None:
        """Count what another sum has counted."""
        self.tensors += other.tensors
        self.values += other.values
        if other.figures is not None:
            self.figures = (self.figures or Figures()) + other.figures
        if other.update is not None:
            self.updated += other.updated
            self.update = self.update + other.update if self.update else other.update
        self.lowest = min(self.lowest, other.lowest)
        self.highest = max(self.highest, other.highest)


class Cell(NamedTuple):
    """The finest grain that the page shows."""

    kind: str
    way: Way
    layer: int | None


@dataclass(slots=True, kw_only=True)
class Report:
    """A report, checked, and its sums."""

    source_name: str
    version: str
    finished: datetime
    seconds: float
    bytes_read: int
    bytes_written: int
    options: dict[str, Any]
    source: dict[str, Any]
    """The source's fingerprint."""
    origin: Origin
    """Whose values the output has."""
    remarks: tuple[str, ...]
    """What was said of source and output, though it stopped nothing."""
    tensors: list[Tensor]
    rules: tuple[str, ...] = ()
    """What each rule of a recipe says, in a line; none where a format was asked for."""
    search: Search | None = None
    """How scales were searched; None where they were rounding's."""
    budget: Budget | None = None
    """How bits were shared out; None where each weight in scope got the same."""
    beside: Beside = field(default_factory=lambda: Beside(None, None, None))
    """What stands beside the weights."""
    cells: dict[Cell, Sum] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    def __post_init__(self) -> None:
        for tensor in self.tensors:
            self.cells.setdefault(Cell(tensor.kind, tensor.way, tensor.layer), Sum()).add(tensor)

    def sums(self, key: Callable[[Cell], _Key]) -> dict[_Key, Sum]:
        """Add up the cells that have the same key."""
        found: dict[_Key, Sum] = {}
        for cell, total in self.cells.items():
            found.setdefault(key(cell), Sum()).merge(total)
        return found

    @property
    def to(self) -> str:
        """The format that was asked for, as people write it."""
        return label(self.options["to"], self.origin)

    @property
    def formats(self) -> str:
        """The formats that were asked for, as people write them: by a recipe those that are quantised."""
        asked = dict.fromkeys(re.split("[: ]", rule)[0] for rule in self.rules)
        quantised = [name.upper() for name in asked if name in FORMATS and FORMATS[name].quantised]
        return " and ".join(quantised) or self.to

    @property
    def moved(self) -> bool:
        """Whether the figures are how far training and rounding together took the weights: no error."""
        return isinstance(self.origin, Exported) and self.origin.moved

    @property
    def measured(self) -> bool:
        """Whether the report knows what became of every value: exports of earlier releases do not."""
        if isinstance(self.origin, Exported):
            return self.origin.measured
        return not isinstance(self.origin, Unknown)

    @property
    def figures(self) -> Figures | None:
        """What rounding did to all that was rounded; None where nothing was."""
        return self.sums(lambda _: None).get(None, Sum()).figures

    @property
    def exact(self) -> bool:
        """Whether no error was measured."""
        return self.figures is None or self.figures.exact

    @property
    def narrowed(self) -> int:
        """How many tensors were F16 or F32 and became BF16."""
        return self.sums(lambda cell: cell.way == NARROWED).get(True, Sum()).tensors

    def rows(self) -> dict[str, dict[Way, Sum]]:
        """Return the sums by class and way: classes in their usual order, what was rounded first."""
        found = self.sums(lambda cell: (cell.kind, cell.way))
        order = sorted(found, key=lambda key: (found[key].figures is None, key[1].copied, str(key)))
        return {
            kind: {way: found[kind, way] for other, way in order if other == kind}
            for kind in TENSOR_CLASSES
            if any(other == kind for other, _ in order)
        }

    def as_json(self) -> dict[str, Any]:
        """Return the sums by class and way as JSON holds them; an SQNR is None where nothing was rounded, or lost."""
        classes = [
            {
                "class": kind,
                "from": way.source,
                "to": way.target,
                "tensors": total.tensors,
                "values": total.values,
                "sqnr_db": _finite(total.figures.sqnr_db if total.figures else math.inf),
                "worst_sqnr_db": _finite(total.lowest),
            }
            for kind, ways in self.rows().items()
            for way, total in ways.items()
        ]
        return {
            "source_name": self.source_name,
            "version": self.version,
            "to": self.options["to"],
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "seconds": self.seconds,
            "classes": classes,
        }

    def layers(self) -> dict[str, dict[int, Sum]]:
        """Return the sums of what was rounded to codes by class and layer, both in order.

        What a training moved and nothing rounded is left out: on one scale with it, codes would be a flat line.
        """
        found = {
            (kind, layer): total
            for (kind, layer, coded), total in self.sums(lambda c: (c.kind, c.layer, c.way.coded)).items()
            if layer is not None and coded and total.figures is not None
        }
        return {
            kind: dict(sorted((layer, total) for (other, layer), total in found.items() if other == kind))
            for kind in TENSOR_CLASSES
            if any(other == kind for other, _ in found)
        }

    def updates(self) -> dict[str, dict[int | None, Sum]]:
        """Return the sums of what was updated by class and layer, both in order; None for what lies in no layer."""
        found = self.sums(lambda cell: (cell.kind, cell.layer))
        order = sorted(found, key=lambda key: (TENSOR_CLASSES.index(key[0]), -1 if key[1] is None else key[1]))
        by_kind: dict[str, dict[int | None, Sum]] = {}
        for kind, layer in order:
            if found[kind, layer].updated:
                by_kind.setdefault(kind, {})[layer] = found[kind, layer]
        return by_kind

    def worst(self, count: int) -> list[tuple[Tensor, Figures]]:
        """Return the tensors of the lowest SQNR among those that changed, lowest first."""
        changed = ((t, t.figures) for t in self.tensors if t.figures is not None and not t.figures.exact)
        return nsmallest(count, changed, key=lambda pair: (pair[1].sqnr_db, pair[0].name))

    def code_bytes(self) -> tuple[dict[str, int], dict[str, int]]:
        """Return the bytes of the codes, or of the weights where they are BF16, by format before and after.

        Scales are left out: their shapes follow from a source's blocks and groups, which no report names.
        """
        before, after = dict.fromkeys(FORMATS, 0), dict.fromkeys(FORMATS, 0)
        for (way, shape), count in Counter((tensor.way, tensor.shape) for tensor in self.tensors).items():
            for where, name in ((before, way.source), (after, way.written)):
                if name is not None:
                    stored = FORMATS[name].asked_for()
                    where[name] += count * stored.state(shape)[stored.main].nbytes
        return before, after


def _finite(ratio: float) -> float | None:
    return ratio if math.isfinite(ratio) else None
