"""`k2quant verify`."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from k2quant.cli.parts import options
from k2quant.cli.parts.places import PLACE
from k2quant.cli.parts.terminal import tables
from k2quant.cli.parts.terminal.colour import verdict
from k2quant.cli.parts.terminal.tables import Column, paragraph
from k2quant.errors import CheckFailed, UsageError

if TYPE_CHECKING:
    from k2quant.checking.comparison import Finding
    from k2quant.checking.verify import Verification
    from k2quant.checkpoint.remote.address import Address

_SHOWN = 20


@click.command(name="verify")
@click.argument("source", type=PLACE)
@click.argument("destination", type=PLACE, required=False)
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
    source: Path | Address,
    destination: Path | Address | None,
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
        message = f"{len(done.failures):,} of {max(len(done.findings), len(done.failures)):,} checks failed"
        raise CheckFailed(message, remedy=None if destination is None else _by_design(destination))


def _by_design(destination: Path | Address) -> str | None:
    """Return what checks an output whose values are not meant to be those of its source."""
    from k2quant.checking.verify import other_values

    why = other_values(destination)
    if why is None:
        return None
    return (
        f"by its report {destination} has other values by design, for {why}; its bytes are checked by "
        f"`k2quant verify --checksums {shlex.quote(str(destination))}`"
    )


def _print(done: Verification, *, as_json: bool) -> None:
    if as_json:
        import json

        findings = [finding_record(finding) for finding in done.findings]
        click.echo(json.dumps({"passed": done.passed, "failures": done.failures, "findings": findings}, indent=1))
        return
    for name, why in list(done.failures.items())[:_SHOWN]:
        click.echo(_coloured("FAILED", paragraph(f"FAILED {name} {why}", hang="  ")))
    if len(done.failures) > _SHOWN:
        click.echo(f"... and {len(done.failures) - _SHOWN:,} more that failed")
    if done.findings:
        click.echo(table(done.findings, partial(_result, failures=done.failures)))
    if done.passed:
        click.echo(_coloured("passed", paragraph(f"passed: {_passed(done.findings)}")))
    else:
        click.echo(verdict("failed"))


def _coloured(word: str, lines: str) -> str:
    """Put colour on the word that lines begin with; before they were folded it would have counted as letters."""
    return lines.replace(word, verdict(word), 1)


def _result(finding: Finding, failures: Mapping[str, str]) -> str:
    """Say what was found of a weight, in the words of what a conversion may do."""
    if finding.name in failures:
        return "FAILED"
    if finding.relation == "differs" and finding.formats[1]:
        return f"within {finding.formats[1].upper()} rounding{', solved' if finding.solved else ''}"
    return _WORDS.get(finding.relation, finding.relation)


_WORDS = {
    "codes equal": "codes and scales equal",
    "values equal": "equal, but for -0",
    "missing": "left out, not used",
}
"""What is said of relations that pass."""


def _passed(findings: list[Finding]) -> str:
    """Say what passed, in a line."""
    from k2quant.ground.units import counted

    if not findings:
        return "every tensor and file has the checksum that the report has"
    results = Counter(_result(finding, {}) for finding in findings)
    rounded = {result: count for result, count in results.items() if result.startswith("within")}
    left = results[_WORDS["missing"]]
    parts = [f"{len(findings) - sum(rounded.values()) - left:,} equal"]
    parts += [f"{count:,} {result}" for result, count in rounded.items()] + ([f"{left:,} left out"] if left else [])
    return f"{counted(len(findings), 'tensor')}: {', '.join(parts)}"


def finding_record(finding: Finding) -> dict[str, Any]:
    """Return a finding as JSON has it; a signal-to-noise ratio of infinity becomes null."""
    from dataclasses import asdict
    from math import isfinite

    record = finding._asdict()
    if finding.figures is not None:
        ratio = finding.figures.sqnr_db
        record["figures"] = {**asdict(finding.figures), "sqnr_db": ratio if isfinite(ratio) else None}
    return record


def table(findings: list[Finding], result: Callable[[Finding], str] = attrgetter("relation")) -> str:
    """Return a table of findings: a line for each class, pair of formats and result.

    Args:
        findings: of two checkpoints.
        result: says what was found of one.
    """
    from k2quant.checking.comparison import rounding_note
    from k2quant.ground.names import TENSOR_CLASSES, tensor_class
    from k2quant.kernels.codecs.figures import Figures

    counts: Counter[tuple[str, str, str]] = Counter()
    sums: dict[tuple[str, str, str], Figures] = {}
    for finding in findings:
        key: tuple[str, str, str] = (tensor_class(finding.name), _formats(finding), result(finding))
        counts[key] += 1
        sums[key] = sums.get(key, Figures()) + (finding.figures or Figures())
    rows = []
    for key in sorted(counts, key=lambda key: (TENSOR_CLASSES.index(key[0]), *key[1:])):
        figures = sums[key]
        rounding = (f"{figures.sqnr_db:.2f} dB", f"{figures.worst:.3g}") if figures.changed else ()
        rows.append((key[0], key[1], f"{counts[key]:,}", key[2], *rounding))
    lines = [tables.table(_COLUMNS, rows)]
    if any(figures.changed for figures in sums.values()):
        lines.append(paragraph(_UNITS))
    note = rounding_note(findings)
    return "\n".join([*lines, paragraph(note)] if note else lines)


_COLUMNS = (
    Column(head="class", left=True),
    Column(head="format", left=True),
    Column(head="tensors"),
    Column(head="result", left=True, style=verdict),
    Column(head="SQNR"),
    Column(head="worst error", minor=True),
)
_UNITS = "SQNR: energy of the weights over that of their errors, in dB. Worst error: of one weight, in its own unit."


def _formats(finding: Finding) -> str:
    """Return what a weight is in both checkpoints: `fp8 -> int4`, or `bf16` where it is the same."""
    first, second = map(_format, finding.formats, finding.dtypes)
    return first if first == second else f"{first} -> {second}"


def _format(name: str | None, dtype: str | None) -> str:
    """Return a format that is quantised by its name, and what is none by its dtype, such as `f32`."""
    from k2quant.formats.known import FORMATS

    if name is not None and FORMATS[name].quantised:
        return name
    return dtype.lower() if dtype else name or "none"
