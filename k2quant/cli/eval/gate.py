"""`k2quant eval gate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from k2quant.cli.parts.screen import remark, working
from k2quant.cli.parts.terminal import colour
from k2quant.cli.parts.terminal.tables import Column, paragraph, table
from k2quant.errors import CheckFailed, Inconclusive, UsageError, printable

if TYPE_CHECKING:
    from k2quant.eval import Policy, Verdict
    from k2quant.eval.gating.verdict import Comparison

_FLIPS_SHOWN = 10


@click.command(name="gate")
@click.argument("base", metavar="BASELINE", type=click.Path(path_type=Path))
@click.argument("candidate", type=click.Path(path_type=Path))
@click.option("--policy", "policy_file", type=click.Path(path_type=Path), help="YAML with margin, alpha, power, tasks.")
@click.option("--margin", metavar="SHARE", help="Largest drop that is good enough, such as 1pp.  [default: 1pp]")
@click.option("--alpha", metavar="SHARE", help="Chance of each kind of mistake.  [default: 0.05]")
@click.option("--tasks", metavar="A,B", help="Tasks to compare.  [default: all]")
@click.option("--aa", "same_model", is_flag=True, help="Both runs are of one model: measure the noise. Never a PASS.")
@click.option("--fidelity", type=click.Path(path_type=Path), metavar="FILE", help="Of `eval fidelity -o`, to draw.")
@click.option("--blame", type=click.Path(path_type=Path), metavar="FILE", help="Of `eval blame -o`, to draw.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), metavar="DIR", help="Write gate.html, .md, .xml (JUnit), .json."
)
@click.option("--github", is_flag=True, help="Write GitHub's job summary and annotations.")
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as JSON.")
def command(
    base: Path,
    candidate: Path,
    *,
    policy_file: Path | None,
    margin: str | None,
    alpha: str | None,
    tasks: str | None,
    same_model: bool,
    fidelity: Path | None,
    blame: Path | None,
    output: Path | None,
    github: bool,
    as_json: bool,
) -> None:
    """Decide whether the run CANDIDATE is as good as the run BASELINE: PASS, FAIL or INCONCLUSIVE.

    Both answered the same items; the items that flipped decide, by an exact paired non-inferiority test. An item that
    was asked several times counts once, by its share of right answers. Runs are folders of `k2quant eval run`, `k2quant
    eval tools`, or `lm_eval --log_samples`. Exits 0 on PASS, 3 on FAIL, 4 on INCONCLUSIVE.

    \b
    Example:
        k2quant eval gate runs/base runs/int4 --margin 1pp -o gate
    """
    import os
    import secrets

    from k2quant.eval import gate
    from k2quant.eval.drift.reading import read_blame, read_fidelity
    from k2quant.eval.report import publish_to_github, write_reports
    from k2quant.ground.extras import need

    if output is not None:
        need("report", "drawing the gate's page")
    if output is None and (fidelity or blame):
        raise UsageError("--fidelity and --blame are drawn into the report; name its folder with -o")
    drift = read_fidelity(fidelity) if fidelity else None
    causes = read_blame(blame) if blame else None
    policy = _policy(policy_file, margin, alpha, tasks)
    page = None
    with working("comparing"):
        verdict = gate(base, candidate, policy=policy, same_model=same_model)
        if output is not None:
            page = write_reports(verdict, output, fidelity=drift, blame=causes).html
    token = secrets.token_hex(16)
    if github:
        for line in publish_to_github(verdict, os.environ, fidelity=drift, blame=causes):
            click.echo(line, err=as_json)
        click.echo(f"::stop-commands::{token}", err=as_json)  # an answer may hold what GitHub takes for a command
    if as_json:
        for piece in verdict.as_json():
            click.echo(piece, nl=False)
    else:
        show(verdict, page=page)
    if github:
        click.echo(f"::{token}::", err=as_json)
    if page is not None:
        remark(f"report: {page}")
    _end(verdict)


def _policy(file: Path | None, margin: str | None, alpha: str | None, tasks: str | None) -> Policy:
    from k2quant.eval import Policy
    from k2quant.eval.gating.policy import read_policy, share

    if file is not None:
        if margin or alpha or tasks:
            raise UsageError("--policy has margin, alpha and tasks; leave the options out")
        return read_policy(file)
    given = {key: share(text) for key, text in (("margin", margin), ("alpha", alpha)) if text is not None}
    names = [] if tasks is None else [name.strip() for name in tasks.split(",")]
    if not all(names):
        raise UsageError(f"--tasks: expected names with commas between them, found {tasks!r}")
    return Policy(**given, tasks=dict.fromkeys(names))


def show(verdict: Verdict, *, page: Path | None = None) -> None:
    """Print a verdict for people: what it is and why, a table, the first flips, and the page that has the others."""
    word = "NOISE FLOOR" if verdict.same_model else verdict.decision
    head, *rest = paragraph(f"{word}: {printable(verdict.reason)}").split("\n")
    click.echo(colour.verdict(word) + head[len(word) :])
    for line in rest:
        click.echo(line)
    click.echo()
    for name, side in (("baseline", verdict.base), ("candidate", verdict.candidate)):
        click.echo(paragraph(printable(f"{side.model} ({side.folder})"), indent=f"{name:<11}", hang=" " * 11))
    click.echo()
    rows = [*verdict.tasks, verdict.pooled] if len(verdict.tasks) > 1 else [verdict.pooled]
    click.echo(table(_COLUMNS, map(_row, rows)))
    click.echo()
    click.echo(paragraph(f"drop, interval: percentage points; {_about_flips(verdict.pooled)}"))
    for said in verdict.pooled.ended_early:
        click.echo(paragraph(said))
    _show_flips(verdict, page)
    for warning in verdict.warnings:
        click.echo("\n" + paragraph(f"note: {printable(warning)}"))


def _about_flips(pooled: Comparison) -> str:
    if pooled.repeated:
        return f"flips: items right more often by the baseline (-) or the candidate (+), {pooled.answers}"
    return "flips: items only the baseline (-) or the candidate (+) has right"


_COLUMNS = (
    Column(head="task", left=True),
    Column(head="verdict", left=True, style=colour.verdict),
    *(Column(head=head) for head in ("items", "baseline", "candidate", "drop", "interval", "flips")),
)


def _row(comparison: Comparison) -> tuple[str, ...]:
    low, high = comparison.interval
    return (
        comparison.name,
        comparison.decision,
        f"{comparison.n:,}",
        f"{comparison.base_accuracy:.2%}",
        f"{comparison.candidate_accuracy:.2%}",
        f"{100 * comparison.drop:+.2f}",
        f"{100 * low:+.2f} to {100 * high:+.2f}",
        f"-{comparison.lost} +{comparison.gained}" if comparison.flips else "0",
    )


def _show_flips(verdict: Verdict, page: Path | None) -> None:
    for flip in verdict.flips[:_FLIPS_SHOWN]:
        often = f" (right {flip.shares})" if flip.repeated else ""
        said = printable(
            f"{_mark(lost=flip.lost)} {flip.task} {flip.doc_id}{often}: {flip.prompt[-40:]!r} wants "
            f"{flip.target[:30]!r}: {flip.base_answer[:30]!r} became {flip.candidate_answer[:30]!r}"
        )
        click.echo(paragraph(said, indent="  ", hang=" " * 9))
    if len(verdict.flips) > _FLIPS_SHOWN:
        where = "; -o DIR writes a page with them" if page is None else f", in {printable(str(page))}"
        more = f"and {len(verdict.flips) - _FLIPS_SHOWN:,} more{where}"
        click.echo(paragraph(more, indent="  ", hang="  "))


def _mark(*, lost: bool) -> str:
    return "lost  " if lost else "gained"


def _end(verdict: Verdict) -> None:
    """Leave with the verdict's exit code.

    Raises:
        CheckFailed: FAIL.
        Inconclusive: INCONCLUSIVE.
    """
    if verdict.decision == "FAIL":
        raise CheckFailed("the gate says no")
    if verdict.decision == "INCONCLUSIVE":
        raise Inconclusive("no verdict" if verdict.same_model else "the gate cannot tell")
