"""What a finished training run says of itself beyond its history: coverage, routers, starved experts, oscillation."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from k2quant.checkpoint.files import json_kinds as kinds
from k2quant.checkpoint.files.paths import read_limited, write_whole
from k2quant.checkpoint.files.strict_json import parse_object
from k2quant.errors import MalformedFile

SUMMARY = "summary.json"
"""Name of the summary in the folder of a run."""

_LIMIT = 2**27  # bytes; K2's 60 routers of 384 experts take 0.6 MB
_size = partial(kinds.whole, limit=2**53)


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How much of a tensor class is fake-quantised."""

    kind: str
    """The class, as `names.TENSOR_CLASSES` has it."""
    quantised: int
    """Parameters that are fake-quantised."""
    parameters: int
    """All of the class."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSummary:
    """What a router did."""

    name: str
    """The module's, such as `model.layers.3.mlp.gate`."""
    layer: int | None
    """The decoder layer; None for one outside the layers."""
    experts: int
    load: tuple[int, ...]
    """Tokens that it sent to each expert during training, `[experts]`."""
    start_load: tuple[int, ...] | None = None
    """Held-out tokens, those of `agreement`, that the start model's router sends to each expert, `[experts]`."""
    agreement: float | None = None
    """Share of the (token, slot) choices that the start model makes too, for the same held-out tokens, 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Oscillations:
    """How the codes of a sample of a tensor class moved."""

    kind: str
    """The class."""
    weights: int
    """In the sample."""
    flipped: int
    """Whose code ever changed."""
    oscillating: int
    """Whose code changed back, as `oscillation.WINDOW` has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a finished run says beyond its history."""

    job: dict[str, str]
    """Facts of the job, by name, as they are to be read."""
    control: bool = False
    """Whether nothing was fake-quantised in training: rounded afterwards, it says what training alone is worth."""
    coverage: tuple[Coverage, ...] = ()
    routers: tuple[RouterSummary, ...] = ()
    least_tokens: int = 0
    """An expert that learnt from fewer keeps post-training rounding."""
    starved: tuple[tuple[str, int], ...] = ()
    """Name of each such expert, and its tokens."""
    oscillation: tuple[Oscillations, ...] = ()

    def to_json(self) -> str:
        """Return the summary as a JSON object."""
        text = json.dumps(asdict(self), ensure_ascii=False, allow_nan=False)
        return text.encode(errors="replace").decode()  # a path may hold bytes that are no UTF-8

    @classmethod
    def from_json(cls, data: bytes, *, file: object) -> Summary:
        """Return what `to_json` wrote, trusting nothing in it.

        Args:
            data: the JSON object.
            file: where it comes from, for messages.

        Raises:
            MalformedFile: a part is missing or of the wrong kind.
        """
        values = parse_object(data, file=file)
        try:
            return _summary(values)
        except KeyError as error:
            raise MalformedFile("lacks a part of a summary", file=file, expected=error) from error
        except (ValueError, TypeError) as error:
            raise MalformedFile("not what a summary holds", file=file, found=str(error)[:200]) from error


def write_summary(folder: Path, summary: Summary) -> None:
    """Write `summary.json` so that it is whole or not there."""
    write_whole(folder / SUMMARY, summary.to_json().encode())


def read_summary(folder: Path) -> Summary:
    """Read `summary.json`.

    Raises:
        MalformedFile: it cannot be read, or is damaged.
    """
    path = folder / SUMMARY
    try:
        data = read_limited(path, _LIMIT)
    except OSError as error:
        raise MalformedFile("cannot be read", file=path, found=error.strerror or str(error)) from error
    return Summary.from_json(data, file=path)


def _summary(values: dict[str, Any]) -> Summary:
    job = kinds.mapping(values["job"])
    return Summary(
        job={name: kinds.text(fact) for name, fact in job.items()},
        control=kinds.truth(values["control"]),
        coverage=tuple(map(_coverage, kinds.values(values["coverage"]))),
        routers=tuple(map(_router, kinds.values(values["routers"]))),
        least_tokens=_size(values["least_tokens"]),
        starved=tuple(map(_starved, kinds.values(values["starved"]))),
        oscillation=tuple(map(_oscillations, kinds.values(values["oscillation"]))),
    )


def _coverage(value: object) -> Coverage:
    facts = kinds.mapping(value)
    kind, parameters = kinds.text(facts["kind"]), _size(facts["parameters"])
    return Coverage(kind=kind, parameters=parameters, quantised=_part(facts["quantised"], parameters))


def _router(value: object) -> RouterSummary:
    facts = kinds.mapping(value)
    experts = kinds.whole(facts["experts"], least=1, limit=2**20)
    layer, agreement = facts["layer"], facts["agreement"]
    return RouterSummary(
        name=kinds.text(facts["name"]),
        layer=None if layer is None else kinds.whole(layer, limit=10**6),
        experts=experts,
        load=_load(facts["load"], experts),
        start_load=None if facts["start_load"] is None else _load(facts["start_load"], experts),
        agreement=None if agreement is None else kinds.number(agreement, high=1),
    )


def _load(value: object, experts: int) -> tuple[int, ...]:
    counts = tuple(map(_size, kinds.values(value)))
    if len(counts) != experts:
        raise ValueError(f"the load of {len(counts)} experts where there are {experts}")
    return counts


def _starved(value: object) -> tuple[str, int]:
    name, tokens = kinds.values(value)
    return kinds.text(name), _size(tokens)


def _oscillations(value: object) -> Oscillations:
    facts = kinds.mapping(value)
    kind, weights = kinds.text(facts["kind"]), _size(facts["weights"])
    flipped = _part(facts["flipped"], weights)
    return Oscillations(kind=kind, weights=weights, flipped=flipped, oscillating=_part(facts["oscillating"], flipped))


def _part(value: object, whole: int) -> int:
    """Return how many of so many."""
    return kinds.whole(value, limit=whole + 1)
