"""A calibration as one HTML page: whom the data reached, how well, what it was, and what to do next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import ceil

from k2quant.calib.coverage import THIN, THINNEST, Coverage, PartCoverage
from k2quant.calib.report.experts import by_layer, by_load, by_place, missing, worst
from k2quant.calib.report.grid import CSS
from k2quant.calib.stats.blending import LEAST_HELD_OUT, PRIOR_TOKENS
from k2quant.calib.stats.manifest import DataPart, Manifest
from k2quant.ground.units import counted
from k2quant.report.document import document
from k2quant.report.words import DASH, code, count, table, text, tile

_HASHES, _FACTS = 200, 100
_MOST = 0.95  # of the experts; the last ones cost the most
_FOLD = 32  # times the data; more is not worth naming

_CSS = """\
.tiles strong{white-space:normal}
.hashes{columns:34em;font-size:.85rem}
@media (min-width:861px){.tiles li,.tiles li:first-child{flex:1 1 220px}}
"""


def page(manifest: Manifest, fingerprint: str, coverage: Coverage, folder: str) -> str:
    """Return the page.

    Args:
        manifest: what was calibrated, on what.
        fingerprint: of the statistics.
        coverage: how the tokens spread over the experts.
        folder: name of the folder that holds the statistics.
    """
    sections = "\n".join(section for section in _sections(manifest, fingerprint, coverage, folder) if section)
    title = _headline(coverage.train)
    head = (
        f"<header><p class=eyebrow>k2quant calibration</p><h1>{title}</h1><p class=lead>{_lead(manifest, coverage)}</p>"
        f"<p class=meta>{code(folder)} &middot; k2quant {text(manifest.version)}</p></header>"
    )
    return document(f"{title} - k2quant calibration", f"{head}\n<main>\n{sections}\n</main>\n", css=f"{_CSS}{CSS}")


def _headline(train: PartCoverage) -> str:
    if not train.layers:
        return "Statistics of a model without routed experts"
    if train.empty:
        return f"{train.empty:,} of {counted(train.experts, 'expert')} saw no token"
    enough = train.experts - train.below(train.hidden)
    if enough == train.experts:
        return f"Each of {counted(train.experts, 'expert')} saw as many tokens as its input has columns"
    if not enough:
        return f"Each of {counted(train.experts, 'expert')} saw tokens, none as many as its input has columns"
    part = min(max(round(100 * enough / train.experts), 1), 99)
    return f"Each of {counted(train.experts, 'expert')} saw tokens; {part}% saw as many as their input has columns"


def _lead(manifest: Manifest, coverage: Coverage) -> str:
    data, train = manifest.data, coverage.train
    read = f"<b>{data['train'].tokens:,}</b> tokens of {counted(data['train'].documents, 'document')}"
    held = f"{data['validation'].tokens:,} more are held out to judge by"
    if not train.layers:
        return f"What the inputs of each matrix are like, over {read}; {held}."
    routed = f"{manifest.model.top_k} of {manifest.model.experts:,} experts each"
    return (
        f"The routers of {counted(len(train.layers), 'layer')} sent {read} to {routed}; {held}. As many tokens as an "
        f"input has columns, d = {train.hidden:,}, are a mark for methods that look at pairs of columns; a search for "
        "scales needs far fewer."
    )


def _sections(manifest: Manifest, fingerprint: str, coverage: Coverage, folder: str) -> Iterator[str]:
    train = coverage.train
    yield f"<ul class=tiles>{''.join(_tiles(coverage))}</ul>" if train.layers else ""
    if train.layers:
        yield by_place(train)
        yield by_load(train)
        yield by_layer(train)
    yield _next(manifest, coverage, folder)
    if train.layers:
        yield worst(train)
        yield _tiers(train)
    yield _data(manifest.data)
    yield _facts(manifest, fingerprint)


def _tiles(coverage: Coverage) -> Iterator[str]:
    train, held = coverage.train, coverage.validation
    lowest, uneven = train.worst, train.uneven
    if lowest is None or uneven is None:
        return
    least = int(lowest.tokens[lowest.worst])
    yield tile("No token", f"{train.empty:,}", f"of {counted(train.experts, 'routed expert')}")
    thin = f"below {THIN:.0%} of the mean of their layer; {train.thin(THINNEST):,} of them below {THINNEST:.0%}"
    yield tile("Thin experts", f"{train.thin():,}", thin)
    median = f"tokens, {train.median / train.hidden:.2g} d; the least has {least:,}"
    yield tile("Median expert", f"{train.median:,.0f}", f"{median} (layer {lowest.layer}, expert {lowest.worst})")
    even = f"lowest of all layers, layer {uneven.layer}; 1 is an even load"
    yield tile("Entropy of the load", f"{uneven.entropy:.3f}", even)
    yield tile(
        "Tokens missing",
        missing(train, train.hidden).replace("&nbsp;", " "),
        "of such data, for the worst expert to reach d",
    )
    few = held.below(LEAST_HELD_OUT)
    yield tile("Not measurable", f"{few:,}", f"experts with fewer than {LEAST_HELD_OUT} held-out tokens")


def _next(manifest: Manifest, coverage: Coverage, folder: str) -> str:
    """Say what the figures mean for who wants to convert."""
    said = "".join(f"<li>{line}</li>" for line in _advice(manifest, coverage))
    command = f"k2quant convert --to int4 --method imatrix --stats {folder} SOURCE DESTINATION"
    return (
        f"<section class=card><h2>What to do next</h2><ul>{said}</ul><p>Round by what was measured; each matrix that "
        f"held-out data finds worse than plain rounding ships rounded:</p><pre>{text(command, 500)}</pre></section>"
    )


def _advice(manifest: Manifest, coverage: Coverage) -> Iterator[str]:
    train, held = coverage.train, coverage.validation
    if not train.layers:
        yield "Every token passes every matrix: there is no expert that could be missed."
        return
    if train.empty:
        yield (
            f"<b>{counted(train.empty, 'expert')} without a token.</b> Their gate and up are judged by what the whole "
            "layer sees, their down by nothing but its weights. Other text reaches other experts: more languages, "
            "code, tools, long reasoning."
        )
    few = train.below(PRIOR_TOKENS) - train.empty
    if few:
        yield (
            f"{counted(few, 'expert')} with fewer than {PRIOR_TOKENS} tokens: what all tokens of the layer look like "
            "weighs more in their search than their own."
        )
    if not train.empty and not few:
        yield (
            f"<b>Enough for a search of scales:</b> each expert has at least {PRIOR_TOKENS} tokens, and more than that "
            "change little."
        )
    yield from _more(manifest, train)
    unjudged = held.below(LEAST_HELD_OUT)
    if unjudged:
        yield (
            f"{counted(unjudged, 'expert')} with fewer than {LEAST_HELD_OUT} held-out tokens: they are judged on a "
            "blend with what their layer sees. More held-out documents judge them by themselves."
        )


def _more(manifest: Manifest, train: PartCoverage) -> Iterator[str]:
    """Say how much data would bring every expert to d, as far as it can be told."""
    if not train.needed(train.hidden):
        yield f"Each expert has at least d = {train.hidden:,} tokens, enough for methods that look at pairs of columns."
        return
    most = _amount(
        manifest, train, train.needed_by(_MOST, train.hidden), sure=train.empty <= (1 - _MOST) * train.experts
    )
    every = _amount(manifest, train, train.needed(train.hidden), sure=not train.empty)
    yield (
        f"To give d tokens to {_MOST:.0%} of the experts takes {most}; to every expert, {every}. A tail of experts "
        "below that is normal, and no error."
    )


def _amount(manifest: Manifest, train: PartCoverage, more: int, *, sure: bool) -> str:
    """Return so many more tokens, and as which `--samples` where so many are worth a thought.

    Args:
        manifest: what was asked for.
        train: what came of it.
        more: tokens.
        sure: whether they are no lower bound.
    """
    if not more:
        return "no more than there are"
    times = (train.seen + more) / max(train.seen, 1)
    samples = manifest.settings.get("samples")
    asked = ""
    if isinstance(samples, int) and 0 < samples < 10**9 and times < _FOLD:
        asked = f", <code>k2quant calibrate --samples {ceil(samples * times)}</code>"
    fold = f"{times:.1f}" if times < 10 else f"{times:,.0f}"
    return f"{'' if sure else 'at least '}{count(more)} tokens more, {fold} times as many in all{asked}"


def _tiers(train: PartCoverage) -> str:
    heads = ["input", "d", "no token", "below d/4", "d/4 to d", "d to 4d", "4d and more", "tokens missing for d"]
    rows = []
    for name, width in (("gate and up", train.hidden), ("down", train.inner)):
        rows.append([name, f"{width:,}", *(f"{number:,}" for number in train.tiers(width)), missing(train, width)])
    note = (
        "Experts by tokens over the width of the input. Below d/4 the second moments of pairs of columns tell little, "
        "below d they have no full rank, from 4d on more tokens change little."
    )
    return (
        f"<section class=card><h2>What the tokens suffice for</h2><p class=note>{note}</p>"
        f"{table(heads, rows, css='compact', label='experts by tokens over width')}</section>"
    )


def _data(data: Mapping[str, DataPart]) -> str:
    rows = [
        [text(name), f"{part.documents:,}", f"{part.rows:,}", f"{part.tokens:,}", code(part.digest)]
        for name, part in data.items()
    ]
    lists = "".join(
        f"<details><summary>sha256 of the documents, {text(name)}: {part.documents:,}</summary><p class=hashes>"
        f"{'<br>'.join(map(code, part.hashes[:_HASHES]))}</p>"
        + (f"<p class=note>and {part.documents - _HASHES:,} more</p>" if part.documents > _HASHES else "")
        + "</details>"
        for name, part in data.items()
        if part.documents
    )
    return (
        "<section class=card><h2>The data</h2><p class=note>The parts share no document. <code>train</code> decides, "
        "<code>validation</code> judges, <code>test</code> is kept for a last figure and was not read.</p>"
        f"{table(['part', 'documents', 'rows', 'tokens', 'sha256 of tokens'], rows, label='data')}{lists}</section>"
    )


def _facts(manifest: Manifest, fingerprint: str) -> str:
    settings = {**manifest.settings, "hessians": manifest.hessians}
    return (
        "<section class=card><h2>What was measured, and how</h2><dl>"
        f"<div><dt>fingerprint</dt><dd>{code(fingerprint)}</dd></div>{_listed(settings)}</dl>"
        f"<details><summary>The model, by its config</summary><dl>{_listed(manifest.model.config)}</dl></details>"
        "<p class=note>The fingerprint tells model, data, settings and every layer; no time and no path is in it. "
        "A conversion names it in its report.</p></section>"
    )


def _listed(facts: Mapping[str, object]) -> str:
    return "".join(
        f"<div><dt>{text(name)}</dt><dd>{DASH if value is None else text(value)}</dd></div>"
        for name, value in list(facts.items())[:_FACTS]
    )
