"""Which weights share a scale of whole matrices, so that one of them cannot be rounded without a look at the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from k2quant.formats.format import Format
from k2quant.ground import engines
from k2quant.qat.rounding.targets import Target


class Shared(NamedTuple):
    """What has one scale within a target, and beyond it."""

    parts: int
    """Parts of equal height of the target's rows, each with a scale: of a stack, an expert's gate and up are one."""
    partners: tuple[Target, ...]
    """Other targets, each one matrix, that have the scale of this one."""


def sharing(targets: Iterable[Target], written: Format) -> dict[str, Shared]:
    """Return what shares a scale, by the name of each target; nothing where the format has no such scale."""
    if not written.surveyed:
        return {}
    keys = {target: _keys(target, written) for target in targets}
    members: dict[str, list[Target]] = {}
    for target, found in keys.items():
        for key in found:
            members.setdefault(key, []).append(target)
    return {
        target.name: Shared(len(found), tuple(other for other in members[next(iter(found))] if other is not target))
        for target, found in keys.items()
    }


def _keys(target: Target, written: Format) -> dict[str, None]:
    """Return what tells the parts of a target with a scale each from one another, in their order."""
    return {
        (engines.scaled_together(part.base) if written.together else None) or part.base: None for part in target.parts
    }
