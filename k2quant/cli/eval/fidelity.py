"""`k2quant eval fidelity`."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from k2quant.cli.parts import options
from k2quant.cli.parts.machines import part_option
from k2quant.cli.parts.results import give
from k2quant.cli.parts.screen import counting
from k2quant.cli.parts.terminal.tables import Column, paragraph, table

if TYPE_CHECKING:
    from k2quant.eval.drift.findings import Fidelity, LayerFidelity, Unfinished
from k2quant.ground.intervals import Estimate

_NAMED = 16  # experts of a layer that are listed by number

PRODUCTS = {
    "decoded": "of the BF16 values that weights mean: equal values give exactly 0",
    "auto": "by the fused kernels, whose sums have another order than BF16's: equal values need not give 0",
    "reference": "in plain torch: equal values in two formats need not give 0",
}
"""What each backend does to the figures."""

_COLUMNS = (
    *(Column(head=head) for head in ("layer", "rel. error", "cosine", "KL", "same experts", "overlap", "load shift")),
    Column(head="never", minor=True),
    Column(head="starved", minor=True),  # named below the table
)


@click.command(name="fidelity")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("candidate", metavar="CAND", type=click.Path(path_type=Path))
@click.option("--text", type=click.Path(path_type=Path), metavar="FILE", help="Plain UTF-8, or .jsonl with prompts.")
@click.option("--tokens", type=click.IntRange(min=3), default=4096, show_default=True, help="How much of it to read.")
@click.option("--context", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens of a chunk.")
@click.option("--lines", is_flag=True, help="Each line is a text of its own.")
@options.device()
@options.dtype()
@options.exact_backend()
@part_option(
    "Measure the K-th of N shares of the text, such as 2/8, beside other processes that measure the others: for job "
    "arrays. Whoever finds all of it measured writes -o FILE; any order and any restart will do."
)
@options.soft_lock()
@options.follow_links()
@options.trust_remote_code("BASE's tokenizer's")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the JSON to a file too.",
)
def command(
    base: Path,
    candidate: Path,
    *,
    text: Path | None,
    tokens: int,
    context: int,
    lines: bool,
    device: str,
    dtype: str,
    backend: str,
    part: str | None,
    soft_lock: bool,
    follow_links: bool,
    trust_remote_code: bool,
    as_json: bool,
    output: Path | None,
) -> None:
    """Measure how far the predictions of CAND drift from those of BASE, and in which layers.

    Perplexity, KL divergence, and for each layer the error of its output and of its router's choices. Both models are
    streamed layer by layer and may be larger than memory. A tripwire: only `eval gate` can tell whether accuracy was
    lost.

    The text is plain, or JSON Lines (.jsonl) with a prompt and a completion in each row: then only completions are
    scored. Without one, a short sample is read.

    With --part, the parts meet in FILE.parts, in a folder that all machines see.

    \b
    Example:
        k2quant eval fidelity K2-Instruct K2-INT4 --text notes.txt -o fidelity.json
    """
    sharing = _sharing(part, output, soft_lock=soft_lock)
    options.check_early(base, candidate, follow_links=follow_links, text=text, output=output)
    from k2quant.eval import measure_fidelity
    from k2quant.eval.drift.findings import Unfinished
    from k2quant.model.generation import silence

    silence()
    gc.enable()  # two passes through two models make garbage
    given: dict[str, Any] = {
        "text": text,
        "context": context,
        "tokens": tokens,
        "lines": lines,
        "device": device,
        "dtype": dtype,
        "backend": backend,
        "follow_links": follow_links,
        "trust_remote_code": trust_remote_code,
    }
    with counting("layers of both models") as show:
        found: Fidelity | Unfinished = measure_fidelity(base, candidate, **given, **sharing, progress=show)
    if isinstance(found, Unfinished):
        click.echo(_still_to_come(found, output, as_json=as_json))
        return
    note = _about_unread(found.unread) if found.unread else None
    give(found.as_dict(), lambda: _show(found), as_json=as_json, output=output, note=note, attempt=_attempt(part))


def _sharing(part: str | None, output: Path | None, *, soft_lock: bool) -> dict[str, Any]:
    """Return how the text is shared out; the parts meet in a folder beside the result.

    Raises:
        UsageError: it is no part, or there is no file for the result.
    """
    if part is None:
        return {"soft_lock": soft_lock}
    from k2quant.conversion.spreading.part import part_of
    from k2quant.errors import UsageError

    part_of(part)
    if output is None:
        raise UsageError("`part=` without `output=`: name the file of the result, beside which the parts meet")
    return {"part": part, "shared": output.with_name(f"{output.name}.parts"), "soft_lock": soft_lock}


def _attempt(part: str | None) -> str:
    """Return letters for a file that two parts may write, if both find the whole text measured."""
    from k2quant.checkpoint.writing.destination import attempt_at

    return attempt_at(part.replace("/", "-of-")) if part else ""


def _still_to_come(found: Unfinished, output: Path | None, *, as_json: bool) -> str:
    """Return what a part came to that was not the last, for people or as JSON."""
    from k2quant.conversion.spreading.part import part_of

    if as_json:
        left = {"missing": list(found.missing), "batches": found.batches}
        return json.dumps({"output": str(output), "part": found.part, **left})
    return f"{output}: {part_of(found.part).said} done; the rest is still to come: {found.still_to_come}"


def _about_unread(characters: str) -> str:
    """Say that a part of the text was not seen at all."""
    some = ascii(characters[:8])
    return f"note: the tokenizer passes over {len(characters)} kinds of characters in this text, such as {some}"


def _show(found: Fidelity) -> None:
    click.echo(f"baseline   {found.base.model} ({found.base.folder})")
    click.echo(f"candidate  {found.candidate.model} ({found.candidate.folder})")
    scored = "tokens of completions" if found.completions else "predictions"
    click.echo(f"text       {found.text}, {found.tokens} {scored} in {found.chunks} chunks")
    click.echo(f"products   {PRODUCTS.get(found.backend, found.backend)}\n")
    for name, value in _figures(found):
        click.echo(f"{name:<28} {value}")
    click.echo("\n" + table(_COLUMNS, map(_row, found.layers)) + "\n")
    click.echo(
        paragraph("error and cosine of each layer's output; KL of what norm and head would predict from it, nats")
    )
    for line in _starved(found):
        click.echo(line)
    click.echo()
    click.echo(
        paragraph(
            "This is a tripwire and no verdict: it says how much changed and where, not whether accuracy was lost.\n"
            "Near the baseline it says nothing about accuracy; `k2quant eval gate` decides."
        )
    )


def _figures(found: Fidelity) -> list[tuple[str, str]]:
    """Return the figures of the whole text, each with its name."""
    return [
        ("perplexity of the baseline", f"{found.base_perplexity:.5g}"),
        ("perplexity of the candidate", f"{found.candidate_perplexity:.5g}"),
        ("ln of their ratio", _with_error(found.log_ratio)),
        ("KL divergence, nats a token", _with_error(found.kl)),
        ("  median, 99%, largest", f"{found.kl_median:.4g}, {found.kl_99:.4g}, {found.kl_max:.4g}"),
        ("  the other way round", _with_error(found.reverse_kl)),
        ("same likeliest token", f"{found.same_top.value:.2%} +- {found.same_top.error:.2%}"),
    ]


def _with_error(estimate: Estimate) -> str:
    return f"{estimate.value:.4g} +- {estimate.error:.2g}"


def _row(layer: LayerFidelity) -> list[str]:
    """Return a layer's cells; a dense layer has no experts to compare."""
    cells = [f"{layer.layer}", f"{layer.relative_mse:.3g}", f"{layer.cosine:.6f}", f"{layer.kl:.3g}"]
    if layer.same_experts is not None and layer.overlap is not None and layer.load_shift is not None:
        cells += [f"{share:.2%}" for share in (layer.same_experts, layer.overlap, layer.load_shift)]
        cells += [str(len(layer.never)), str(len(layer.starved))]
    return cells


def _starved(found: Fidelity) -> list[str]:
    """Name the experts that lost all their tokens."""
    lines = []
    for layer in found.layers:
        if layer.starved:
            names = ", ".join(map(str, layer.starved[:_NAMED]))
            more = f" and {len(layer.starved) - _NAMED} more" if len(layer.starved) > _NAMED else ""
            lines.append(f"layer {layer.layer}: experts that only the baseline visits: {names}{more}")
    return lines
