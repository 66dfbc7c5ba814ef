"""Every task of a verdict as rows: what decides in one table, the tests behind it in another that is folded away."""

from __future__ import annotations

from collections.abc import Iterable

from k2quant.eval.gating.verdict import Comparison, Verdict
from k2quant.eval.report.wording import chance, interval, lost_and_gained, margin, outcome, percent, rows, signed, title
from k2quant.report.words import DASH, code, text

KINDS = {"PASS": "good", "FAIL": "bad", "INCONCLUSIVE": "unsure"}
"""Classes of the style sheet for what a verdict may be."""

CSS = """\
.tasks :is(th,td){padding-left:8px;padding-right:8px}
.tasks th:first-child{padding-left:0;white-space:normal}
.tasks thead th{white-space:normal;vertical-align:bottom}
.tasks tbody th{width:140px}
.tasks td{white-space:normal}
.tasks tbody th wbr{display:inline}
@media (max-width:1100px){
.tasks,.tasks tbody{display:block}
.tasks thead{display:none}
.tasks tr{display:grid;grid-template-columns:repeat(auto-fill,minmax(140px,1fr));gap:4px 16px;
border-bottom:1px solid var(--line);padding:12px 0}
.tasks tr:last-child{border:0}
.tasks tbody :is(th,td){display:block;border:0;padding:0;min-width:0;text-align:left;white-space:normal}
.tasks .wide{grid-column:1/-1}
.tasks td[data-head]::before{content:attr(data-head) " ";color:var(--muted)}
}
"""

_MOST = 1000
_DROP = "drop [interval], pp"
_CHANGED = "lost / gained"
_CUT = "cut in thought"
_LONG = ("verdict", "items", _DROP, _CHANGED, _CUT)


def tasks(verdict: Verdict) -> str:
    """Return the card with both tables; the pool stands first."""
    found = rows(verdict)[: _MOST + 1]
    left_out = len(verdict.tasks) + 1 - len(found)
    more = (
        f"<p class=note>{left_out:,} tasks are left out here; <code>gate.json</code> has all.</p>" if left_out else ""
    )
    deciding = ["verdict", "items", "baseline", "candidate", _DROP, _CHANGED, "power", "needed"]
    tests = ["margin", "p good", "p bad", "p worse"]
    looked = any(row.base_cut is not None or row.candidate_cut is not None for row in found)
    thoughts = " Cut in thought: answers of baseline and candidate that never left their reasoning." if looked else ""
    worse_is = "a sign-flip test" if verdict.pooled.repeated else "McNemar's"
    if looked:
        deciding.append(_CUT)
    names = [_name(row, verdict) for row in found]
    cells = (_deciding(row, verdict, looked=looked) for row in found)
    first = _table("every task", deciding, zip(names, cells, strict=True))
    second = _table("tests of every task", tests, zip(names, map(_tests, found), strict=True))
    return (
        f"<section class=card><h2>Every task</h2><p class=note>{lost_and_gained(verdict.pooled)}{thoughts} Power: the "
        "chance of PASS if nothing was lost; needed: the items that would give the power wanted.</p>"
        f"{first}{more}<details><summary>Margins and p-values</summary><p class=note>p good is small where the drop is "
        "shown to be below the margin, p bad where it is shown to be above it (of tasks adjusted by Holm, since one of "
        "many may look bad by chance). p worse is "
        f"{worse_is}: it finds damage of any size, and no verdict rests on it.</p>{second}</details></section>"
    )


def _table(label: str, heads: list[str], found: Iterable[tuple[str, list[str]]]) -> str:
    """Return a table; on a narrow screen each row is a block in which its heads stand before its cells."""
    columns = "".join(f"<th scope=col>{head}</th>" for head in ("task", *heads))
    body = "".join(f"<tr><th scope=row class=wide>{name}</th>{_cells(heads, cells)}</tr>\n" for name, cells in found)
    return (
        f'<table class="tasks words" aria-label="{label}"><thead><tr>{columns}</tr></thead>\n'
        f"<tbody>\n{body}</tbody></table>"
    )


def _cells(heads: list[str], cells: list[str]) -> str:
    """Return the cells of a row: what is long has a line of its own on a narrow screen."""
    return "".join(
        f'<td{" class=wide" if head in _LONG else ""} data-head="{head}">{cell}</td>'
        for head, cell in zip(heads, cells, strict=True)
    )


def _name(row: Comparison, verdict: Verdict) -> str:
    return f"<b>{title(row, verdict)}</b>" if row is verdict.pooled else code(row.name)


def _deciding(row: Comparison, verdict: Verdict, *, looked: bool) -> list[str]:
    said = outcome(verdict, row)
    cells = [
        f"<span class='badge {KINDS[row.decision]}'>{said}</span>" if said else "none",
        f"{row.n:,}",
        percent(row.base_accuracy),
        percent(row.candidate_accuracy),
        f"{signed(row.drop)} {interval(*row.interval).replace(' ', '&nbsp;')}".replace("-", "&minus;"),
        f"{row.lost:,}&nbsp;/ {row.gained:,}",
        f"{row.power:.0%}",
        DASH if row.needed is None else f"{row.needed:,}",
    ]
    return [*cells, f"{_count(row.base_cut)}&nbsp;/ {_count(row.candidate_cut)}"] if looked else cells


def _count(number: int | None) -> str:
    return DASH if number is None else f"{number:,}"


def _tests(row: Comparison) -> list[str]:
    return [margin(row.margin), *(text(chance(p)) for p in (row.p_good, row.p_bad, row.p_worse))]
