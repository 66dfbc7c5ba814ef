"""The verdict as Markdown: for a job summary, a pull request, a release note.

Names, prompts and answers come from files that may be hostile: what Markdown would act upon is written as entities.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from k2quant.eval.drift.findings import Blame, Fidelity, Suspect
from k2quant.eval.gating.flips import Flip
from k2quant.eval.gating.verdict import Comparison, Side, Verdict
from k2quant.eval.report.wording import (
    LEFT_OUT,
    TOOL,
    confidence,
    decided_by,
    drop,
    flips_title,
    headline,
    items,
    margin,
    needed,
    outcome,
    percent,
    perplexity,
    points,
    rows,
    scored,
    short,
    title,
)
from k2quant.ground.units import counted
from k2quant.ground.version import __version__
from k2quant.report.words import plain

_SENTENCE, _NAME, _PASSAGE = 1000, 100, 160  # letters shown
_WARNINGS, _SUSPECTS, _EARLY = 20, 10, 50
_ROOM = 500  # bytes for the words around rows that were cut

_MARKS = {"PASS": "\N{WHITE HEAVY CHECK MARK}", "FAIL": "\N{CROSS MARK}", "INCONCLUSIVE": "\N{WARNING SIGN}"}


def markdown(
    verdict: Verdict,
    *,
    fidelity: Fidelity | None = None,
    blame: Blame | None = None,
    flips: int = 200,
    limit: int = 10_000_000,
) -> str:
    """Return the report: verdict first, flips last.

    Args:
        verdict: what to report.
        fidelity: what else was measured.
        blame: where the damage comes from.
        flips: how many to list at most.
        limit: bytes at most; flips are cut first, then tasks, then anything.
    """
    head, tail = _head(verdict), _early(verdict) + _warnings(verdict) + _drift(fidelity, blame) + _sides(verdict)
    left = limit - len(f"{head}{tail}".encode()) - _ROOM
    tasks, left = _taken(_tasks(verdict), left)
    table = _table(_TASKS, tasks, len(verdict.tasks) + 1, "task")
    shown, left = _taken(_flips(verdict.flips[:flips]), left)
    listed = _folded(
        f"{flips_title(verdict.pooled)}: {len(verdict.flips):,}", _table(_FLIPS, shown, len(verdict.flips), "flip")
    )
    return _cut(f"{head}{table}{tail}{listed if verdict.flips else ''}", limit)


def escaped(value: object, limit: int = _SENTENCE) -> str:
    """Return a value as text on one line in which Markdown sees nothing but text."""
    return re.sub(
        r"[^\w\s.,;%()/+'\-=:]|://|(?i:www)\.",
        lambda hit: _entities(hit[0]),
        plain(value, limit).strip(),
        flags=re.ASCII,
    )


def _entities(letters: str) -> str:
    """Return ASCII as entities; other letters mean nothing to Markdown."""
    return "".join(letter if ord(letter) > 127 else f"&#{ord(letter)};" for letter in letters)


def _quoted(value: object, limit: int = _PASSAGE, *, end: bool = False) -> str:
    """Return a passage as code, in which nobody is mentioned and nothing is linked."""
    words = " ".join(str(value).split())
    if len(words) > limit:
        words = f"...{words[-limit:]}" if end else f"{words[:limit]}..."
    return f"<code>{escaped(words, limit + 3)}</code>" if words else "<i>empty</i>"


def _name(value: str) -> str:
    """Return a name as code, plain to read where it is an ordinary one."""
    shown = plain(value, _NAME)
    return f"`{shown}`" if re.fullmatch(r"[\w.,:/+-]+", shown) else _quoted(shown, _NAME)


def _head(verdict: Verdict) -> str:
    mark = "" if verdict.same_model else f"{_MARKS[verdict.decision]} "
    return f"<!-- {TOOL} -->\n# {mark}{headline(verdict)}\n\n{escaped(verdict.reason)}\n\n"


_TASKS = (
    *("task", "n", "baseline", "candidate", "drop", "interval"),
    *("lost / gained", "margin", "power", "verdict"),
)


def _tasks(verdict: Verdict) -> Iterator[str]:
    for comparison in rows(verdict):
        name = f"**{title(comparison, verdict)}**" if comparison is verdict.pooled else _name(comparison.name)
        yield _row([name, *_cells(comparison), outcome(verdict, comparison) or "none"])


def _cells(comparison: Comparison) -> list[str]:
    _, _, interval = drop(comparison).partition(" pp ")
    return [
        f"{comparison.n:,}",
        percent(comparison.base_accuracy),
        percent(comparison.candidate_accuracy),
        points(comparison.drop),
        interval,
        f"{comparison.lost:,} / {comparison.gained:,}",
        margin(comparison.margin),
        f"{comparison.power:.0%}",
    ]


def _early(verdict: Verdict) -> str:
    """Say how many answers of each side ended too early, and of which tasks; not of those where none did."""
    tasks = verdict.tasks if len(verdict.tasks) > 1 else ()
    struck = [t for t in tasks if any((t.base_cut, t.candidate_cut, t.base_truncated, t.candidate_truncated))]
    parts = [(None, verdict.pooled), *((task.name, task) for task in struck)]
    said = [(name, sentence) for name, part in parts[:_EARLY] for sentence in part.ended_early]
    listed = (f"- {f'{_name(name)}: ' if name else ''}{escaped(sentence)}\n" for name, sentence in said)
    return f"{''.join(listed)}\n" if said else ""


def _warnings(verdict: Verdict) -> str:
    if not verdict.warnings:
        return ""
    listed = "".join(f"- {escaped(warning)}\n" for warning in verdict.warnings[:_WARNINGS])
    more = len(verdict.warnings) - _WARNINGS
    return f"## Warnings\n\n{listed}{f'- {more:,} more {LEFT_OUT}' if more > 0 else ''}\n"


def _drift(fidelity: Fidelity | None, blame: Blame | None) -> str:
    found = ""
    if fidelity is not None:
        found += (
            f"## Fidelity\n\n{_measured(fidelity)}, {scored(fidelity)}: KL divergence "
            f"{fidelity.kl.value:.3g} \N{PLUS-MINUS SIGN} {fidelity.kl.error:.2g} nats a token "
            f"(median {fidelity.kl_median:.3g}, 99% {fidelity.kl_99:.3g}, max {fidelity.kl_max:.3g}), "
            f"same likeliest token {percent(fidelity.same_top.value)}, "
            f"perplexity {perplexity(fidelity.base_perplexity)} to {perplexity(fidelity.candidate_perplexity)}. "
            "A tripwire, not a verdict.\n\n"
        )
    if blame is not None:
        suspects = "".join(f"- {escaped(_suspect(suspect))}\n" for suspect in blame.suspects[:_SUSPECTS])
        listed = suspects or "No group of tensors could be told to do damage.\n"
        found += f"## Blame\n\n{_measured(blame)}:\n\n{listed}\n"
    return found


def _measured(found: Fidelity | Blame) -> str:
    """Name what was measured: a file of other models may lie beside these runs."""
    return f"{_name(found.candidate.model)} against {_name(found.base.model)} on {_name(found.text)}"


def _suspect(suspect: Suspect) -> str:
    low, high = (percent(edge) for edge in suspect.interval)
    return f"{suspect.name} ({suspect.tensors:,} tensors): {percent(suspect.share)} [{low}, {high}] of the damage"


def _sides(verdict: Verdict) -> str:
    policy = verdict.policy
    return (
        f"Baseline {_side(verdict.base)}, candidate {_side(verdict.candidate)}. Margin {margin(policy.margin)}, "
        f"alpha {policy.alpha:g}, power {policy.power:.0%}; intervals at {confidence(policy)}; decided by: "
        f"{decided_by(verdict)}. All together: {items(verdict.pooled.n)}; {needed(verdict.pooled, policy)} power. "
        f"k2quant {__version__}.\n\n"
    )


def _side(side: Side) -> str:
    return f"{_name(side.model)} ({_name(short(side.model_hash))})"


_FLIPS = ("", "task", "doc", "prompt ends with", "target", "baseline", "candidate")


def _flips(flips: Iterable[Flip]) -> Iterator[str]:
    for flip in flips:
        answers = [_quoted(answer) for answer in (flip.target, flip.base_answer, flip.candidate_answer)]
        kind = f"{'lost' if flip.lost else 'gained'}{f': right {flip.shares}' if flip.repeated else ''}"
        yield _row([kind, _name(flip.task), f"{flip.doc_id}", _quoted(flip.prompt, end=True), *answers])


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _table(heads: tuple[str, ...], lines: list[str], total: int, what: str) -> str:
    more = total - len(lines)
    note = f"{counted(more, what)} {LEFT_OUT}.\n\n" if more else ""
    return f"{_row(heads)}{_row('---' for _ in heads)}{''.join(lines)}\n{note}" if lines else note


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{content}</details>\n"


def _taken(lines: Iterable[str], left: int) -> tuple[list[str], int]:
    """Return the first lines that fit, and the bytes that are left."""
    taken = []
    for line in lines:
        size = len(line.encode())
        if size > left:
            break
        taken.append(line)
        left -= size
    return taken, left


def _cut(text: str, limit: int) -> str:
    return text.encode()[: max(limit, 0)].decode(errors="ignore")
