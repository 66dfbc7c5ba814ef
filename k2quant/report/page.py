"""The page: a headline, the numbers that matter, pictures, tables, and how to check it all."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator

from k2quant.formats.known import FORMATS
from k2quant.ground.units import duration, size
from k2quant.report.content import NARROWED, Report, Sum, Way
from k2quant.report.document import document
from k2quant.report.pictures import by_class, by_format, by_layer
from k2quant.report.words import DASH, amount, code, count, decibels, formats, outcome, share, table, tensors, text

_WORST_SHOWN = 20
_NOTE = 500  # letters of a remark
_LIST_SHOWN = 200  # shards and patterns; K2 has 62 shards

_TIMES = "code&nbsp;&times;&nbsp;scale"


def page(report: Report, folder: str) -> str:
    """Return the page.

    Args:
        report: what to show.
        folder: name of the folder that holds the conversion.
    """
    title = f"{text(report.source_name)} as {report.to}"
    body = f"{_header(report, folder, title)}\n<main>\n{''.join(_sections(report, folder))}</main>\n"
    return document(f"{title} - k2quant report", body)


def _header(report: Report, folder: str, title: str) -> str:
    exact = report.exact and not report.narrowed
    badge = "<span class='badge good'>exact</span>" if exact else "<span class=badge>rounded</span>"
    return (
        f"<header><p class=eyebrow>k2quant conversion report</p><h1>{title}</h1><p class=lead>{_done(report)}</p>"
        f"<p class=meta>{badge} {code(folder)} &middot; {report.finished:%Y-%m-%d %H:%M} UTC &middot; "
        f"k2quant {text(report.version)}</p></header>"
    )


def _done(report: Report) -> str:
    """Say in one sentence what was done with how many tensors."""
    ways = report.sums(lambda cell: cell.way)
    order = sorted(ways, key=lambda way: (ways[way].figures is None, str(way)))
    phrases = [_phrase(way, ways[way]) for way in order if way[1] is not None]
    copied = sum(total.tensors for way, total in ways.items() if way[1] is None)
    if copied:
        phrases.append(f"copied <b>{copied:,}</b> byte for byte")
    *first, last = phrases or ["found nothing to convert"]
    return f"k2quant {', '.join(first)}{', and ' if first else ''}{last}."


def _phrase(way: Way, total: Sum) -> str:
    source, target = (str(name).upper() for name in way)
    some = f"{tensors(total.tensors)} from"
    if way == NARROWED:
        return f"rounded {some} F16 or F32 to BF16"
    if source == target and total.figures is None:
        return f"kept codes and scales of {tensors(total.tensors)} in {source}, under other names or as float32 scales"
    if total.figures is None:
        return f"wrote {some} {source} as {target}, bit-equal to {_TIMES}"
    if total.figures.exact:
        return f"wrote {some} {source} as {target} without loss"
    return f"rounded {some} {source} to {target}"


def _sections(report: Report, folder: str) -> Iterator[str]:
    yield f"<ul class=tiles>{''.join(_tiles(report))}</ul>\n"
    if report.exact:
        yield f"<p class='card good'>{_why_exact(report)}</p>\n"
    else:
        yield f"{by_layer(report)}\n{by_class(report)}\n"
    yield f"{by_format(report)}\n{_classes(report)}\n"
    if not report.exact:
        yield f"{_worst(report)}\n"
    yield f"{_how(report, folder)}\n"


def _why_exact(report: Report) -> str:
    """Say why there is no picture of errors."""
    if report.figures is not None:
        return (
            "<b>Rounding lost nothing:</b> every value that was rounded is one that "
            f"{report.to} can hold, and came through unchanged."
        )
    if report.narrowed:
        return (
            f"<b>Nothing but F16 and F32 was rounded:</b> {tensors(report.narrowed)}, once, to the nearest BF16; "
            f"that error is not measured. Of quantised weights every value is bit-equal to {_TIMES}."
        )
    if all(cell.way[1] is None for cell in report.cells):
        return "<b>Nothing was rounded:</b> every tensor was copied byte for byte."
    return f"<b>Nothing was rounded:</b> every value is bit-equal to {_TIMES}, as BF16 holds it."


def _tiles(report: Report) -> Iterator[str]:
    before, after = report.bytes_read, report.bytes_written
    ratio = f"{after / before:.2f} times the source" if before else "an empty source"
    yield _tile("Size", f"{size(before)} &rarr; {size(after)}", ratio)
    figures = report.figures
    if figures is None or figures.exact:
        words = ("BF16 only", "F16 and F32 rounded once") if report.narrowed else ("none", "every value unchanged")
        yield _tile("Error", *words)
    else:
        error = share(math.sqrt(figures.error), math.sqrt(figures.energy))
        yield _tile("Overall SQNR", decibels(figures.sqnr_db), f"error is {error} of the signal, root mean square")
        tensor, worst = report.worst(1)[0]
        yield _tile("Worst tensor", decibels(worst.sqnr_db), code(tensor.name))
        exact = sum(total.values for total in report.cells.values()) - figures.count
        others = f"; {count(exact)} others exact" if exact > 0 else ""
        yield _tile("Values changed", share(figures.changed, figures.count), f"of {count(figures.count)}{others}")
    rate = f"{size(before / report.seconds)}/s read" if report.seconds else ""
    yield _tile("Time", duration(report.seconds), rate)


def _tile(label: str, value: str, note: str) -> str:
    return f"<li><span>{label}</span><strong>{value}</strong><small>{note}</small></li>"


def _classes(report: Report) -> str:
    heads = ["class", "formats", "tensors", "values", "SQNR", "worst tensor", "largest error", "changed"]
    rows = []
    for kind, ways in report.rows().items():
        for way, total in ways.items():
            figures = total.figures
            measured = [outcome(way, figures), DASH, DASH, DASH]
            if figures is not None and not figures.exact:
                measured[1:] = [
                    decibels(total.lowest),
                    amount(figures.worst),
                    share(figures.changed, figures.count),
                ]
            rows.append([kind, formats(way), f"{total.tensors:,}", count(total.values), *measured])
    note = (
        "SQNR is 10&nbsp;log<sub>10</sub>(&Sigma;w&sup2;&nbsp;/&nbsp;&Sigma;(w&nbsp;&minus;&nbsp;w&prime;)&sup2;), "
        "largest error is max&nbsp;|w&nbsp;&minus;&nbsp;w&prime;|; w is a value before the conversion and w&prime; "
        "after it, both as BF16."
    )
    if report.exact:
        heads, rows, note = (
            [*heads[:4], "result"],
            [row[:5] for row in rows],
            "What was done with each, and how it went.",
        )
    return (
        f"<section class=card><h2>Every tensor class</h2><p class=note>{note}</p>"
        f"{table(heads, rows, css='words', label='tensor classes')}</section>"
    )


def _worst(report: Report) -> str:
    rows = [
        [
            code(tensor.name),
            decibels(figures.sqnr_db),
            amount(figures.worst),
            share(figures.changed, figures.count),
            " &times; ".join(str(length) for length in tensor.shape),
            formats(tensor.way),
        ]
        for tensor, figures in report.worst(_WORST_SHOWN)
    ]
    heads = ["tensor", "SQNR", "largest error", "changed", "shape", "formats"]
    title = f"The {len(rows)} worst tensors" if len(rows) > 1 else "The one tensor that changed"
    return (
        f"<section class=card><h2>{title}</h2><p class=note>Lowest SQNR first.</p>"
        f"{table(heads, rows, label='worst tensors')}</section>"
    )


def _how(report: Report, folder: str) -> str:
    listed = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in _facts(report))
    here, source = text(shlex.quote(folder)), text(shlex.quote(report.source_name))
    return (
        f"<section class=card><h2>How it was made, and how to check it</h2><dl>{listed}</dl>{_shards(report)}"
        "<p>Compare every tensor on disk with the checksums of the conversion:</p>"
        f"<pre>k2quant verify --checksums {here}</pre>"
        f"<p>Compare it with its source, value by value:</p><pre>k2quant verify {source} {here}</pre></section>"
    )


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    """Yield options and fingerprint as pairs of HTML."""
    options = report.options
    scope, grid, patterns, shard_size = (options[key] for key in ("scope", "grid", "ignore", "shard_size"))
    layout = options["layout"]
    yield "format", report.to
    kind = FORMATS[options["to"]]
    if kind.default_scope:
        yield "scope", text(scope) if scope else f"{kind.default_scope} (default)"
    if kind.grids:
        yield "grid", text(grid) if grid else f"{kind.grids[0]} (default)"
    if kind.layouts:
        yield "layout", text(layout) if layout else f"{kind.layouts[0]} (default)"
    if patterns:
        more = f" and {len(patterns) - _LIST_SHOWN:,} more" if len(patterns) > _LIST_SHOWN else ""
        yield "ignored", ", ".join(map(code, patterns[:_LIST_SHOWN])) + more
    yield "shards", f"at most {size(shard_size)}" if shard_size else "as in the source"
    yield from (("note", text(said, _NOTE)) for said in report.remarks[:_LIST_SHOWN])
    for key in ("config_sha256", "tensors_sha256"):
        if isinstance(report.source.get(key), str):
            yield f"source {key.replace('_', ' ')}", code(report.source[key])


def _shards(report: Report) -> str:
    """List the shards of the source as they were when it was read."""
    shards = report.source.get("shards")
    rows = [
        [code(name), size(facts["size"]), code(facts.get("header_sha256", ""))]
        for name, facts in (shards.items() if isinstance(shards, dict) else ())
        if isinstance(facts, dict) and isinstance(facts.get("size"), int) and 0 <= facts["size"] < 2**63
    ]
    if not rows:
        return ""
    heads = ["shard of the source", "size", "sha256 of its header"]
    listed = table(heads, rows[:_LIST_SHOWN], css="compact", label="shards of the source")
    more = f"<p class=note>and {len(rows) - _LIST_SHOWN:,} more</p>" if len(rows) > _LIST_SHOWN else ""
    return f"<details><summary>Source shards: {len(rows):,}</summary>{listed}{more}</details>"
