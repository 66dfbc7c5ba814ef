"""Everything with which another process makes the very same plan, as JSON.

Headers are read anew there, from the source itself. Digests of what identifies a plan go along, so that a process that
sees another source, other statistics or another release writes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from k2quant.checkpoint.files.json_kinds import mapping, text, truth
from k2quant.checkpoint.remote.address import Address, spot
from k2quant.conversion.plan import Options, Plan, options_from
from k2quant.conversion.resume import identity
from k2quant.conversion.searching.asked import planned
from k2quant.errors import CheckpointError, UsageError
from k2quant.formats.format import listed
from k2quant.ground.saying.showing import brief
from k2quant.ground.version import __version__

if TYPE_CHECKING:
    from k2quant.conversion.searching.searched import Searched


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a process is asked to make some shards of; see `convert` for each."""

    source: str
    """A folder from the root of the file system on, or an address."""
    destination: str
    """Likewise."""
    options: Options
    digests: Mapping[str, str]
    """SHA-256 of each thing that identifies the plan, by its name; see `digests`."""
    stats: str | None = None
    activation_scales: str | None = None
    follow_links: bool = False
    device: str = "cpu"
    sha256: bool = False
    low_disk: bool = False

    def __repr__(self) -> str:
        """Return it in one line."""
        return brief(self)

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        said = {part.name: getattr(self, part.name) for part in fields(self)}
        return said | {"options": self.options.as_json(), "digests": dict(self.digests)}


def order(
    plan: Plan,
    source: str | os.PathLike[str] | Address,
    destination: str | os.PathLike[str] | Address,
    *,
    stats: str | os.PathLike[str] | None = None,
    activation_scales: str | os.PathLike[str] | None = None,
    **more: Any,
) -> Order:
    """Return the order by which other processes make the same plan.

    Args:
        plan: what `planned` made of all this.
        source: as `convert` was given it, like the others.
        destination: where all write to, by a name that all know.
        stats: folder of statistics.
        activation_scales: folder of such, or `one`.
        more: `follow_links`, `device`, `sha256` and `low_disk`.
    """
    inputs = activation_scales if plan.options.activation_scales == "stats" else None
    return Order(
        source=_anywhere(source),
        destination=_anywhere(destination),
        options=plan.options,
        digests=digests(plan),
        stats=None if stats is None else _anywhere(stats),
        activation_scales=None if inputs is None else _anywhere(inputs),
        **more,
    )


def order_from(content: object) -> Order:
    """Return the order that `Order.as_json` said.

    Raises:
        UsageError: it is none of this release.
    """
    try:
        said = mapping(content)
        return Order(
            source=text(said["source"]),
            destination=text(said["destination"]),
            options=options_from(said["options"]),
            digests={name: text(value) for name, value in mapping(said["digests"]).items()},
            stats=_text_or_none(said["stats"]),
            activation_scales=_text_or_none(said["activation_scales"]),
            follow_links=truth(said["follow_links"]),
            device=text(said["device"]),
            sha256=truth(said["sha256"]),
            low_disk=truth(said["low_disk"]),
        )
    except (TypeError, ValueError, KeyError) as error:
        raise UsageError(f"not an order of k2quant {__version__}: {error}; use one release on all machines") from error


def digests(plan: Plan) -> dict[str, str]:
    """Return a SHA-256 of each thing that must be alike for two processes to write one output."""
    found = {"version": __version__, **identity(plan)}
    return {
        name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest() for name, value in found.items()
    }


def made(asked: Order) -> tuple[Plan, Searched | None]:
    """Plan what was ordered, in this process; return with it who searches scales, if anybody does.

    Raises:
        UsageError: this process is of another release.
        CheckpointError: it sees another source, or other statistics, than the process that ordered; or none.
    """
    plan, rounder = planned(
        spot(asked.source), asked.options, asked.stats, asked.activation_scales, follow_links=asked.follow_links
    )
    here = digests(plan)
    wrong = [name for name in {**asked.digests, **here} if asked.digests.get(name) != here.get(name)]
    if "version" in wrong:
        raise UsageError(f"k2quant is {__version__} here, and another release ordered; use one on all machines")
    if wrong:
        raise CheckpointError(
            "this process sees another source, or other statistics, than the one that ordered",
            file=asked.source,
            found=f"other {listed(wrong)}",
            remedy="name a folder that all machines see, or copies that keep their times (`cp -p`, `rsync -t`)",
        )
    return plan, rounder


def _text_or_none(value: object) -> str | None:
    return None if value is None else text(value)


def _anywhere(place: str | os.PathLike[str] | Address) -> str:
    """Return a name that a process with another working folder understands."""
    there = spot(place)
    return str(there) if isinstance(there, Address) else os.path.abspath(there)  # noqa: PTH100  links stay
