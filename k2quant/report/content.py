"""What a k2quant_report.json says, checked, with the sums that the page shows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from heapq import nsmallest
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from k2quant.checking.verify import read_report
from k2quant.checkpoint.files import json_kinds as kinds
from k2quant.errors import MalformedFile, ShapeMismatch
from k2quant.formats.bf16 import Bf16
from k2quant.formats.known import FORMATS
from k2quant.ground.names import TENSOR_CLASSES
from k2quant.kernels.codecs.figures import Figures

Way = tuple[str | None, str | None]
"""Formats before and after. Before: None for a tensor that is no weight. After: None for one that was copied."""

NARROWED: Way = (Bf16.name, Bf16.name)
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
    """What rounding did, where there was rounding."""


@dataclass(slots=True)
class Sum:
    """What some tensors come to together."""

    tensors: int = 0
    values: int = 0
    figures: Figures | None = None
    """Of those that were rounded; None where none was."""
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

    def merge(self, other: Sum) -> None:
        """Count what another sum has counted."""
        self.tensors += other.tensors
        self.values += other.values
        if other.figures is not None:
            self.figures = (self.figures or Figures()) + other.figures
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
    remarks: tuple[str, ...]
    """What was said of source and output, though it stopped nothing."""
    tensors: list[Tensor]
    cells: dict[Cell, Sum] = field(default_factory=dict)

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
        return str(self.options["to"]).upper()

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
        order = sorted(found, key=lambda key: (found[key].figures is None, key[1][1] is None, str(key)))
        return {
            kind: {way: found[kind, way] for other, way in order if other == kind}
            for kind in TENSOR_CLASSES
            if any(other == kind for other, _ in order)
        }

    def layers(self) -> dict[str, dict[int, Sum]]:
        """Return the sums of what was rounded by class and layer, both in order."""
        found = {
            (kind, layer): total
            for (kind, layer), total in self.sums(lambda cell: (cell.kind, cell.layer)).items()
            if layer is not None and total.figures is not None
        }
        return {
            kind: dict(sorted((layer, total) for (other, layer), total in found.items() if other == kind))
            for kind in TENSOR_CLASSES
            if any(other == kind for other, _ in found)
        }

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
            for where, name in ((before, way[0]), (after, way[1] or way[0])):
                if name is not None:
                    stored = FORMATS[name].asked_for()
                    where[name] += count * stored.state(shape)[stored.main].nbytes
        return before, after


def read(path: Path) -> Report:
    """Read a report, trusting nothing in it.

    Raises:
        MalformedFile: a part is missing or of the wrong kind.
    """
    report = read_report(path)
    try:
        return Report(
            source_name=kinds.text(report["source_name"]),
            version=kinds.text(report["version"]),
            finished=datetime.fromisoformat(kinds.text(report["finished"])).astimezone(UTC),
            seconds=kinds.number(report["seconds"]),
            bytes_read=kinds.whole(report["bytes_read"]),
            bytes_written=kinds.whole(report["bytes_written"]),
            options=_options(report["options"]),
            source=kinds.mapping(report["source"]),
            remarks=tuple(kinds.text(said) for said in kinds.values(report.get("remarks", []))),
            tensors=[_tensor(name, facts) for name, facts in report["tensors"].items()],
        )
    except KeyError as error:
        raise MalformedFile("lacks a part of a report", file=path, expected=error) from error
    except (ValueError, TypeError, OverflowError) as error:
        raise MalformedFile("a part is not what a report holds", file=path, found=str(error)[:200]) from error


def _tensor(name: str, facts: dict[str, Any]) -> Tensor:
    source, target, kind = facts["from"], facts["to"], facts["class"]
    if kind not in TENSOR_CLASSES or source not in {*FORMATS, None} or target not in {*FORMATS, None}:
        raise ValueError(f"class {kind!r}, from {source!r} to {target!r} of {name!r}")
    shape = tuple(kinds.whole(length, limit=2**40) for length in facts["shape"])
    if len(shape) > 8 or not all(_holds(form, shape) for form in (source, target) if form is not None):
        raise ValueError(f"shape {shape} of {name!r}")
    layer, figures = facts["layer"], facts.get("figures")
    if figures is not None:
        counts = (kinds.whole(figures[key]) for key in ("count", "changed"))
        figures = Figures(*counts, *(kinds.number(figures[key]) for key in ("energy", "error", "worst")))
    return Tensor(
        name, kind, None if layer is None else kinds.whole(layer, limit=10**6), (source, target), shape, figures
    )


def _holds(name: str, shape: tuple[int, ...]) -> bool:
    """Tell whether a weight of this shape can be in a format."""
    kind = FORMATS[name]
    if kind.quantised and len(shape) != 2:
        return False
    try:
        kind.asked_for().state(shape)
    except ShapeMismatch:
        return False
    return True


def _options(value: object) -> dict[str, Any]:
    options = kinds.mapping(value)
    shard_size = options["shard_size"]
    return {
        "to": FORMATS[kinds.text(options["to"])].name,
        "scope": None if options["scope"] is None else kinds.text(options["scope"]),
        "ignore": [kinds.text(pattern) for pattern in kinds.values(options["ignore"])],
        "grid": None if options["grid"] is None else kinds.text(options["grid"]),
        "layout": None if options.get("layout") is None else kinds.text(options["layout"]),  # older reports have none
        "shard_size": None if shard_size is None else kinds.whole(shard_size),
    }
