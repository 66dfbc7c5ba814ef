"""How bits were shared out over what engines hold in one module, by a report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from k2quant.checkpoint.files import json_kinds as kinds
from k2quant.formats.known import FORMATS

_UNITS = 10**6
_BITS = 64.0
_LARGEST = 1e30


class Unit(NamedTuple):
    """What gets one format as a whole."""

    name: str
    kind: str
    """Class of its tensors."""
    layer: int | None
    weights: int
    format: str
    """In which it ships."""
    nbytes: int
    """Of it in that."""
    error: float | None
    """That it has in it; None where it was not measured."""
    gain: float | None
    """Error that its first step up removes, for a million bytes; None where it was not measured."""
    reason: str


class Budget(NamedTuple):
    """How bits were shared out."""

    asked: str
    """What was asked for: `bits` or `kl`."""
    limit: float
    """How many of them."""
    bits: float
    """That a weight got, over all in scope, scales counted."""
    measure: str
    """What errors are: `outputs`, shares of the energy there, or `kl`, nats a token."""
    before: float
    """Sum of errors, all in the smallest format."""
    after: float
    """The same as chosen."""
    units: tuple[Unit, ...]
    """Ranked: most error removed a byte first."""


def read_budget(report: Mapping[str, Any]) -> Budget | None:
    """Read how bits were shared out, trusting nothing in it; None where they were not.

    Raises:
        KeyError: a part is missing.
        ValueError: a part is out of bounds.
        TypeError: a part is of the wrong kind.
    """
    if report.get("budget") is None:
        return None
    said = kinds.mapping(report["budget"])
    error, units = kinds.mapping(said["error"]), kinds.values(said["units"])
    ((asked, limit),) = kinds.mapping(said["asked"]).items()
    if len(units) > _UNITS:
        raise ValueError(f"{len(units)} units")
    (before,) = (value for name, value in error.items() if name != "chosen")
    return Budget(
        kinds.text(asked),
        kinds.number(limit, high=_LARGEST),
        kinds.number(said["bits"], high=_BITS),
        kinds.text(said["measure"]),
        kinds.number(before, high=_LARGEST),
        kinds.number(error["chosen"], high=_LARGEST),
        tuple(map(_unit, map(kinds.mapping, units))),
    )


def _unit(said: Mapping[str, Any]) -> Unit:
    written, layer = FORMATS[kinds.text(said["format"])].name, said.get("layer")
    errors = kinds.mapping(said.get("errors", {}))
    error, gain = errors.get(written), said.get("gain")
    return Unit(
        kinds.text(said["unit"]),
        kinds.text(said["class"]),
        None if layer is None else kinds.whole(layer, limit=10**6),
        kinds.whole(said["weights"]),
        written,
        kinds.whole(kinds.mapping(said["bytes"])[written]),
        None if error is None else kinds.number(error, high=_LARGEST),
        None if gain is None else kinds.number(gain, high=_LARGEST),
        kinds.text(said["reason"]),
    )
