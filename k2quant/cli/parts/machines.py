"""Work that many machines share: the options that say so, and what a dry run says of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import click

from k2quant.cli.parts.options import Option, all_of

if TYPE_CHECKING:
    from k2quant.cli.parts.places import Place
    from k2quant.conversion.convert import Conversion
    from k2quant.conversion.plan import Plan


def part_option(more: str) -> Option[Any]:
    """Which share of the work of a job array this process does.

    Args:
        more: what the command has to say of it.
    """
    return click.option("--part", metavar="K/N", help=more)


_MACHINES = (
    click.option(
        "--cluster",
        metavar="auto|ray://HOST:PORT",
        help="Spread the shards over a Ray cluster whose machines all see SOURCE and DESTINATION: the one that this "
        "machine is part of or that RAY_ADDRESS names, or the one with this head. --workers are threads of each.",
    ),
    part_option(
        "Write the K-th of N shares of the shards, such as 2/8, beside other processes that write the others: for "
        "job arrays. Whoever finds all shards there completes DESTINATION; any order and any restart will do."
    ),
)


def machine_options() -> Option[Any]:
    """Who else works."""
    return all_of(_MACHINES)


def refuse_solving(options: dict[str, Any]) -> None:
    """Take the options of `machine_options` out of a conversion's that runs the model, and refuse them.

    Raises:
        UsageError: one is there.
    """
    from k2quant.errors import UsageError

    given = [name for name in ("cluster", "part") if options.pop(name) is not None]
    if given:
        raise UsageError(
            f"`{given[0]}=` with `method=gptq`, which solves each layer with what the layers before it put out: that "
            "is one machine's work"
        )


def check_part(options: dict[str, Any]) -> None:
    """Refuse a part beside a cluster, and of a conversion whose rules are still to be chosen, before anything is read.

    Raises:
        UsageError: it is so, or it is no part.
    """
    from k2quant.conversion.spreading.part import beside_cluster, part_of
    from k2quant.errors import UsageError

    if options["part"] is None:
        return
    part_of(options["part"])
    if options["cluster"] is not None:
        raise beside_cluster()
    given = next((name for name in ("budget", "max_kl") if options[name] is not None), None)
    if given is not None:
        raise UsageError(
            f"`{given}=` beside `part=`: each part would weigh the whole checkpoint first. Choose the rules once, with "
            "`k2quant convert --dry-run --json`, whose `rules` are a recipe but for their `weights`, and give them to "
            "all parts as `recipe=`"
        )


def part_done(done: Conversion, destination: Place, part: str, *, as_json: bool) -> str:
    """Return what a part came to that was not the last, for people or as JSON."""
    import json

    from k2quant.conversion.spreading.part import part_of

    if as_json:
        left = {"missing": list(done.missing), "shards": done.shards}
        return json.dumps({"destination": str(destination), "already_done": False, "part": part, **left})
    return f"{destination}: {part_of(part).said} done; the rest is still to come: {done.still_to_come}"


class PartPlan(NamedTuple):
    """What a dry run knows of a part."""

    files: frozenset[str]
    """The shards that it writes."""
    restart: bool
    """Whether it would throw away what stands there."""
    more: dict[str, Any]
    """What there is to say, by name."""


def part_planned(plan: Plan, destination: Place, part: str, *, restart: bool, as_json: bool) -> PartPlan:
    """Return what a part would do.

    Raises:
        UsageError: it is no part.
        OutputError: a conversion to this folder would be refused.
    """
    from k2quant.conversion.resume import standing_shards
    from k2quant.conversion.spreading.part import part_of, share
    from k2quant.errors import DestinationStale
    from k2quant.ground.units import counted, size

    own = part_of(part)
    files = frozenset(share(plan, own))
    try:
        done = standing_shards(plan, destination, restart=False)
        restart = False  # what stands there is this very conversion's, and other parts may be at work on it
    except DestinationStale:
        if not restart:
            raise
        done = {}
    shards = [shard for shard in plan.shards if shard.file in files]
    read, written = sum(shard.bytes_read for shard in shards), sum(shard.size for shard in shards)
    there = sum(shard.file in done for shard in shards)
    said: dict[str, Any] = {"part": str(own), "shards": [shard.file for shard in shards], "shards_done": there}
    if as_json:
        return PartPlan(files, restart, {"part": said | {"bytes_read": read, "bytes_written": written}})
    what = f"{own.number} of {own.of}: {counted(len(shards), 'shard')}, {there} of them done"
    return PartPlan(files, restart, {"part": f"{what}; {size(read)} read, {size(written)} written"})


def looked_over(
    cluster: str, plan: Plan, destination: Place, options: dict[str, Any], *, as_json: bool
) -> dict[str, Any]:
    """Return what a dry run says of a cluster: each machine's cores, its room at the destination, and its time.

    Args:
        cluster: its address.
        plan: what would be written.
        destination: as it was given.
        options: of the conversion.
        as_json: whether it is for JSON.
    """
    from k2quant.conversion.spreading.cluster import check_cluster, look_over
    from k2quant.conversion.spreading.order import order
    from k2quant.ground.units import counted, duration, size

    known = {name: options[name] for name in ("stats", "activation_scales", "follow_links", "device", "sha256")}
    asked = order(plan, plan.source.place, destination, **known)
    found = look_over(check_cluster(cluster), asked, workers=options["workers"])
    cores, seconds = sum(node["cores"] for node in found), 1 / sum(1 / max(node["seconds"], 1e-9) for node in found)
    if as_json:
        return {"cluster": {"nodes": found, "cores": cores, "seconds": seconds}}
    lines = {
        f"machine {number}": f"{node['name']}: {counted(node['cores'], 'core')}, "
        + (f"{counted(node['gpus'], 'GPU')}, " if node["gpus"] else "")
        + f"{size(node['disk_free'])} free at the destination, alone about {duration(node['seconds'])}"
        for number, node in enumerate(found, 1)
    }
    together = f"{counted(len(found), 'machine')}, {counted(cores, 'core')}, about {duration(seconds)}"
    return {**lines, "cluster": f"{together} if source and destination give each what they give one"}
