"""The items that changed between right and wrong: a few of each task, lost and gained apart, what differs marked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from k2quant.eval.gating.flips import CUT, Flip, by_kind
from k2quant.eval.gating.verdict import Verdict
from k2quant.eval.report.differences import differences
from k2quant.eval.report.wording import flips_title, lost_and_gained
from k2quant.report.words import code, text

SHOWN = 200
"""Flips on a page at most, folded ones included."""
CSS = """\
.task{margin:22px 0 0}
.task h3{font-size:1rem;margin:0;font-weight:600}
.task .kinds{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:0 36px}
.task ul{list-style:none;margin:4px 0 0;padding:0}
.task li{border-top:1px solid var(--line);padding:8px 0}
.task details{margin:0}
.flip{display:grid;grid-template-columns:5.6rem minmax(0,1fr);gap:0 8px;margin:0}
.flip dt{font-size:.92rem}
.flip dd{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;
font:.9em/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-variant-ligatures:none}
.flip i{color:var(--muted)}
mark{color:inherit;background:none;font-weight:700;border-bottom:2px solid}
.right mark{color:var(--good);background:var(--good-back)}
.wrong mark{color:var(--bad);background:var(--bad-back)}
@media (max-width:860px){
.task .kinds{grid-template-columns:minmax(0,1fr)}
.task .kinds>div+div{margin-top:12px}
}
"""

_OPEN = 3  # of a task and a kind that are not folded away
_PROMPT, _TARGET, _LINES = 200, 240, 8  # letters and lines of a passage


def flips(verdict: Verdict) -> str:
    """Return the card of flips: task by task, the most lost first, at most two hundred."""
    total, pooled = len(verdict.flips), verdict.pooled
    name = flips_title(pooled)
    nothing = f"No item changed {'in its share of right answers' if pooled.repeated else 'between right and wrong'}."
    if not total:
        return (
            f"<section class=card><h2>{name}</h2><p>{nothing}</p></section>" if not pooled.lost + pooled.gained else ""
        )
    listed, left_out = _listed(verdict.flips)
    several = " Of several answers a right one stands beside a wrong one." if pooled.repeated else ""
    more = f" {left_out:,} more are left out here; <code>gate.json</code> has all." if left_out else ""
    return (
        f"<section class=card id=flips><h2>{name}: {pooled.lost:,} lost, {pooled.gained:,} gained</h2>"
        f"<p class=note>{lost_and_gained(pooled)}{several} Where the answers differ they are marked, blanks made "
        f"visible.{more}</p>{listed}</section>"
    )


def _listed(found: Sequence[Flip]) -> tuple[str, int]:
    """Return the flips by task, the tasks that lost most first, and how many are left out."""
    groups = by_kind(found)
    names = sorted({task for task, _ in groups}, key=lambda task: (-len(groups.get((task, True), ())), task))
    names = names[: SHOWN // (2 * _OPEN)]
    sizes = [len(some) for (task, _), some in groups.items() if task in names]
    room = next(room for room in range(SHOWN, 0, -1) if sum(min(size, room) for size in sizes) <= SHOWN)
    listed = "".join(
        _task(task, {kind: groups.get((task, kind), []) for kind in (True, False)}, room) for task in names
    )
    return listed, sum(map(len, groups.values())) - sum(min(size, room) for size in sizes)


def _task(task: str, kinds: dict[bool, Sequence[Flip]], room: int) -> str:
    """Return a task's lost items and its gained ones, side by side where there is room."""
    columns = "".join(f"<div>{_kind(found, room, lost=lost)}</div>" for lost, found in kinds.items() if found)
    return f"<div class=task><h3>{code(task)}</h3><div class=kinds>{columns}</div></div>\n"


def _kind(found: Sequence[Flip], room: int, *, lost: bool) -> str:
    badge = "<span class='badge bad'>lost</span>" if lost else "<span class='badge good'>gained</span>"
    shown, folded = found[:_OPEN], found[_OPEN:room]
    more = f"<details><summary>{len(folded):,} more</summary>{_list(folded)}</details>" if folded else ""
    return f"{badge}{len(found):,}{_list(shown)}{more}"


def _list(found: Iterable[Flip]) -> str:
    return f"<ul>{''.join(map(_flip, found))}</ul>"


def _flip(flip: Flip) -> str:
    base, candidate = _answers(flip.base_answer, flip.candidate_answer)
    right = flip.base_answer if flip.lost else flip.candidate_answer
    lines = [
        _line(f"#{flip.doc_id}", passage(flip.prompt, _PROMPT, end=True)),
        _line("right", flip.shares) if flip.repeated else "",
        "" if flip.target.strip() == right.strip() else _line("wanted", passage(flip.target, _TARGET)),
        _line("baseline", base, "right" if flip.lost else "wrong"),
        _line("candidate", candidate, "wrong" if flip.lost else "right"),
    ]
    return f"<li><dl class=flip>{''.join(lines)}</dl></li>\n"


def _answers(*both: str) -> Sequence[str]:
    """Return two answers as HTML, what differs marked, unless one of them is none."""
    if CUT not in both:
        return differences(*both)
    return [f"<i>{CUT}</i>" if answer == CUT else passage(answer, _TARGET) for answer in both]


def _line(who: str, words: str, kind: str = "") -> str:
    return f'<div><dt>{who}</dt><dd class="{kind}">{words}</dd></div>'


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
