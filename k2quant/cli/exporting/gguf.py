"""`k2quant export gguf`."""

from __future__ import annotations

from itertools import chain
from typing import Any

import click

from k2quant.cli.exporting.saying import Terms, say_done, say_plan
from k2quant.cli.parts import conversion
from k2quant.cli.parts.options import words
from k2quant.cli.parts.places import PLACE, Place, remote_options
from k2quant.cli.parts.results import suggest
from k2quant.formats.bf16 import Bf16

_TERMS = Terms("type", "part", named=True)
_OF_WRITING = {"soft_lock", "low_disk"}


@click.command(name="gguf")
@click.argument("source", type=PLACE)
@click.argument("destination", type=PLACE, metavar="FILE.gguf")
@click.option(
    "--rest",
    type=words((Bf16.name, "f32", "q8_0")),
    help="Type of all that is no routed expert and has no codes of GGUF's; norms and routers are F32 in any case. "
    "Default: bf16.",
)
@click.option(
    "--experts",
    type=words((Bf16.name, "q8_0")),
    help="Type of routed experts in a format of which GGUF has no codes, such as FP8. Default: bf16.",
)
@click.option(
    "--fallback",
    type=words(("q8_0", Bf16.name)),
    help="Type of tensors whose codes cannot be kept, such as INT4 with a scale that is no value of FP16. Default: "
    "such a tensor is refused by name.",
)
@click.option(
    "--split-size",
    metavar="SIZE",
    help="Most bytes of tensors in a file, such as 48GB: NAME-00001-of-000NN.gguf and so on. Default: one file.",
)
@click.option("--workers", type=click.IntRange(1, 256), help="Threads; default: one for each core.")
@remote_options()
@conversion.begin_options()
def command(
    source: Place,
    destination: Place,
    *,
    dry_run: bool,
    as_json: bool,
    split_size: str | None,
    bandwidth: float | None,
    **options: Any,
) -> None:
    """Write the checkpoint in SOURCE as GGUF to FILE.gguf, for llama.cpp.

    Codes of INT4, MXFP4 and NVFP4 go over as they are, INT4 as Q4_0. The vision tower of K2.5 is not written. The same
    command after a kill resumes; on a finished FILE.gguf it says so and does nothing.

    \b
    Example:
        k2quant export gguf Kimi-K2-Thinking kimi-k2-thinking.gguf
        k2quant export gguf Kimi-K2-Instruct kimi-k2-instruct.gguf --experts q8_0 --rest q8_0 --split-size 48GB
    """
    from k2quant.ground.units import parse_size

    options["split_size"] = None if split_size is None else parse_size(split_size)
    if dry_run:
        _dry_run(source, destination, as_json=as_json, bandwidth=bandwidth, **options)
    else:
        _export(source, destination, as_json=as_json, **options)


def _export(source: Place, destination: Place, *, as_json: bool, **options: Any) -> None:
    from k2quant.cli.parts.screen import progress
    from k2quant.exports import export_gguf

    with progress(f"{source.name} to {destination.name}") as show:
        done = export_gguf(source, destination, progress=show, **options)
    say_done(done, done.file, _TERMS, files=len(done.files), as_json=as_json)
    if not as_json:
        starting = done.report.get("starting", {})
        told = ((f"--{name.replace('_', '-')}", f"{value:g}") for name, value in starting.items())
        model = ("-m", done.file, *chain.from_iterable(told))
        suggest(("llama-server", *model), ("llama-cli", *model, "-p", "..."))


def _dry_run(source: Place, destination: Place, *, as_json: bool, bandwidth: float | None, **options: Any) -> None:
    from k2quant.cli.parts.screen import working
    from k2quant.exports import look_ahead_gguf

    asked = {name: value for name, value in options.items() if name not in _OF_WRITING}
    with working(f"reading headers and scales of {source.name}"):
        plan, done, room = look_ahead_gguf(source, destination, **asked)
    files = {file.name: file.size for file in plan.files}
    say_plan(plan, done, room, _TERMS, files=files, bandwidth=bandwidth, as_json=as_json)
