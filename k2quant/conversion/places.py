"""Where a conversion reads from: at which commit, and what comes over the network.

A branch of a hub moves, so what was begun goes on with the commit that it began with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container
from pathlib import Path
from typing import Any, NamedTuple

from k2quant.checkpoint.reader import INCOMPLETE, REPORT
from k2quant.checkpoint.remote.address import HUB, Address, parse
from k2quant.checkpoint.supply.choosing import Way, way_of
from k2quant.checkpoint.supply.order import Use, owners
from k2quant.checkpoint.writing.opening import target_at
from k2quant.conversion.placing import Placed
from k2quant.conversion.searching.surveys import surveyed
from k2quant.errors import K2QuantError
from k2quant.ground.saying.showing import brief


class Coming(NamedTuple):
    """What of a source at an address comes over the network, and how."""

    address: str
    way: Way
    """`ranges`, straight into memory, or `shards`, by way of the disk."""
    traffic: int
    """Bytes."""
    rate: float
    """Bytes a second that `seconds` reckons with."""
    seconds: float
    source_on_disk: int
    """Bytes of the source that lie on the disk at a time, at most, beside the output."""
    source_on_low_disk: int
    """The same with `low_disk=True`."""
    source_least: int
    """Bytes of the source that the disk must have room for beside the output, whatever may lie there."""

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)


def coming(
    plan: Placed, done: Container[str], *, bandwidth: float | None = None, searched: bool = False
) -> Coming | None:
    """Return what of a plan's source comes over the network; None where it is all here.

    Args:
        plan: what will be written.
        done: names of the output shards that stand.
        bandwidth: bytes a second; None: as the headers came.
        searched: whether somebody rounds better than the formats' own rules, and may read a weight twice.
    """
    from k2quant.checkpoint.supply.stage import MOST_LOW  # here: what fetches is loaded when something is fetched

    source = plan.source
    sizes = {name: header.size for name, header in source.shards.items() if header.supply is not None}
    if source.supply is None or not sizes:
        return None
    uses = [Use(shard.file, tuple(each for each in shard.ranges() if each[0] in sizes)) for shard in plan.shards]
    known = {name for name in sizes if source.supply.place.files[name].sha256 is not None}
    todo = [use for use in uses if use.output not in done]
    choice = way_of(todo, owners(uses), sizes, known, once=not (searched or any(surveyed(plan))))
    rate = bandwidth or source.rate or 1.0
    needed = {file for use in todo for file, _, _ in use.ranges}
    lying = sorted((sizes[file] for file in needed), reverse=True) if choice.way == "shards" else []
    on_disk = sum(lying), sum(lying[:MOST_LOW]), sum(lying[:1])
    return Coming(str(source.place), choice.way, choice.traffic, rate, choice.traffic / rate, *on_disk)


def staged(destination: Path | Address) -> int:
    """Return the bytes of a source that a stopped run left in a folder, which the next goes on with or deletes."""
    if not isinstance(destination, Path) or not destination.is_dir():
        return 0
    left = (path for path in target_at(destination, report=REPORT, incomplete=INCOMPLETE).stage.glob("*"))
    return sum(path.lstat().st_blocks * 512 for path in left)


def pinned(source: Path | Address, destination: Path | Address, *, restart: bool = False) -> tuple[Path | Address, str]:
    """Return the source with the commit that its destination was begun with, where the address names no revision.

    Args:
        source: what is to be read.
        destination: what was begun or finished there is looked at, and not changed.
        restart: whether that is to be thrown away.

    Returns:
        the source, and what is to be said of it: nothing where it is as it was named.
    """
    if not isinstance(source, Address) or source.scheme != HUB or source.revision:
        return source, ""
    found = None
    with contextlib.suppress(K2QuantError, OSError):  # what is wrong there is said when it is opened
        found = None if restart else _begun_with(destination)
    if found is None or (found.scheme, found.path) != (source.scheme, source.path):
        return source, ""
    remark = f"the source is {found}, with which {destination} was begun; name a revision for another"
    return found, remark


def _begun_with(spot: Path | Address) -> Address | None:
    """Return the address that a destination's report or journal has of its source."""
    if isinstance(spot, Path) and not spot.is_dir():
        return None
    destination = target_at(spot, report=REPORT, incomplete=INCOMPLETE)
    said: Any = destination.finished_report() or next(iter(destination.journal()), None) or {}
    known = said.get("source")
    address = known.get("address") if isinstance(known, dict) else None
    return parse(address) if isinstance(address, str) else None
