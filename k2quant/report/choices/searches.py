"""How scales were searched, by a report: what was asked for, and of each weight what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from k2quant.checkpoint.files import json_kinds as kinds
from k2quant.conversion.searching.fitting import SOLVED
from k2quant.ground import names

_CANDIDATES = 10**6
_RELATIVE = 1e12  # far above the largest that a conversion says
_LAYERS, _COLUMNS, _POWER, _PARTS = 10**6, 2**31, 127, 10
_PROJECTIONS = (
    *("gate_proj", "up_proj", "down_proj"),
    *("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
)
HELD_OUT = "validation"
"""How what was measured on held-out data begins."""


class Solving(NamedTuple):
    """How codes were chosen column by column, each making up for what those before it lost."""

    scales: str
    """By which method scales were chosen before."""
    damping: float
    """Added to the diagonal of a Hessian, in units of its mean."""
    propagate: bool
    """Whether a layer saw what quantised layers give."""
    data: dict[str, tuple[int, int]]
    """Documents and tokens of each part of the data."""
    layers: tuple[tuple[int, float, int], ...]
    """Of each layer that was measured: number, error of its MLP's output over that output, held-out tokens."""


class Search(NamedTuple):
    """What was asked for."""

    method: str
    candidates: int | None
    """Scales of a group, of which the best is taken; None where codes were solved."""
    stats: str | None
    """Fingerprint of the statistics; None where there were none."""
    solving: Solving | None = None
    """How codes were solved; None where only scales were searched."""
    default: bool = False
    """Whether nobody asked for it, and the source's format did."""


class Scales(NamedTuple):
    """What came of it for one weight."""

    method: str
    """What it ships with."""
    relative: float
    """Error of the searched scales over that of rounding."""
    measure: str
    """What it was measured on: `weights`, or held-out data and in which way."""
    tokens: int | None
    """Held-out tokens; None where it was measured on the weights."""
    reason: str | None
    """Why it does not ship with what was asked for."""
    seen: int | None = None
    """Tokens by which it was solved; None where it was not asked for."""
    saturated: float | None = None
    """Share of its weights whose code would have left the range; likewise."""
    short: float | None = None
    """Share of its groups whose largest code is none of the grid's largest; likewise."""

    @property
    def held_out(self) -> bool:
        """Whether data judged that decided nothing."""
        return self.measure.startswith(HELD_OUT)


class Fold(NamedTuple):
    """What was moved from the rows of an `up_proj` to the columns of its `down_proj`."""

    columns: int
    """That were moved; 0 where none was."""
    least: int
    """Power of two, of all columns."""
    most: int
    relative: float
    """Error of down's output with the fold that was tried over the one without, on held-out data."""
    reason: str | None
    """Why there is none."""


def read_search(report: Mapping[str, Any]) -> Search | None:
    """Read how scales were searched, trusting nothing in it; None where they were not.

    Raises:
        KeyError: a part is missing.
        ValueError: a part is out of bounds.
        TypeError: a part is of the wrong kind.
    """
    if report.get("method") is None:
        return None
    said = kinds.mapping(report["method"])
    stats, asked = said.get("stats"), kinds.text(said["asked"])
    solving = _solving(said, report.get("layers", [])) if asked == SOLVED else None
    return Search(
        asked,
        None if solving else kinds.whole(said["candidates"], least=1, limit=_CANDIDATES),
        None if stats is None else kinds.text(stats),
        solving,
        kinds.truth(said.get("default", False)),
    )


def _solving(said: Mapping[str, Any], layers: object) -> Solving:
    data = {kinds.text(name): kinds.mapping(part) for name, part in kinds.mapping(said["data"]).items()}
    if len(data) > _PARTS:
        raise ValueError(f"{len(data)} parts of the data")
    return Solving(
        kinds.text(said["scales"]),
        kinds.number(said["damping"]),
        kinds.truth(said["propagate"]),
        {name: (kinds.whole(part["documents"]), kinds.whole(part["tokens"])) for name, part in data.items()},
        tuple(_layers(kinds.values(layers))),
    )


def _layers(said: list[Any]) -> Iterator[tuple[int, float, int]]:
    """Yield the layers whose output was measured, in order, each once."""
    last = -1
    for facts in map(kinds.mapping, said):
        last = kinds.whole(facts["layer"], least=last + 1, limit=_LAYERS)
        tokens = kinds.whole(facts["tokens"])
        if facts.get("relative") is not None:
            yield last, kinds.number(facts["relative"], high=_RELATIVE), tokens


def read_scales(facts: Mapping[str, Any]) -> Scales | None:
    """Read what came of a search for one weight; None where there was none. Raises as `read_search` does."""
    if facts.get("scales") is None:
        return None
    said = kinds.mapping(facts["scales"])
    return Scales(
        kinds.text(said["method"]),
        kinds.number(said["relative"], high=_RELATIVE),
        kinds.text(said["measure"]),
        _optional(said.get("tokens"), kinds.whole),
        _optional(said.get("reason"), kinds.text),
        _optional(said.get("seen"), kinds.whole),
        _optional(said.get("saturated"), _share),
        _optional(said.get("short"), _share),
    )


def read_fold(facts: Mapping[str, Any]) -> Fold | None:
    """Read what was folded of one weight; None where nothing was tried. Raises as `read_search` does."""
    if facts.get("fold") is None:
        return None
    said = kinds.mapping(facts["fold"])
    return Fold(
        kinds.whole(said["columns"], limit=_COLUMNS),
        _power(said["least"]),
        _power(said["most"]),
        kinds.number(said["relative"], high=_RELATIVE),
        _optional(said.get("reason"), kinds.text),
    )


def _share(value: object) -> float:
    return kinds.number(value, high=1.0)


def _power(value: object) -> int:
    return kinds.whole(value, least=-_POWER, limit=_POWER + 1)


_Said = TypeVar("_Said")


def _optional(value: object, read: Callable[[object], _Said]) -> _Said | None:
    return None if value is None else read(value)


def projection(name: str, kind: str) -> str:
    """Return which projection a weight is: `expert gate_proj`, `attention o_proj`; its class for what is none.

    Args:
        name: of its tensor.
        kind: one of `TENSOR_CLASSES`.
    """
    last = names.split(names.split(name)[0])[1]
    if last not in _PROJECTIONS:
        return kind
    return f"{kind} {last}".replace("routed experts", "expert")
