"""The head of the page: what the output is, and in a sentence or two what was done to how many tensors."""

from __future__ import annotations

from collections.abc import Iterator

from k2quant.report.content import NARROWED, Report, Sum, Way
from k2quant.report.origins import Exported, Merged, Unknown
from k2quant.report.words import TIMES, code, tensors, text

Ways = dict[Way, Sum]


def title(report: Report) -> str:
    """Return what the output is, as HTML."""
    name = text(report.source_name)
    match report.origin:
        case Merged(name=adapter):
            return f"{name} with {text(adapter)}, as {report.to}"
        case Exported(run=str()):
            return f"{name} trained for {report.to}"
        case Exported(job=str()):
            return f"{name} rounded to {report.to}"
    return f"{name} as {report.formats}"


def header(report: Report, folder: str) -> str:
    """Return the head of the page."""
    badges = "".join(f"<span class='badge {css}'>{words}</span>" for css, words in _badges(report))
    return (
        f"<header><p class=eyebrow>k2quant {_kind(report)} report</p><h1>{title(report)}</h1>"
        f"<p class=lead>{_done(report)}</p>"
        f"<p class=meta>{badges} {code(folder)} &middot; {report.finished:%Y-%m-%d %H:%M} UTC &middot; "
        f"k2quant {text(report.version)}</p></header>"
    )


def _kind(report: Report) -> str:
    match report.origin:
        case Merged():
            return "merge"
        case Exported():
            return "export"
    return "conversion"


def _badges(report: Report) -> Iterator[tuple[str, str]]:
    """Yield a class of the style sheet and words."""
    match report.origin:
        case Merged():
            yield "", "merged"
            if not report.exact:
                yield "", "rounded"
        case Exported() as origin:
            if origin.moved:
                yield "", "trained" if origin.run else "exported"
            yield "", f"rounded to {f'{origin.bits} bits' if origin.bits else report.to}"
        case Unknown():
            yield "", "other values"
        case None:
            exact = report.exact and not report.narrowed
            yield ("good", "exact") if exact else ("", "rounded")


def _done(report: Report) -> str:
    """Say what was done with how many tensors."""
    ways = report.sums(lambda cell: cell.way)
    order = sorted(ways, key=lambda way: (ways[way].figures is None, str(way)))
    own = {way: ways[way] for way in order if not way.substituted}
    others = {way: ways[way] for way in order if way.substituted}
    plain = list(_plain(own))
    match report.origin:
        case Merged() as origin:
            return f"k2quant {_listed([_merged(origin, others), *plain])}."
        case Exported() as origin:
            rest = f" From the base it {_listed(plain)}." if plain else ""
            return f"k2quant wrote {_whose(origin)}: {_listed(list(_written(others, report)))}.{rest}"
        case Unknown():
            changed = f"replaced the values of {tensors(_count(others))}"
            return f"k2quant {_listed([changed, *plain])}."
    return f"k2quant {_listed(plain or ['found nothing to convert'])}.{_searched(report)}"


def _searched(report: Report) -> str:
    """Say how scales were chosen, where they are not rounding's own."""
    if report.search is None:
        return ""
    if (solving := report.search.solving) is not None:
        return (
            f" Codes are solved column by column by <b>{text(report.search.method)}</b>, at scales by "
            f"{text(solving.scales)}."
        )
    weighed = ", weighed by what a calibration saw" if report.search.stats else ""
    best = f"{report.search.candidates or 0:,} a group by <b>{text(report.search.method)}</b>"
    return f" Scales are the best of {best}{weighed}."


def _plain(ways: Ways) -> Iterator[str]:
    """Yield what was done with tensors whose values are the source's."""
    yield from (_phrase(way, total) for way, total in ways.items() if way.target is not None)
    if copied := _count({way: total for way, total in ways.items() if way.copied}):
        yield f"copied <b>{copied:,}</b> byte for byte"


def _phrase(way: Way, total: Sum) -> str:
    source, target = (str(name).upper() for name in (way.source, way.target))
    some = f"{tensors(total.tensors)} from"
    if way == NARROWED:
        return f"rounded {some} F16 or F32 to BF16"
    if source == target and total.figures is None:
        return f"kept codes and scales of {tensors(total.tensors)} in {source}, under other names or as float32 scales"
    if total.figures is None:
        return f"wrote {some} {source} as {target}, bit-equal to {TIMES}"
    if total.figures.exact:
        return f"wrote {some} {source} as {target} without loss"
    return f"rounded {some} {source} to {target}"


def _merged(origin: Merged, ways: Ways) -> str:
    parts = _by_format(ways)
    quantised = [f"<b>{count:,}</b> in {name.upper()}" for name, count in parts.items() if name]
    rest = [f"<b>{parts[None]:,}</b> unquantised"] if None in parts else []
    told = f" ({_listed([*quantised, *rest])})" if quantised else ""
    scale = f"rank {origin.rank}, alpha {origin.alpha:g}"
    return f"merged <b>{text(origin.name)}</b> of {scale} into {tensors(_count(ways))}{told}"


def _whose(origin: Exported) -> str:
    if origin.run is not None:
        return f"the weights of the training <b>{text(origin.run)}</b> after step <b>{origin.step:,}</b>"
    if origin.job is not None:
        return f"the model of <b>{text(origin.job)}</b> as it was before training"
    return "the weights of a model that was prepared for training"


def _written(ways: Ways, report: Report) -> Iterator[str]:
    """Yield how many weights of a model were written in which format."""
    for name, number in _by_format(ways).items():
        yield f"{tensors(number)} {f'rounded to {_label(name, report)}' if name else 'unquantised'}"


def _label(name: str, report: Report) -> str:
    return report.to if name == report.options["to"] else name.upper()


def _by_format(ways: Ways) -> dict[str | None, int]:
    """Count the tensors of each quantised format, then those of all others."""
    found: dict[str | None, int] = {}
    for way, total in ways.items():
        name = way.written if way.coded else None
        found[name] = found.get(name, 0) + total.tensors
    return dict(sorted(found.items(), key=lambda pair: (pair[0] is None, str(pair[0]))))


def _count(ways: Ways) -> int:
    return sum(total.tensors for total in ways.values())


def _listed(phrases: list[str]) -> str:
    *first, last = phrases or ["nothing"]
    return f"{', '.join(first)}{', and ' if first else ''}{last}"
