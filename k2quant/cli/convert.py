"""`k2quant convert`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from k2quant.cli.parts import allotting, conversion, machines, options, solving
from k2quant.cli.parts.places import PLACE, Place, remote_options
from k2quant.cli.parts.results import suggest

if TYPE_CHECKING:
    from k2quant.calib import Allotment
    from k2quant.conversion.convert import Conversion


@click.command(name="convert")
@click.argument("source", type=PLACE)
@click.argument("destination", type=PLACE)
@conversion.format_options()
@conversion.method_options()
@conversion.beside_options()
@allotting.budget_options()
@solving.solving_options()
@options.device(more="Where the arithmetic runs: cpu or cuda.", others=("cpu",))
@machines.machine_options()
@remote_options()
@conversion.run_options()
def command(
    source: Place,
    destination: Place,
    *,
    dry_run: bool,
    as_json: bool,
    shard_size: str | None,
    **options: Any,
) -> None:
    """Convert the checkpoint in SOURCE and write it to DESTINATION.

    The same command after a kill resumes; on a finished DESTINATION it says so and does nothing.

    \b
    Example:
        k2quant convert --to int4 Kimi-K2-Instruct Kimi-K2-Instruct-INT4
        k2quant convert --to int4 hf://moonshotai/Kimi-K2-Instruct Kimi-K2-Instruct-INT4
        k2quant convert --to int4 --cluster auto Kimi-K2-Instruct Kimi-K2-Instruct-INT4
        k2quant convert --to int4 --part 2/8 Kimi-K2-Instruct Kimi-K2-Instruct-INT4
        k2quant convert --to int4 --method gptq --data chats.jsonl Kimi-K2-Instruct Kimi-K2-Instruct-GPTQ
    """
    options["shard_size"] = conversion.shard_bytes(shard_size)
    options["recipe"] = conversion.read_once(options["recipe"])
    method, bandwidth = options["method"], options.pop("bandwidth")
    machines.check_part(options)
    source = _pinned(source, destination, restart=options["restart"])
    found = allotting.allotted(source, options)
    own = solving.taken_out(options, conversion.choice(options), asked=method)
    if own is not None:
        machines.refuse_solving(options)
        solving.check_solving(source, options, own, tokenizer=not dry_run)
        if dry_run:
            more = allotting.shown(found, as_json=as_json)
            solving.dry_run(source, destination, options, own, as_json=as_json, more=more, bandwidth=bandwidth)
        else:
            _say(solving.solve(source, destination, options, own), source, destination, options, as_json=as_json)
    elif dry_run:
        _dry_run(source, destination, as_json=as_json, found=found, bandwidth=bandwidth, **options)
    else:
        _convert(source, destination, as_json=as_json, **options)


def _pinned(source: Place, destination: Place, *, restart: bool) -> Place:
    """Return the source at the commit that its destination was begun with, and say so where nobody named it."""
    from k2quant.cli.parts.screen import remark
    from k2quant.conversion.places import pinned

    here, said = pinned(source, destination, restart=restart)
    if said:
        remark(f"note: {said}")
    return here


def _convert(source: Place, destination: Place, *, as_json: bool, **options: Any) -> None:
    from k2quant.cli.parts.screen import progress
    from k2quant.conversion.convert import convert

    with progress(f"{source.name} to {conversion.target(options)}") as show:
        done = convert(source, destination, progress=show, **options)
    _say(done, source, destination, options, as_json=as_json)


def _say(done: Conversion, source: Place, destination: Place, options: dict[str, Any], *, as_json: bool) -> None:
    """Say what a run came to."""
    import json

    from k2quant.conversion.searching.gains import bought

    conversion.announce(done)
    if done.missing:
        click.echo(machines.part_done(done, destination, options["part"], as_json=as_json))
        return
    conversion.tell_engines(done, destination)
    gain = None if done.already_done else bought(done.report)
    if as_json:
        click.echo(json.dumps(conversion.summary(done, destination) | ({} if gain is None else {"bought": gain})))
        return
    click.echo(conversion.last_line(done, destination))
    if not done.already_done:
        click.echo(conversion.quality(done))
    if gain is not None:
        click.echo(gain)
    linked = ("--follow-links",) if options["follow_links"] else ()
    suggest(("k2quant", "verify", *linked, source, destination), ("k2quant", "report", destination))


def _dry_run(
    source: Place,
    destination: Place,
    *,
    as_json: bool,
    found: Allotment | None,
    bandwidth: float | None,
    **options: Any,
) -> None:
    from k2quant.cli.parts.screen import working
    from k2quant.conversion.convert import codecs_of
    from k2quant.conversion.resume import refuse_nested
    from k2quant.conversion.searching.asked import planned
    from k2quant.ground.pool import checked_workers

    refuse_nested(source, destination)
    choice = conversion.choice(options)
    with working(f"reading the headers of {source.name}"):
        known = options["stats"], options["activation_scales"]
        plan, rounder = planned(source, choice, *known, follow_links=options["follow_links"])
    more = allotting.shown(found, as_json=as_json) or {}
    if options["cluster"] is None:
        codecs_of(options["device"])
    else:
        with working(f"asking the machines of {options['cluster']}"):
            more |= machines.looked_over(options["cluster"], plan, destination, options, as_json=as_json)
    restart, only = options["restart"], None
    if options["part"] is not None:
        own = machines.part_planned(plan, destination, options["part"], restart=restart, as_json=as_json)
        restart, only, more = own.restart, own.files, more | own.more
    conversion.dry_run(
        plan,
        destination,
        restart=restart,
        only=only,
        workers=checked_workers(options["workers"]),
        as_json=as_json,
        rounder=rounder,
        more=more,
        bandwidth=bandwidth,
        low_disk=options["low_disk"],
    )
