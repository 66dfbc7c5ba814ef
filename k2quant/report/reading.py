"""A k2quant_report.json, read and checked."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from k2quant.checking.verify import read_report
from k2quant.checkpoint.files import json_kinds as kinds
from k2quant.conversion.recipes.rules import recipe_from
from k2quant.errors import MalformedFile, ShapeMismatch, UsageError
from k2quant.formats.known import FORMATS
from k2quant.ground.names import TENSOR_CLASSES
from k2quant.kernels.codecs.figures import Figures
from k2quant.merge.figures import MergeFigures
from k2quant.report.choices.beside import read_beside
from k2quant.report.choices.budgets import read_budget
from k2quant.report.choices.searches import read_fold, read_scales, read_search
from k2quant.report.content import Report, Tensor, Way
from k2quant.report.origins import Exported, Origin, read_origin

_ROUNDING = 1 + 1e-9  # two sums of the same squares


def read(path: Path) -> Report:
    """Read a report, trusting nothing in it.

    Raises:
        MalformedFile: a part is missing or of the wrong kind.
    """
    report = read_report(path)
    try:
        options = _options(report["options"])
        origin = read_origin(report)
        return Report(
            source_name=kinds.text(report["source_name"]),
            version=kinds.text(report["version"]),
            finished=datetime.fromisoformat(kinds.text(report["finished"])).astimezone(UTC),
            seconds=kinds.number(report["seconds"]),
            bytes_read=kinds.whole(report["bytes_read"]),
            bytes_written=kinds.whole(report["bytes_written"]),
            options=options,
            source=kinds.mapping(report["source"]),
            origin=origin,
            remarks=tuple(kinds.text(said) for said in kinds.values(report.get("remarks", []))),
            rules=_rules(report),
            search=read_search(report),
            beside=read_beside(report),
            budget=read_budget(report),
            tensors=[_tensor(name, facts, origin) for name, facts in report["tensors"].items()],
        )
    except KeyError as error:
        raise MalformedFile("lacks a part of a report", file=path, expected=error) from error
    except (ValueError, TypeError, OverflowError) as error:
        raise MalformedFile("a part is not what a report holds", file=path, found=str(error)[:200]) from error


def _tensor(name: str, facts: dict[str, Any], origin: Origin) -> Tensor:
    way, kind = _way(facts, origin), facts["class"]
    if kind not in TENSOR_CLASSES or way.source not in {*FORMATS, None} or way.target not in {*FORMATS, None}:
        raise ValueError(f"class {kind!r}, from {way.source!r} to {way.target!r} of {name!r}")
    shape = tuple(kinds.whole(length, limit=2**40) for length in facts["shape"])
    if len(shape) > 8 or not all(_holds(form, shape) for form in (way.source, way.target) if form is not None):
        raise ValueError(f"shape {shape} of {name!r}")
    layer, found = facts["layer"], facts.get("figures")
    figures = None if found is None else _figures(found)
    if way.substituted and figures is not None and figures.exact and not way.coded:
        figures = None  # a sum is what it is, and a weight that no training moved is a copy
    return Tensor(
        name,
        kind,
        None if layer is None else kinds.whole(layer, limit=10**6),
        way,
        shape,
        figures,
        _update(found) if found is not None and "update" in found else None,
        read_scales(facts),
        read_fold(facts),
    )


def _way(facts: dict[str, Any], origin: Origin) -> Way:
    """Return what was done with a tensor.

    Reports of earlier releases do not say whose values it has: of a merge its figures tell, of an export nothing does.
    """
    untold = "update" in (facts.get("figures") or ()) or (isinstance(origin, Exported) and not origin.measured)
    return Way(facts["from"], facts["to"], kinds.truth(facts.get("substituted", untold)))


def _figures(found: dict[str, Any]) -> Figures:
    counts = (kinds.whole(found[key]) for key in ("count", "changed"))
    return Figures(*counts, *(kinds.number(found[key]) for key in ("energy", "error", "worst")))


def _update(found: dict[str, Any]) -> MergeFigures:
    figures = MergeFigures(
        count=kinds.whole(found["count"]),
        update=kinds.number(found["update"]),
        effective=kinds.number(found["effective"]),
        inner=kinds.number(found["inner"], low=-1e100),
        lost=kinds.number(found["lost"]),
        codes_changed=kinds.whole(found["codes_changed"]),
        groups=kinds.whole(found["groups"]),
        groups_below_half_step=kinds.whole(found["groups_below_half_step"]),
    )
    wholes = (
        (figures.lost, figures.update * _ROUNDING),
        (figures.codes_changed, figures.count),
        (figures.groups_below_half_step, figures.groups),
    )
    if any(part > whole for part, whole in wholes):
        raise ValueError(f"more than there is: {found}")
    return figures


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


def _rules(report: dict[str, Any]) -> tuple[str, ...]:
    """Return what each rule says of a recipe that options could not say."""
    if "rules" not in report["options"]:
        return ()
    try:
        return tuple(rule.summary() for rule in recipe_from(kinds.mapping(report["recipe"])).rules)
    except UsageError as error:
        raise ValueError(str(error)) from error


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
