"""The verdict as one HTML page: no scripts, no network, pictures as inline SVG."""

from __future__ import annotations

from collections.abc import Iterator

from k2quant.eval.drift.findings import Blame, Fidelity
from k2quant.eval.gating.verdict import Side, Verdict
from k2quant.eval.report.drift_pictures import blame_facts, blame_pictures, drift_pictures, fidelity_facts
from k2quant.eval.report.flips import CSS as FLIPS_CSS
from k2quant.eval.report.flips import flips
from k2quant.eval.report.pictures import accuracies, drops, power_curve
from k2quant.eval.report.tasks import CSS as TASKS_CSS
from k2quant.eval.report.tasks import KINDS, tasks
from k2quant.eval.report.wording import (
    TOOL,
    chance,
    confidence,
    decided_by,
    flips_title,
    headline,
    interval,
    margin,
    needed,
    percent,
    points,
    scored,
    short,
    worse,
)
from k2quant.ground.units import counted
from k2quant.ground.version import __version__
from k2quant.report.document import document
from k2quant.report.words import DASH, code, text

_SENTENCE = 1000  # letters of a reason or a warning
_WARNINGS, _TASKS = 50, 1000

_CSS = """\
.verdict{border:0;padding:26px 30px;margin:16px 0 20px}
.verdict h1{font-size:clamp(2rem,1.4rem + 2.6vw,3rem)}
.verdict p{color:var(--ink);margin:10px 0 0;max-width:60em;font-size:1.1rem;overflow-wrap:anywhere}
.verdict.good{color:var(--good);background:var(--good-back)}
.verdict.bad{color:var(--bad);background:var(--bad-back)}
.verdict.unsure{color:var(--unsure);background:var(--unsure-back)}
.verdict.noise{color:var(--accent);background:var(--accent-back)}
.badge.bad{color:var(--bad);background:var(--bad-back)}
.badge.unsure{color:var(--unsure);background:var(--unsure-back)}
.part{margin:44px 0 0}
.part h2{font-size:1.6rem}
.part+.tiles{margin-top:12px}
.warnings{border-left:5px solid var(--unsure)}
.warnings ul{margin:8px 0 0;padding-left:20px;overflow-wrap:anywhere}
.tiles li:first-child{flex:1.3 0 210px}
.tiles strong{white-space:normal}
.prose :is(th,td){text-align:left;white-space:normal}
@media (max-width:860px){
.tiles li:first-child{flex-basis:100%}
}
"""


def page(verdict: Verdict, fidelity: Fidelity | None, blame: Blame | None) -> str:
    """Return the page: verdict, numbers, pictures, flips, what else was measured, who is who."""
    models = f"{text(verdict.candidate.model)} against {text(verdict.base.model)}"
    sections = "\n".join(section for section in _sections(verdict, fidelity, blame) if section)
    return document(
        f"{headline(verdict)} - {models} - k2quant",
        f"{_header(verdict)}\n<main>\n{sections}\n</main>\n",
        css=f"{_CSS}{TASKS_CSS}{FLIPS_CSS}",
        head=f'<meta name="generator" content="{TOOL}">\n',
    )


def _header(verdict: Verdict) -> str:
    kind = "noise" if verdict.same_model else KINDS[verdict.decision]
    reason = f"{verdict.reason[:1].upper()}{verdict.reason[1:]}"
    return (
        f"<header><p class=eyebrow>k2quant accuracy gate</p><p class=meta>{code(verdict.candidate.model)} against "
        f"{code(verdict.base.model)}</p><div class='card verdict {kind}'><h1>{headline(verdict)}</h1>"
        f"<p>{text(reason, _SENTENCE)}</p></div></header>"
    )


def _sections(verdict: Verdict, fidelity: Fidelity | None, blame: Blame | None) -> Iterator[str]:
    yield _warnings(verdict)
    yield _tiled(_tiles(verdict))
    yield drops(verdict)
    yield accuracies(verdict)
    yield tasks(verdict)
    yield power_curve(verdict)
    if fidelity is not None:
        yield _fidelity_note(fidelity)
        yield _tiled(fidelity_facts(fidelity))
        yield from drift_pictures(fidelity)
    if blame is not None:
        yield _section(
            "Blame",
            f"{_models(blame)} on {code(blame.text)}: where the damage comes from, which is what goes when tensors are "
            "put back.",
        )
        yield _tiled(blame_facts(blame))
        yield from blame_pictures(blame)
    yield flips(verdict)
    yield _who(verdict)


def _fidelity_note(fidelity: Fidelity) -> str:
    unread = ""
    if fidelity.unread:
        unread = f" Characters that the tokenizer passes over: {code(fidelity.unread)}."
    return _section(
        "Fidelity",
        f"{_models(fidelity)} on {code(fidelity.text)}: {scored(fidelity)} in {fidelity.chunks:,} chunks, "
        "which the errors count as independent. It tells that something changed and where, not whether accuracy did."
        f"{unread}",
    )


def _models(found: Fidelity | Blame) -> str:
    """Name what was measured: a file of other models may lie beside these runs."""
    return f"{code(found.candidate.model)} against {code(found.base.model)}"


def _section(name: str, note: str) -> str:
    """Return the heading of a part of the page."""
    return f"<section class=part><h2>{name}</h2><p class=note>{note}</p></section>"


def _warnings(verdict: Verdict) -> str:
    if not verdict.warnings:
        return ""
    listed = "".join(f"<li>{text(warning, _SENTENCE)}</li>" for warning in verdict.warnings[:_WARNINGS])
    more = len(verdict.warnings) - _WARNINGS
    rest = f"<li>and {more:,} more</li>" if more > 0 else ""
    return f"<section class='card warnings'><h2>Warnings</h2><ul>{listed}{rest}</ul></section>"


def _tiles(verdict: Verdict) -> Iterator[tuple[str, str, str]]:
    """Yield label, value and note of each tile, as HTML."""
    pooled, policy = verdict.pooled, verdict.policy
    yield (
        "Drop in accuracy",
        _minus(points(pooled.drop)),
        _minus(f"{interval(*pooled.interval)}, {confidence(policy)} interval"),
    )
    yield "Margin", margin(pooled.margin), f"largest drop that is good enough; alpha {100 * policy.alpha:g}%"
    accuracy = f"accuracy {percent(pooled.base_accuracy)} &rarr; {percent(pooled.candidate_accuracy)}"
    asked = f", {pooled.answers}" if pooled.repeated else ""
    yield "Items", f"{pooled.n:,}", f"in {counted(len(verdict.tasks), 'task')}{asked}; {accuracy}"
    flipped = f"{pooled.lost:,} lost, {pooled.gained:,} gained"
    yield (
        flips_title(pooled),
        percent(pooled.flips),
        f"{flipped}; {worse(pooled)} p {text(chance(pooled.p_worse))}",
    )
    if pooled.base_cut is not None or pooled.candidate_cut is not None:
        sides = [DASH if count is None else f"{count:,}" for count in (pooled.base_cut, pooled.candidate_cut)]
        answers = f"of {pooled.base_answers:,} and {pooled.candidate_answers:,} answers of baseline and candidate"
        yield "Cut in thought", " &rarr; ".join(sides), f"{answers}; they count as wrong"
    yield "Power", f"{pooled.power:.0%}", f"chance of PASS if nothing was lost; {needed(pooled, policy)}"


def _tiled(tiles: Iterator[tuple[str, str, str]]) -> str:
    listed = "".join(
        f"<li><span>{label}</span><strong>{value}</strong><small>{note}</small></li>" for label, value, note in tiles
    )
    return f"<ul class=tiles>{listed}</ul>"


def _minus(words: str) -> str:
    return words.replace("-", "&minus;")


def _who(verdict: Verdict) -> str:
    policy = verdict.policy
    own = [f"{code(name)} {margin(share)}" for name, share in list(policy.tasks.items())[:_TASKS] if share is not None]
    early = verdict.pooled.ended_early
    facts = [
        ("baseline", _side(verdict.base)),
        ("candidate", _side(verdict.candidate)),
        ("margin", f"{margin(policy.margin)} over all items{''.join(f', {task}' for task in own)}"),
        ("alpha", f"{policy.alpha:g} for each kind of mistake"),
        ("decided by", text(decided_by(verdict))),
        *((name, text(said)) for name, _, said in (one.partition(":") for one in early)),
        ("power wanted", f"{policy.power:.0%}"),
        ("tasks", ", ".join(map(code, list(policy.tasks)[:_TASKS])) or "all that the runs hold"),
        ("k2quant", __version__),
    ]
    listed = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    return (
        f"<section class=card><h2>Who is who, and by which rules</h2><dl>{listed}</dl>"
        "<p class=note>All numbers and all flips stand in <code>gate.json</code>.</p></section>"
    )


def _side(side: Side) -> str:
    return (
        f"{code(side.model)}, model {text(short(side.model_hash))}, tokenizer {text(short(side.tokenizer_hash))}, "
        f"run in {code(side.folder)}"
    )
