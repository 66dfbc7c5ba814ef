"""Where a conversion reads from: a branch of a hub moves, so what was begun goes on with the commit it began with."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from k2quant.checkpoint.reader import INCOMPLETE, REPORT
from k2quant.checkpoint.remote.address import HUB, Address, parse
from k2quant.checkpoint.writing.opening import target_at
from k2quant.errors import K2QuantError


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
