"""The items that changed between right and wrong, side by side."""

from __future__ import annotations

from collections.abc import Sequence

from k2quant.eval.gating.verdict import Flip, Verdict
from k2quant.report.words import code, text

SHOWN = 200
_OPEN = 20  # the others are folded away
_PROMPT, _ANSWER, _LINES = 300, 240, 8  # letters and lines of a cell

_HEADS = ("item", "prompt ends with", "target", "baseline's answer", "candidate's answer")


def flips(verdict: Verdict) -> str:
    """Return a table: lost items first, at most two hundred."""
    total, pooled = len(verdict.flips), verdict.pooled
    if not total:
        return (
            "<section class=card><h2>Flips</h2><p>No item changed between right and wrong.</p></section>"
            if not pooled.lost + pooled.gained
            else ""
        )
    left_out = f" {total - SHOWN:,} more are left out here; <code>gate.json</code> has all." if total > SHOWN else ""
    shown, folded = verdict.flips[:_OPEN], verdict.flips[_OPEN:SHOWN]
    more = f"<details><summary>{len(folded):,} more</summary>{_table(folded)}</details>" if folded else ""
    return (
        f"<section class=card id=flips><h2>Flips: {pooled.lost:,} lost, {pooled.gained:,} gained</h2>"
        f"<p class=note>Lost: only the baseline has it right. Gained: only the candidate has.{left_out}</p>"
        f"{_table(shown)}{more}</section>"
    )


def _table(flips: Sequence[Flip]) -> str:
    heads = "".join(f"<th scope=col>{head}</th>" for head in _HEADS)
    return f"<table class=flips><thead><tr>{heads}</tr></thead>\n<tbody>\n{''.join(map(_row, flips))}</tbody></table>\n"


def _row(flip: Flip) -> str:
    kind = "<span class='badge bad'>lost</span>" if flip.lost else "<span class='badge good'>gained</span>"
    cells = [
        passage(flip.prompt, _PROMPT, end=True),
        *(passage(answer, _ANSWER) for answer in (flip.target, flip.base_answer, flip.candidate_answer)),
    ]
    listed = "".join(f'<td data-head="{head}">{cell}</td>' for head, cell in zip(_HEADS[1:], cells, strict=True))
    return f"<tr><th scope=row>{kind}<br>{code(flip.task)} <small>#{flip.doc_id}</small></th>{listed}</tr>\n"


def passage(words: str, limit: int, *, end: bool = False) -> str:
    """Return a passage as HTML, its lines kept; what is too long is cut, of a prompt at its beginning."""
    whole = words.replace("\r\n", "\n").replace("\t", " ").strip()
    lines = (whole[-limit:] if end else whole[:limit]).split("\n")
    lines = lines[-_LINES:] if end else lines[:_LINES]
    kept = "\n".join(lines)
    if not kept:
        return "<i>empty</i>"
    html = "\n".join(text(line, limit) for line in lines)
    if len(kept) == len(whole):
        return html
    return f"&hellip;{html}" if end else f"{html}&hellip;"
