"""`k2quant verify`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from k2quant.cli.parts import options
from k2quant.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from k2quant.checking.comparison import Finding
    from k2quant.checking.verify import Verification

_SHOWN = 20


@click.command(name="verify")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path), required=False)
@click.option(
    "--against", type=click.Path(path_type=Path), metavar="REPORT", help="Errors must be no worse than this says."
)
@click.option(
    "--checksums", is_flag=True, help="Compare SOURCE, a finished conversion, with the checksums in its report."
)
@click.option("--workers", type=click.IntRange(min=1), help="Threads; default: one for each core.")
@options.follow_links()
@click.option("--json", "as_json", is_flag=True, help="Print every finding as JSON.")
def command(
    source: Path,
    destination: Path | None,
    *,
    against: Path | None,
    checksums: bool,
    workers: int | None,
    follow_links: bool,
    as_json: bool,
) -> None:
    """Compare DESTINATION with SOURCE by what their tensors mean, or one folder with its checksums.

    Exits 3 when something is not what a conversion may do.

    \b
    Example:
        k2quant verify Kimi-K2-Instruct Kimi-K2-Instruct-INT4
        k2quant verify --checksums Kimi-K2-Instruct-INT4
    """
    from k2quant.checking.verify import verify, verify_checksums
    from k2quant.cli.parts.screen import progress

    if checksums == (destination is not None):
        raise UsageError("name SOURCE and DESTINATION, or one folder with --checksums")
    if checksums and against is not None:
        raise UsageError("--against compares two folders; --checksums reads the folder's own report")
    with progress("verifying") as show:
        if destination is None:
            done = verify_checksums(source, workers=workers, follow_links=follow_links, progress=show)
        else:
            done = verify(
                source, destination, against=against, workers=workers, follow_links=follow_links, progress=show
            )
    _print(done, as_json=as_json)
    if not done.passed:
        raise CheckFailed(f"{len(done.failures)} of {max(len(done.findings), len(done.failures))} checks failed")


def _print(done: Verification, *, as_json: bool) -> None:
    if as_json:
        import json

        findings = [finding_record(finding) for finding in done.findings]
        click.echo(json.dumps({"passed": done.passed, "failures": done.failures, "findings": findings}, indent=1))
        return
    for name, why in list(done.failures.items())[:_SHOWN]:
        click.echo(f"FAILED {name} {why}")
    if done.findings:
        click.echo(table(done.findings))
    click.echo("passed" if done.passed else "failed")


def finding_record(finding: Finding) -> dict[str, Any]:
    """Return a finding as JSON has it; a signal-to-noise ratio of infinity becomes null."""
    from dataclasses import asdict
    from math import isfinite

    record = finding._asdict()
    if finding.figures is not None:
        ratio = finding.figures.sqnr_db
        record["figures"] = {**asdict(finding.figures), "sqnr_db": ratio if isfinite(ratio) else None}
    return record


def table(findings: list[Finding]) -> str:
    """Return a table of findings: a line for each class, relation and pair of formats."""
    from k2quant.checking.comparison import rounding_note
    from k2quant.ground.names import TENSOR_CLASSES, tensor_class
    from k2quant.kernels.codecs.figures import Figures

    counts: Counter[tuple[str, str, str]] = Counter()
    sums: dict[tuple[str, str, str], Figures] = {}
    for finding in findings:
        formats = " -> ".join(name or "other" for name in finding.formats)
        key: tuple[str, str, str] = (tensor_class(finding.name), formats, finding.relation)
        counts[key] += 1
        sums[key] = sums.get(key, Figures()) + (finding.figures or Figures())
    lines = [f"{'class':<16} {'formats':<16} {'tensors':>8}  {'result':<13} {'SQNR':>9} {'worst error':>12}"]
    for key in sorted(counts, key=lambda key: (TENSOR_CLASSES.index(key[0]), *key[1:])):
        figures = sums[key]
        rounding = f"{figures.sqnr_db:>6.2f} dB {figures.worst:>12.3g}" if figures.changed else ""
        lines.append(f"{key[0]:<16} {key[1]:<16} {counts[key]:>8,}  {key[2]:<13} {rounding}".rstrip())
    note = rounding_note(findings)
    return "\n".join([*lines, note] if note else lines)
