"""What a report says of scales of layers' inputs, of the KV cache, and of codes that were rounded on their way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from k2quant.checkpoint.files import json_kinds as kinds

_WEIGHTS = 2**40


class Inputs(NamedTuple):
    """Where scales of inputs come from."""

    origin: str
    """`one`, `stats`, `source`, or `none`."""
    weights: int
    """That have one."""
    stats: str | None = None
    """Fingerprint of the statistics."""
    layer_maximum: int = 0
    """Weights whose own inputs were none, and that have their layer's largest."""
    not_measured: int = 0
    """Weights that have 1.0 for nothing is known of them."""

    def __str__(self) -> str:
        """Say it."""
        match self.origin:
            case "one":
                return f"1.0 beside all {self.weights:,} weights"
            case "stats":
                more = f", {self.layer_maximum:,} by the largest of their layer" if self.layer_maximum else ""
                more += f", {self.not_measured:,} not measured and 1.0" if self.not_measured else ""
                return f"by the largest inputs of a calibration, beside {self.weights:,} weights{more}"
            case "source":
                return f"the source's own, beside {self.weights:,} weights"
        return "none: weights only, and engines leave inputs as they are"


class Beside(NamedTuple):
    """What stands beside the weights."""

    inputs: Inputs | None
    """None where no format of the output can have scales of inputs."""
    kv_cache: str | None
    """The format in which engines are asked to keep keys and values."""
    rounded: tuple[int, int, int] | None
    """Matrices and weights whose codes were rounded, and matrices whose codes were to be carried over; None where
    nobody allowed rounding."""


def read_beside(report: Mapping[str, Any]) -> Beside:
    """Read it, trusting nothing in it.

    Raises:
        KeyError: a part is missing.
        ValueError: a part is out of bounds.
        TypeError: a part is of the wrong kind.
    """
    cache = kinds.mapping(report["options"]).get("kv_cache")
    rounded = report.get("rounded")
    counts = None if rounded is None else kinds.mapping(rounded)
    return Beside(
        _inputs(report.get("activation_scales")),
        None if cache is None else kinds.text(cache),
        None if counts is None else (_count(counts, "matrices"), _count(counts, "weights"), _count(counts, "of")),
    )


def _inputs(said: object) -> Inputs | None:
    if said is None:
        return None
    found = kinds.mapping(said)
    stats = found.get("stats")
    return Inputs(
        kinds.text(found["from"]),
        _count(found, "weights"),
        None if stats is None else kinds.text(stats),
        _count(found, "layer_maximum") if "layer_maximum" in found else 0,
        _count(found, "not_measured") if "not_measured" in found else 0,
    )


def _count(found: Mapping[str, Any], name: str) -> int:
    return kinds.whole(found[name], limit=_WEIGHTS)
