"""Work that many machines share: the options that say so, and what a dry run says of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from k2quant.cli.parts.options import Option, all_of

if TYPE_CHECKING:
    from k2quant.cli.parts.places import Place
    from k2quant.conversion.plan import Plan

_MACHINES = (
    click.option(
        "--cluster",
        metavar="auto|ray://HOST:PORT",
        help="Spread the shards over a Ray cluster whose machines all see SOURCE and DESTINATION: the one that this "
        "machine is part of or that RAY_ADDRESS names, or the one with this head. --workers are threads of each.",
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

    if options.pop("cluster") is not None:
        raise UsageError(
            "`cluster=` with `method=gptq`, which solves each layer with what the layers before it put out: that is "
            "one machine's work"
        )


def looked_over(
    cluster: str, plan: Plan, source: Place, destination: Place, options: dict[str, Any], *, as_json: bool
) -> dict[str, Any]:
    """Return what a dry run says of a cluster: each machine's cores, its room at the destination, and its time.

    Args:
        cluster: its address.
        plan: what would be written.
        source: as it was given.
        destination: likewise.
        options: of the conversion.
        as_json: whether it is for JSON.
    """
    from k2quant.conversion.spreading.cluster import check_cluster, look_over
    from k2quant.conversion.spreading.order import order
    from k2quant.ground.units import counted, duration, size

    known = {name: options[name] for name in ("stats", "activation_scales", "follow_links", "device", "sha256")}
    found = look_over(check_cluster(cluster), order(plan, source, destination, **known), workers=options["workers"])
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
