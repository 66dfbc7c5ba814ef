"""A training run as one HTML page: what came back, at what cost, and how the run went."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from math import inf, isfinite

from k2quant.ground.intervals import wilson
from k2quant.ground.units import duration
from k2quant.ground.version import __version__
from k2quant.qat.report.bars import answers_right, loss_recovered
from k2quant.qat.report.experts import expert_load, oscillation, router_agreement, starved
from k2quant.qat.report.pictures import divergence, held_out, schedule, training, width
from k2quant.qat.report.recovery import CAVEAT, Recovery, headline, nats, percent, recovery, steps, target
from k2quant.qat.run.history import Evaluation, Records
from k2quant.qat.run.summary import Summary
from k2quant.report.document import document
from k2quant.report.words import code, count, share, table, text

_SENTENCE = 1000  # letters of a fact
_FACTS, _CLASSES = 100, 50
_WIDTHS = 6

_CSS = """\
.lead{overflow-wrap:anywhere}
.warnings{border-left:5px solid var(--unsure)}
.tiles strong{white-space:normal}
.scroll+.note{margin-top:10px}
@media (min-width:861px){.tiles li,.tiles li:first-child{flex:1 1 220px}}
"""


def page(history: Records, summary: Summary, folder: str) -> str:
    """Return the page.

    Args:
        history: steps and evaluations.
        summary: the rest.
        folder: name of the run's folder.
    """
    title = text(headline(history, control=summary.control))
    sections = "\n".join(section for section in _sections(history, summary) if section)
    return document(
        f"{title} - k2quant QAT", f"{_header(history, folder, title)}\n<main>\n{sections}\n</main>\n", css=_CSS
    )


def _header(history: Records, folder: str, title: str) -> str:
    return (
        f"<header><p class=eyebrow>k2quant quantisation-aware training</p><h1>{title}</h1>"
        f"<p class=lead>{_lead(history)}</p><p class=meta>{code(folder)} &middot; k2quant {__version__}</p></header>"
    )


def _lead(history: Records) -> str:
    """Say what the headline rests on."""
    if not history.evaluations:
        return "Without an evaluation of held-out text nobody can tell what the training was good for."
    last = history.evaluations[-1]
    found = recovery(last)
    if found is None:
        return "The start point was not evaluated, so there is nothing to compare with."
    rounding = f"rounding{target(history)}"
    return (
        f"Plain {rounding} raises the held-out loss of the start point by {_gap(found)} nats a token, from "
        f"{_nats(last.start)} to {_nats(last.start_rounded)}. After {steps(last.step)} of training the loss with the "
        f"same rounding is <b>{_nats(last.loss)}</b>{_beside(found)}.{_start_right(last)}"
    )


def _start_right(last: Evaluation) -> str:
    """Say how many answers the start point has right."""
    found = last.answers
    if found is None or found.start is None or found.start_rounded is None:
        return ""
    before, whole = percent(found.start_rounded, found.count), percent(found.start, found.count)
    return f" Of the answers {before} were right when it was rounded untrained, and {whole} in BF16."


def _gap(found: Recovery) -> str:
    gap = _nats(found.gap)
    return gap if found.error is None else f"{gap} &plusmn; {_nats(found.error)}"


def _beside(found: Recovery) -> str:
    """Say what the headline leaves out."""
    if not found.told:
        return "; a gap below three standard errors has no share that means anything"
    if found.share > 1:
        return ", below the start point in BF16: what lies beyond that is more training, and no recovery"
    return "" if found.share > 0 else ", no lower than that of the rounded start point"


def _sections(history: Records, summary: Summary) -> Iterator[str]:
    yield "" if summary.control else _warning(history)
    tiles = (*_results(history), *_efforts(history), *_extent(history, summary))
    yield f"<ul class=tiles>{''.join(tiles)}</ul>"
    if history.evaluations:
        yield loss_recovered(history.evaluations[-1])
        yield answers_right(history.evaluations[-1])
    yield held_out(history.evaluations)
    yield training(history.steps)
    yield divergence(history.steps)
    yield schedule(history.steps)
    yield expert_load(summary.routers)
    yield router_agreement(summary.routers)
    yield starved(summary)
    yield oscillation(summary)
    yield _coverage(summary)
    yield _job(summary)


def _warning(history: Records) -> str:
    """Say what the headline has to be read with, and where it is seen that training alone lowered the loss."""
    last = history.evaluations[-1] if history.evaluations else None
    if last is None or recovery(last) is None:
        return ""
    seen = ""
    if last.unrounded is not None and last.start is not None and last.unrounded < last.start:
        seen = (
            f" Here the loss without any rounding fell too, from {_nats(last.start)} to {_nats(last.unrounded)}, by "
            f"{_nats(last.start - last.unrounded)} nats a token, and the loss with rounding holds that gain."
        )
    return f"<section class='card warnings'><h2>Read the headline with care</h2><p>{_caveat()}.{seen}</p></section>"


def _caveat() -> str:
    before, setting, after = text(CAVEAT, _SENTENCE).split("`")
    return f"{before}<code>{setting}</code>{after}"


def _results(history: Records) -> Iterator[str]:
    if not history.evaluations:
        return
    last = history.evaluations[-1]
    error = "" if last.standard_error is None else f" &plusmn; {_nats(last.standard_error)}"
    yield _tile("Held-out loss", _nats(last.loss), f"{error} nats a token, fake-quantised, after {steps(last.step)}")
    yield from _cost(last)
    yield from _answers(last)


def _answers(last: Evaluation) -> Iterator[str]:
    found = last.answers
    if found is None:
        return
    before = "" if found.start_rounded is None else f"{percent(found.start_rounded, found.count)} &rarr; "
    beside = "" if found.start is None else f", {percent(found.start, found.count)} in BF16 at the start"
    low, high = (100 * end for end in wilson(found.right, found.count))
    yield _tile(
        "Answers right",
        f"{before}{percent(found.right, found.count)}",
        f"rounded, at the start and now{beside}; {found.right:,} of {found.count:,} held out, 95% interval {low:.1f} "
        f"to {high:.1f}%",
    )


def _cost(last: Evaluation) -> Iterator[str]:
    found = recovery(last)
    if found is None or last.unrounded is None:
        return
    now = last.loss - last.unrounded
    if now > 0:
        yield _tile("Cost of rounding", f"{_nats(found.gap)} &rarr; {_nats(now)}", "nats a token, at the start and now")
    else:
        better = (
            f"{nats(-now)} nats better with its rounding than without: its weights have grown into the codes"
            if now
            else "as good with its rounding as without"
        )
        yield _tile(
            "Cost of rounding",
            f"{_nats(found.gap)} &rarr; none",
            f"nats a token at the start; the trained model is {better}",
        )


def _efforts(history: Records) -> Iterator[str]:
    done = history.steps
    if not done:
        return
    seconds, tokens = sum(record.seconds for record in done), sum(record.tokens for record in done)
    speed = tokens / seconds if seconds else inf  # steps too short for a clock have no rate
    rate = f"{count(round(speed))} a second" if isfinite(speed) else ""
    yield _tile("Steps", f"{len(done):,}", f"learning rate up to {max(record.rate for record in done):.3g}")
    yield _tile("Tokens learnt", count(tokens), rate)
    yield _tile("Time", duration(seconds), f"in steps, {duration(seconds / len(done))} each")


def _extent(history: Records, summary: Summary) -> Iterator[str]:
    parameters = sum(found.parameters for found in summary.coverage)
    quantised = sum(found.quantised for found in summary.coverage)
    if parameters:
        yield _tile(
            "Fake-quantised", share(quantised, parameters), f"{count(quantised)} of {count(parameters)} parameters"
        )
    widths = [width(bits) for bits, _ in groupby(record.bits for record in history.steps)]
    if widths:
        shown = " &rarr; ".join(widths[:_WIDTHS]) + (" &hellip;" if len(widths) > _WIDTHS else "")
        yield _tile("Codes", shown, "width in training" if len(widths) < 2 else "widths in the course of training")


def _tile(label: str, value: str, note: str) -> str:
    return f"<li><span>{label}</span><strong>{value}</strong><small>{note}</small></li>"


def _coverage(summary: Summary) -> str:
    if not summary.coverage:
        return ""
    rows = [
        [text(found.kind), count(found.parameters), count(found.quantised), share(found.quantised, found.parameters)]
        for found in summary.coverage[:_CLASSES]
    ]
    heads = ["class", "parameters", "fake-quantised", "share"]
    return (
        "<section class=card><h2>What was fake-quantised</h2><p class=note>Parameters by tensor class; the others "
        f"stay BF16.</p>{table(heads, rows, css='compact', label='coverage')}</section>"
    )


def _job(summary: Summary) -> str:
    facts = list(summary.job.items())
    listed = "".join(
        f"<div><dt>{text(name)}</dt><dd>{text(fact, _SENTENCE)}</dd></div>" for name, fact in facts[:_FACTS]
    )
    more = f"<p class=note>and {len(facts) - _FACTS:,} more</p>" if len(facts) > _FACTS else ""
    return (
        f"<section class=card><h2>The job</h2><dl>{listed}</dl>{more}<p class=note>All steps and evaluations stand in "
        "<code>history.jsonl</code>, the rest in <code>summary.json</code>.</p></section>"
    )


def _nats(value: float | None) -> str:
    """Return a loss as HTML."""
    return "" if value is None else _minus(nats(value))


def _minus(words: str) -> str:
    return words.replace("-", "&minus;")
