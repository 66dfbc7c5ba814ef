"""The page: a headline, the numbers that matter, pictures, tables, and how to check it all."""

from __future__ import annotations

import math
from collections.abc import Iterator

from k2quant.ground.units import duration, size
from k2quant.report.content import Report
from k2quant.report.document import document
from k2quant.report.headline import header, title
from k2quant.report.origins import Exported, Merged
from k2quant.report.pictures import by_class, by_format, by_layer
from k2quant.report.sections import budgeted, searched, updates
from k2quant.report.sections.checks import how
from k2quant.report.words import (
    DASH,
    TIMES,
    amount,
    code,
    count,
    decibels,
    formats,
    outcome,
    share,
    table,
    tensors,
    tile,
)

_WORST_SHOWN = 20


def page(report: Report, folder: str) -> str:
    """Return the page.

    Args:
        report: what to show.
        folder: name of the folder that holds the conversion.
    """
    body = f"{header(report, folder)}\n<main>\n{''.join(_sections(report, folder))}</main>\n"
    return document(f"{title(report)} - k2quant report", body)


def _sections(report: Report, folder: str) -> Iterator[str]:
    yield f"<ul class=tiles>{''.join(_tiles(report))}</ul>\n"
    if isinstance(report.origin, Merged):
        yield f"{updates.section(report, report.origin)}\n"
    yield f"{budgeted.section(report)}\n"
    yield f"{searched.section(report)}\n"
    if not report.measured:
        yield f"<p class=card>{_why_not_measured(report)}</p>\n"
    elif report.exact:
        yield f"<p class='card good'>{_why_exact(report)}</p>\n"
    else:
        yield f"{by_layer(report)}\n{by_class(report)}\n"
    yield f"{by_format(report)}\n{_classes(report)}\n"
    if report.measured and not report.exact:
        yield f"{_worst(report)}\n"
    yield f"{how(report, folder)}\n"


def _why_not_measured(report: Report) -> str:
    """Say why there are no figures."""
    if not isinstance(report.origin, Exported):
        return "<b>Not measured:</b> the values are not the source's own, and k2quant does not know what they are."
    return (
        "<b>Not measured:</b> the values are those of a model that was prepared for training, and the release of "
        "k2quant that wrote them did not note how far they are from the base's. "
        "<code>k2quant qat export --restart</code> does."
    )


def _why_exact(report: Report) -> str:
    """Say why there is no picture of errors."""
    if isinstance(report.origin, Exported):
        return "<b>Nothing moved:</b> every value is the base's."
    if isinstance(report.origin, Merged):
        others = "as it was" if _all_copied(report) else f"bit-equal to {TIMES}"
        once = ", or was F16 or F32 and is rounded once to BF16" if report.narrowed else ""
        return (
            "<b>Nothing but sums was rounded:</b> each is a weight of the base plus its update, rounded "
            f"once to BF16; every other value is {others}{once}."
        )
    if report.figures is not None:
        return (
            "<b>Rounding lost nothing:</b> every value that was rounded is one that "
            f"{report.to} can hold, and came through unchanged."
        )
    if report.narrowed:
        return (
            f"<b>Nothing but F16 and F32 was rounded:</b> {tensors(report.narrowed)}, once, to the nearest BF16; "
            f"that error is not measured. Of quantised weights every value is bit-equal to {TIMES}."
        )
    if _all_copied(report):
        return "<b>Nothing was rounded:</b> every tensor was copied byte for byte."
    return f"<b>Nothing was rounded:</b> every value is bit-equal to {TIMES}, as BF16 holds it."


def _all_copied(report: Report) -> bool:
    """Tell whether all values that are the source's were copied."""
    return all(cell.way.copied or cell.way.substituted for cell in report.cells)


def _tiles(report: Report) -> Iterator[str]:
    before, after = report.bytes_read, report.bytes_written
    ratio = f"{after / before:.2f} times the source" if before else "an empty source"
    yield tile("Size", f"{size(before)} &rarr; {size(after)}", ratio)
    yield from updates.tiles(report)
    yield from budgeted.tiles(report)
    yield from searched.tiles(report)
    yield from _errors(report)
    rate = f"{size(before / report.seconds)}/s read" if report.seconds else ""
    yield tile("Time", duration(report.seconds), rate)


def _errors(report: Report) -> Iterator[str]:
    """Yield what became of the values."""
    figures, merged = report.figures, isinstance(report.origin, Merged)
    if not report.measured:
        yield tile("Distance from the base", "not measured", "see below")
    elif figures is not None and not figures.exact:
        error = share(math.sqrt(figures.error), math.sqrt(figures.energy))
        what = "the difference is {} of the base" if report.moved else "error is {} of the signal"
        name = "SQNR against the base" if report.moved else "SQNR of rounding" if merged else "Overall SQNR"
        yield tile(name, decibels(figures.sqnr_db), f"{what.format(error)}, root mean square")
        tensor, worst = report.worst(1)[0]
        yield tile("Furthest tensor" if report.moved else "Worst tensor", decibels(worst.sqnr_db), code(tensor.name))
        if not merged:
            others = sum(total.values for total in report.cells.values()) - figures.count
            rest = f"; {count(others)} others {'unchanged' if report.moved else 'exact'}" if others > 0 else ""
            changed = share(figures.changed, figures.count)
            yield tile("Values changed", changed, f"of {count(figures.count)}{rest}")
    elif not merged:
        words = ("BF16 only", "F16 and F32 rounded once") if report.narrowed else ("none", "every value unchanged")
        yield tile("Error", *words)


def _classes(report: Report) -> str:
    heads = ["class", "formats", "tensors", "values", "SQNR", "worst tensor", "largest error", "changed"]
    rows = []
    for kind, ways in report.rows().items():
        for way, total in ways.items():
            figures = total.figures
            measured = [outcome(way, figures, report.origin), DASH, DASH, DASH]
            if figures is not None and not figures.exact:
                measured[1:] = [
                    decibels(total.lowest),
                    amount(figures.worst),
                    share(figures.changed, figures.count),
                ]
            rows.append([kind, formats(way, report.origin), f"{total.tensors:,}", count(total.values), *measured])
    note = (
        "SQNR is 10&nbsp;log<sub>10</sub>(&Sigma;w&sup2;&nbsp;/&nbsp;&Sigma;(w&nbsp;&minus;&nbsp;w&prime;)&sup2;), "
        f"largest error is max&nbsp;|w&nbsp;&minus;&nbsp;w&prime;|; {_pair(report)}, both as BF16."
    )
    if report.exact or not report.measured:
        heads, rows, note = (
            [*heads[:4], "result"],
            [row[:5] for row in rows],
            "What was done with each, and how it went.",
        )
    return (
        f"<section class=card><h2>Every tensor class</h2><p class=note>{note}</p>"
        f"{table(heads, rows, css='words', label='tensor classes')}</section>"
    )


def _pair(report: Report) -> str:
    """Say what is compared."""
    match report.origin:
        case Merged():
            return "w is a value with its update and w&prime; what is stored of it"
        case Exported():
            return "w is a value of the base and w&prime; the one in its place"
    return "w is a value before the conversion and w&prime; after it"


def _worst(report: Report) -> str:
    rows = [
        [
            code(tensor.name),
            decibels(figures.sqnr_db),
            amount(figures.worst),
            share(figures.changed, figures.count),
            " &times; ".join(str(length) for length in tensor.shape),
            formats(tensor.way, report.origin),
        ]
        for tensor, figures in report.worst(_WORST_SHOWN)
    ]
    heads = ["tensor", "SQNR", "largest error", "changed", "shape", "formats"]
    kind = "furthest" if report.moved else "worst"
    caption = f"The {len(rows)} {kind} tensors" if len(rows) > 1 else "The one tensor that changed"
    return (
        f"<section class=card><h2>{caption}</h2><p class=note>Lowest SQNR first.</p>"
        f"{table(heads, rows, label=f'{kind} tensors')}</section>"
    )
