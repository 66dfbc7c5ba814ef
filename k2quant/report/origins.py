"""Whose values an output has: the source's own, those of a training, or the source's with an adapter merged in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from k2quant.checkpoint.files import json_kinds as kinds
from k2quant.formats.known import FORMATS
from k2quant.kernels.codecs.grids import PACKED_BITS

_FILES = 10  # of an adapter: it has two


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """An adapter was added to the source."""

    name: str
    """Of its folder."""
    rank: int
    alpha: float
    weights: int
    """How many it updates or replaces."""
    digests: dict[str, str]
    """A sha256 of each of its files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """The values come from a model that was prepared for training."""

    bits: int | None
    """Width of the codes, where the format has a choice."""
    run: str | None
    """Name of the training's folder."""
    step: int | None
    """After which its weights were exported."""
    job: str | None
    """Name of a job's file: its model was rounded as it was."""
    measured: bool
    """Whether the report says which tensors these are and how far they are from the source's."""

    @property
    def moved(self) -> bool:
        """Whether training may have moved the values, so that their distance from the source's is no error."""
        return self.job is None


@dataclass(frozen=True, slots=True)
class Unknown:
    """Other values than the source's, of which this release knows nothing."""


Origin = Merged | Exported | Unknown | None
"""None: the values are the source's own."""


def read_origin(report: Mapping[str, Any]) -> Origin:
    """Read whose values a report is about, trusting nothing in it.

    Raises:
        KeyError: a part is missing.
        ValueError: a part is out of bounds.
        TypeError: a part is of the wrong kind.
    """
    if report.get("values") is None:
        return None
    values = kinds.mapping(report["values"])
    if "adapter" in values:
        return _merged(kinds.mapping(values["adapter"]))
    if "trained" in values:
        return _exported(report, values)
    return Unknown()


def _merged(adapter: dict[str, Any]) -> Merged:
    digests = kinds.mapping(adapter["sha256"])
    return Merged(
        name=kinds.text(adapter["name"]),
        rank=kinds.whole(adapter["r"], limit=2**31),
        alpha=kinds.number(adapter["lora_alpha"]),
        weights=sum(kinds.whole(adapter[key], limit=2**31) for key in ("updated", "replaced")),
        digests={name: kinds.text(digests[name]) for name in list(digests)[:_FILES]},
    )


def _exported(report: Mapping[str, Any], values: dict[str, Any]) -> Exported:
    widths = FORMATS[report["options"]["to"]].bit_widths
    bits = kinds.whole(values["bits"], limit=64)
    if widths and bits not in widths:
        raise ValueError(f"codes of {bits} bits")
    origin = kinds.mapping(report.get("origin", {}))
    run, job = (None if origin.get(key) is None else kinds.text(origin[key]) for key in ("run", "job"))
    return Exported(
        bits=bits if widths else None,
        run=run,
        step=None if run is None else kinds.whole(origin["step"]),
        job=job,
        measured=any("substituted" in facts for facts in report["tensors"].values()),
    )


def label(to: str, origin: Origin) -> str:
    """Return a format as people write it, with the width of its codes where they leave room: `2-bit INT4`."""
    if not isinstance(origin, Exported) or origin.bits in {None, max(PACKED_BITS)}:
        return to.upper()
    return f"{origin.bits}-bit {to.upper()}"
