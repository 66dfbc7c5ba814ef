"""Suspects from groups of weights: the name of a group, as people would say it, and how many tensors it has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from k2quant.eval.drift.findings import Suspect
from k2quant.eval.statistics.group_testing import Found
from k2quant.model.passes.mixture import Part


def suspects(found: Iterable[Found], changed: Sequence[Part]) -> tuple[Suspect, ...]:
    """Return groups of weights, numbered as in `changed`, under the names that people would give them."""
    return tuple(suspect(one, changed, _title([changed[part] for part in one.parts], changed)) for one in found)


def kind_of(found: Found, changed: Sequence[Part]) -> str:
    """Return the tensor class of a group's first weight."""
    return changed[min(found.parts)].kind


def suspect(found: Found, changed: Sequence[Part], name: str) -> Suspect:
    """Return a group of weights, numbered as in `changed`, under this name."""
    tensors = sum(len(changed[part].candidate.parts) for part in found.parts)
    return Suspect(name=name, tensors=tensors, share=found.share, interval=found.interval)


def _title(parts: Sequence[Part], changed: Sequence[Part]) -> str:
    """Name a group: `attention`, `attention of layer 3`, `experts 4-7 of layer 3`, or the one weight."""
    if len(parts) == 1:
        return parts[0].name
    kind, layers, experts = parts[0].kind, {part.key[1] for part in parts}, {part.key[2] for part in parts}
    if len(layers) > 1:
        whole = len(parts) == sum(part.kind == kind for part in changed)
        return kind if whole else f"{kind} of layers {_ranges(layers)}"
    where = f"layer {min(layers)}"
    if len(experts) == 1 and experts != {-1}:
        where = f"expert {min(experts)} of {where}"
    level = 3 if where.startswith("expert") else 2
    if len(parts) == sum(part.key[:level] == parts[0].key[:level] for part in changed):
        return where if level == 3 else f"{kind} of {where}"
    if len(experts) > 1:
        return f"experts {_ranges(experts)} of {where}"
    return f"{', '.join(sorted(part.name.rpartition('.')[2] for part in parts))} of {where}"


def _ranges(numbers: Iterable[int]) -> str:
    """Return numbers as people write them: `1, 3-5`; -1, for weights outside the layers, comes last in words."""
    runs: list[list[int]] = []
    inside = set(numbers)
    outside = " and outside them" if -1 in inside else ""
    for number in sorted(inside - {-1}):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs) + outside
