"""`k2quant export mlx`."""

from __future__ import annotations

from typing import Any

import click

from k2quant.cli.exporting.saying import Terms, say_done, say_plan
from k2quant.cli.parts import conversion
from k2quant.cli.parts.places import PLACE, Place, remote_options
from k2quant.cli.parts.results import suggest

_TERMS = Terms("mode", "shard", named=False)
_OF_WRITING = {"soft_lock", "low_disk", "workers"}


@click.command(name="mlx")
@click.argument("source", type=PLACE)
@click.argument("destination", type=PLACE)
@click.option(
    "--shard-size",
    metavar="SIZE",
    help="Most bytes of tensors in a shard, such as 5GB, which is the default; a larger stack of experts has its own.",
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
    shard_size: str | None,
    bandwidth: float | None,
    **options: Any,
) -> None:
    """Write the checkpoint in SOURCE to DESTINATION as mlx-lm loads it without a transform.

    Codes of INT4, MXFP4 and NVFP4 go over as they are; FP8 becomes BF16. The vision tower of K2.5 is not written. The
    same command after a kill resumes; on a finished DESTINATION it says so and does nothing.

    \b
    Example:
        k2quant export mlx Kimi-K2-Thinking kimi-k2-thinking-mlx
    """
    options["shard_size"] = conversion.shard_bytes(shard_size)
    if dry_run:
        _dry_run(source, destination, as_json=as_json, bandwidth=bandwidth, **options)
    else:
        _export(source, destination, as_json=as_json, **options)


def _export(source: Place, destination: Place, *, as_json: bool, **options: Any) -> None:
    from k2quant.cli.parts.screen import progress
    from k2quant.exports import export_mlx

    with progress(f"{source.name} to {destination.name}") as show:
        done = export_mlx(source, destination, progress=show, **options)
    say_done(done, done.folder, _TERMS, files=1, as_json=as_json)
    if not as_json:
        suggest(("mlx_lm.chat", "--model", done.folder, "--trust-remote-code"))


def _dry_run(source: Place, destination: Place, *, as_json: bool, bandwidth: float | None, **options: Any) -> None:
    from k2quant.cli.parts.screen import working
    from k2quant.exports import look_ahead_mlx

    asked = {name: value for name, value in options.items() if name not in _OF_WRITING}
    with working(f"reading headers of {source.name}"):
        plan, done, room = look_ahead_mlx(source, destination, **asked)
    say_plan(plan, done, room, _TERMS, files=None, bandwidth=bandwidth, as_json=as_json)
