"""`k2quant check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from k2quant.cli.parts import options
from k2quant.cli.parts.flags import in_flags
from k2quant.cli.parts.places import PLACE
from k2quant.cli.parts.terminal.colour import verdict
from k2quant.cli.parts.terminal.tables import Column, paragraph, table
from k2quant.errors import CheckFailed
from k2quant.ground.engines import LABELS

if TYPE_CHECKING:
    from k2quant.checking.engines import EngineCheck, Finding
    from k2quant.checkpoint.remote.address import Address


@click.command(name="check")
@click.argument("checkpoint", type=PLACE)
@click.option("--engine", type=options.words(LABELS), required=True, help="The engine that is to run it.")
@click.option(
    "--tensor-parallel",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Devices that share each matrix.",
)
@click.option("--memory", metavar="SIZE", help="What each device has: 80GB, 141GB.")
@click.option("--context", type=click.IntRange(min=1), help="Tokens of a sequence; default: what the config allows.")
@click.option("--all", "everything", is_flag=True, help="Show what passes, too.")
@options.follow_links()
@click.option("--json", "as_json", is_flag=True, help="Print every finding as JSON.")
def command(
    checkpoint: Path | Address,
    *,
    engine: str,
    tensor_parallel: int,
    memory: str | None,
    context: int | None,
    everything: bool,
    follow_links: bool,
    as_json: bool,
) -> None:
    """Test CHECKPOINT against what an engine's loader requires, by headers and config alone.

    Names, sizes, formats of what the engine holds in one module, shares of devices, what the config says and where,
    its lists against the names, tokenizer, memory. Each rule names the file of the engine that it was read from.

    Exits 3 when something fails. What cannot be told depends on the machine, and is said.

    \b
    Example:
        k2quant check --engine vllm --tensor-parallel 8 --memory 141GB Kimi-K2-Instruct-INT4
        k2quant check --engine sglang hf://moonshotai/Kimi-K2-Thinking
    """
    from k2quant.checking.engines import check_engine
    from k2quant.cli.parts.screen import working
    from k2quant.ground.units import parse_size

    room = None if memory is None else parse_size(memory)
    with working(f"reading the headers of {checkpoint.name}"):
        done = check_engine(
            checkpoint,
            engine,
            tensor_parallel=tensor_parallel,
            memory=room,
            context=context,
            follow_links=follow_links,
        )
    _print(done, everything=everything, as_json=as_json)
    if not done.passed:
        count = len(done.failures)
        verb = "fails" if count == 1 else "fail"
        raise CheckFailed(f"{LABELS[engine]} {done.version} would not run it: {count} of its rules {verb}")


def _print(done: EngineCheck, *, everything: bool, as_json: bool) -> None:
    if as_json:
        findings = [finding._asdict() for finding in done.findings]
        memory = {**done.memory._asdict(), "needed": done.memory.needed}
        content = {**done._asdict(), "passed": done.passed, "findings": findings, "memory": memory}
        click.echo(json.dumps(content, indent=1))
        return
    for finding in done.findings:
        if finding.result == "fail":
            click.echo(_failure(finding))
    rows = [finding for finding in done.findings if everything or finding.result == "cannot tell"]
    if rows:
        click.echo(table(_COLUMNS, [(each.rule, each.result, in_flags(each.text)) for each in rows]))
    click.echo(paragraph(_last(done)))


def _failure(finding: Finding) -> str:
    """Return what is said of a failure: what was found, why it matters, and who says so."""
    said = paragraph(f"FAILED {finding.rule}: {in_flags(finding.text)}", hang="  ").replace(
        "FAILED", verdict("FAILED"), 1
    )
    return f"{said}\n{paragraph(f'the engine {finding.why} ({finding.source})', indent='  ', hang='  ')}"


def _last(done: EngineCheck) -> str:
    doubts = sum(finding.result == "cannot tell" for finding in done.findings)
    passes = len(done.findings) - len(done.failures) - doubts
    counts = f"{passes} passed, {len(done.failures)} failed, {doubts} cannot be told"
    return f"{LABELS[done.engine]} {done.version}, tensor parallel {done.tensor_parallel}: {counts}"


_COLUMNS = (
    Column(head="rule", left=True),
    Column(head="result", left=True, style=verdict),
    Column(head="what was found", left=True),
)
