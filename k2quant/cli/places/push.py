"""`k2quant push`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from k2quant.cli.parts.results import suggest

if TYPE_CHECKING:
    from k2quant.checkpoint.remote.pushing import Pushing

_NAMED = 5  # files in a remark


@click.command(name="push")
@click.argument("folder", metavar="DST", type=click.Path(path_type=Path))
@click.argument("address", metavar="hf://USER/NAME[@BRANCH]")
@click.option("--private", is_flag=True, help="Make a private repository, where there is none yet.")
@click.option("--message", metavar="TEXT", help="Of the commit; default: what is uploaded, and what wrote it.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(folder: Path, address: str, *, private: bool, message: str | None, as_json: bool) -> None:
    """Upload DST, which convert or merge wrote, to a model on a Hugging Face hub, in one commit.

    The hub shows nothing of it before all is there. The same command after a kill goes on; what is there is not sent
    again. The login is huggingface_hub's: `hf auth login`, or HF_TOKEN.

    \b
    Example:
        k2quant push Kimi-K2-Instruct-INT4 hf://user/Kimi-K2-Instruct-INT4 --private
    """
    from k2quant.checkpoint.remote.pushing import push
    from k2quant.cli.parts.screen import progress
    from k2quant.ground.units import size

    with progress(f"pushing {folder.name}") as show:
        done = push(folder, address, private=private, message=message, seen=_say, progress=show)
    if as_json:
        click.echo(json.dumps({**done._asdict(), "address": str(done.address)}))
        return
    click.echo(f"{done.address}: {done.files} files, {size(done.size)}, {size(done.sent)} of them sent now")
    click.echo(done.url)
    suggest(("k2quant", "inspect", str(done.address)))


def _say(plan: Pushing) -> None:
    """Say what will be uploaded, before it is."""
    from k2quant.cli.parts.screen import remark
    from k2quant.ground.units import counted, size

    missing = plan.missing
    text = f"{plan.address}: {counted(len(plan.files), 'file')}, {size(sum(plan.files.values()))}"
    known = f"; {len(plan.there)} are there already" if plan.there else ""
    remark(f"{text}{known}; to send: {counted(len(missing), 'file')}, {size(sum(missing.values()))}")
    if plan.kept:
        remark("note: README.md on the hub is somebody's own and stays")
    for names, why in (
        (plan.others, "not uploaded, for the report does not know them"),
        (plan.abroad, "on the hub, and none of this output; they stay"),
    ):
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            remark(f"note: {why}: {', '.join(names[:_NAMED])}{more}")
