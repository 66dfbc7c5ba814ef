"""`k2quant eval blame`."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from k2quant.cli.eval.run import bars
from k2quant.cli.parts import options
from k2quant.cli.parts.results import give
from k2quant.cli.parts.screen import counting, remark
from k2quant.cli.parts.terminal.tables import Column, paragraph, table

if TYPE_CHECKING:
    from k2quant.eval.drift.findings import Blame, Suspect

_BEFORE_SEARCH = 3  # passes: the baseline, its noise, the damage


@click.command(name="blame")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("candidate", metavar="CAND", type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(path_type=Path), metavar="FILE", help="Plain UTF-8, or .jsonl with prompts.")
@click.option("--tokens", type=click.IntRange(min=3), default=8192, show_default=True, help="How much of it to read.")
@click.option("--context", type=click.IntRange(min=2), default=128, show_default=True, help="Tokens of a chunk.")
@click.option("--lines", is_flag=True, help="Each line is a text of its own.")
@click.option("--passes", type=click.IntRange(min=5), default=100, show_default=True, help="Forward passes at most.")
@options.device()
@options.dtype("float32", "; narrower ones are faster and hide small damage")
@options.exact_backend()
@options.follow_links()
@options.trust_remote_code("BASE's tokenizer's")
@options.soft_lock()
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the JSON to a file too; then a search that was stopped resumes.",
)
def command(
    base: Path,
    candidate: Path,
    *,
    text: Path | None,
    tokens: int,
    context: int,
    lines: bool,
    passes: int,
    device: str,
    dtype: str,
    backend: str,
    follow_links: bool,
    trust_remote_code: bool,
    soft_lock: bool,
    as_json: bool,
    output: Path | None,
) -> None:
    """Find the tensor classes, layers and weights of CAND that carry its damage against BASE.

    Groups of weights are put back to BASE, and the KL divergence that is left says what they explain. The two may be in
    different formats and larger than memory; nothing is copied. Finding nothing is no error.

    With -o FILE, what each pass measured is kept in FILE.passes until FILE is written: the same command resumes a
    search that was stopped, with the same numbers to the last bit; so does one with more --passes.

    The text is plain, or JSON Lines (.jsonl) with a prompt and a completion in each row: then only completions are
    scored. Without one, a short sample is read.

    \b
    Example:
        k2quant eval blame K2-Instruct K2-INT4 --text notes.txt -o blame.json
    """
    options.check_early(base, candidate, follow_links=follow_links, text=text, output=output)
    from k2quant.eval import discard_passes, find_blame
    from k2quant.model.generation import silence

    silence()
    gc.enable()  # each pass leaves a model behind
    resume = None if output is None else output.with_name(f"{output.name}.passes")
    try:
        with bars(lambda: counting("passes, at most")) as (reading, show):
            found = find_blame(
                base,
                candidate,
                text=text,
                context=context,
                tokens=tokens,
                lines=lines,
                device=device,
                dtype=dtype,
                backend=backend,  # type: ignore[arg-type]  # click checked it
                passes=passes,
                resume=resume,
                soft_lock=soft_lock,
                reading=reading,
                progress=show,
                remark=remark,
                follow_links=follow_links,
                trust_remote_code=trust_remote_code,
            )
    except KeyboardInterrupt:
        remark(f"{resume}: the same command resumes" if resume else "nothing is kept; with -o FILE a search can resume")
        raise
    give(found.as_dict(), lambda: _show(found, dtype), as_json=as_json, output=output)
    if resume is not None:
        discard_passes(resume, soft_lock=soft_lock)
        remark(f"written to {output}")


def _show(found: Blame, dtype: str) -> None:
    click.echo(f"baseline   {found.base.model} ({found.base.folder})")
    click.echo(f"candidate  {found.candidate.model} ({found.candidate.folder})")
    if not found.changed:
        click.echo("\nNothing to blame: both hold the same weights, byte for byte.")
        return
    click.echo(f"text       {found.text}; {found.passes} passes; {found.changed} weights are stored otherwise")
    click.echo(f"damage     {found.damage.value:.3g} ± {found.damage.error:.1g} nats a token (KL divergence)")
    click.echo(f"noise      {found.noise.value:.3g} ± {found.noise.error:.1g}, from rounding alone\n")
    if found.damage.value == 0:
        click.echo("Nothing to blame: these weights are stored otherwise, and not one bit of a prediction differs.")
        return
    if not found.classes and not found.suspects:
        click.echo(_nothing(found, dtype))
        return
    tables = [_table("tensor class", found.classes)] if found.classes else []
    if found.together:
        tables.append(_table("suspect", [*found.suspects, found.together]))
    click.echo("\n\n".join(tables) + "\n")
    click.echo(
        paragraph(
            "A share is what goes of the damage when the group alone is put back, with its 95% interval. Groups\n"
            "overlap in effect, so that shares may sum to more than 100%."
        )
    )


def _nothing(found: Blame, dtype: str) -> str:
    if found.passes > _BEFORE_SEARCH:
        return (
            "Nothing named: there is damage, but on this text no tensor class explains a part that chance\n"
            "could not give. A longer text (--text, --tokens) may show where it comes from."
        )
    advice = "" if dtype == "float32" else "\n--dtype float32 has less noise and may show where it comes from."
    return f"Nothing to blame: the damage cannot be told from the noise of rounding.{advice}"


def _table(title: str, rows: Iterable[Suspect]) -> str:
    columns = (Column(head=title, left=True), *(Column(head=head) for head in ("tensors", "share", "95%")))
    return table(columns, map(_row, rows))


def _row(suspect: Suspect) -> tuple[str, ...]:
    low, high = (f"{100 * edge:.1f}" for edge in suspect.interval)
    return suspect.name, str(suspect.tensors), f"{100 * suspect.share:.1f}%", f"{low} to {high}%"
