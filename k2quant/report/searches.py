"""How scales were searched, by a report: what was asked for, and of each weight what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from k2quant.checkpoint.files import json_kinds as kinds
from k2quant.ground import names

_CANDIDATES = 10**6
_RELATIVE = 1e12  # far above the largest that a conversion says
_PROJECTIONS = (
    *("gate_proj", "up_proj", "down_proj"),
    *("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
)
HELD_OUT = "validation"
"""How what was measured on held-out data begins."""


class Search(NamedTuple):
    """What was asked for."""

    method: str
    candidates: int
    """Scales of a group, of which the best is taken."""
    stats: str | None
    """Fingerprint of the statistics; None where there were none."""


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

    @property
    def held_out(self) -> bool:
        """Whether data judged that decided nothing."""
        return self.measure.startswith(HELD_OUT)


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
    stats = said.get("stats")
    return Search(
        kinds.text(said["asked"]),
        kinds.whole(said["candidates"], least=1, limit=_CANDIDATES),
        None if stats is None else kinds.text(stats),
    )


def read_scales(facts: Mapping[str, Any]) -> Scales | None:
    """Read what came of a search for one weight; None where there was none. Raises as `read_search` does."""
    if facts.get("scales") is None:
        return None
    said = kinds.mapping(facts["scales"])
    tokens, reason = said.get("tokens"), said.get("reason")
    return Scales(
        kinds.text(said["method"]),
        kinds.number(said["relative"], high=_RELATIVE),
        kinds.text(said["measure"]),
        None if tokens is None else kinds.whole(tokens),
        None if reason is None else kinds.text(reason),
    )


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
