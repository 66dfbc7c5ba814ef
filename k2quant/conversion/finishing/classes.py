"""What a conversion did to the classes of tensors, summed up from what a report says of each tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from k2quant.ground.names import TENSOR_CLASSES, tensor_class
from k2quant.kernels.codecs.figures import Figures


@dataclass(slots=True)
class Row:
    """Tensors of one class that went the same way."""

    kind: str
    """One of `TENSOR_CLASSES`."""
    source: str | None
    """Their format in the source; None for what is no weight."""
    target: str | None
    """What they were written in; None: they were copied."""
    substituted: bool
    """Whether their values are not the source's."""
    tensors: int = 0
    figures: Figures = field(default_factory=Figures)


def rows(tensors: Mapping[str, Any]) -> list[Row]:
    """Return a row for each class of tensors and each way that some of it went, in the order of `TENSOR_CLASSES`."""
    found: dict[tuple[str, str | None, str | None, bool], Row] = {}
    for name, facts in tensors.items():
        key = (tensor_class(name), facts["from"], facts["to"], bool(facts.get("substituted")))
        row = found.setdefault(key, Row(*key))
        row.tensors += 1
        row.figures += figures_of(facts)
    return sorted(found.values(), key=lambda row: TENSOR_CLASSES.index(row.kind))


def figures_of(facts: Mapping[str, Any]) -> Figures:
    """Return the figures of one tensor; of one that was not rounded, those of no weight."""
    said = facts.get("figures") or {}
    return Figures(**{each.name: said[each.name] for each in fields(Figures)}) if said else Figures()
