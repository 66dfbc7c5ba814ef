"""Arguments that name a checkpoint: a folder here, or an address such as `hf://org/name`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from k2quant.checkpoint.remote.address import Address, spot
from k2quant.cli.parts.options import Option, all_of

if TYPE_CHECKING:
    from k2quant.conversion.places import Coming

Place = Path | Address
"""What such an argument names."""


_REMOTE = (
    click.option(
        "--low-disk",
        is_flag=True,
        help="Of a SOURCE at an address, keep at most two shards on the disk, where any come to lie there.",
    ),
)


def remote_options() -> Option[Any]:
    """How a source comes that is at an address."""
    return all_of((*_REMOTE, bandwidth()))


def bandwidth() -> Option[Any]:
    """Return the option that says how fast it comes."""
    return click.option(
        "--bandwidth",
        metavar="RATE",
        callback=_rate,
        help="What a dry run or inspect reckons with for a SOURCE at an address: 10Gbit, 1.2GB/s; default: as its "
        "headers came.",
    )


def _rate(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:  # noqa: ARG001  click hands it
    from k2quant.ground.units import parse_rate

    return None if value is None else parse_rate(value)


def lines(found: Coming, *, asked: bool, low_disk: bool = False) -> dict[str, str]:
    """Return what a dry run says of a source at an address, by what each line begins with.

    Args:
        found: what comes.
        asked: whether the rate was named.
        low_disk: whether few shards of it may lie on the disk.
    """
    from k2quant.ground.units import duration, size

    how = "straight into memory" if found.way == "ranges" else "by way of the disk"
    lying = "none of it"
    if found.source_on_disk:
        lying = f"up to {size(found.source_on_low_disk if low_disk else found.source_on_disk)}"
        if not low_disk and found.source_on_low_disk < found.source_on_disk:
            lying += f", as room allows; with --low-disk up to {size(found.source_on_low_disk)}"
    return {
        "traffic": f"{size(found.traffic)} from {found.address}, {how}",
        "network": f"about {duration(found.seconds)} at {rate_said(found.rate, asked=asked)}",
        "source on disk": lying,
    }


def rate_said(rate: float, *, asked: bool) -> str:
    """Return a rate, and where it is from."""
    from k2quant.ground.units import size

    return f"{size(rate)}/s" + ("" if asked else ", as the headers came, which may be slow; see --bandwidth")


class _Place(click.ParamType[Place]):
    """A folder or an address; a path type of click would fold the slashes of `hf://` into one."""

    name = "place"

    def convert(
        self,
        value: Any,
        param: click.Parameter | None,  # noqa: ARG002  click hands it to all
        ctx: click.Context | None,  # noqa: ARG002
    ) -> Place:
        """Return what the argument names.

        Raises:
            UsageError: it begins like an address, and is none.
        """
        return spot(os.fsdecode(value) if isinstance(value, bytes) else value)


PLACE = _Place()
"""The type of an argument that takes both."""
