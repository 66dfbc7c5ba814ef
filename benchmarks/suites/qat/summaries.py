"""What the arms of the experiment say together: recovery by seed, intervals over seeds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Two-sided 95% points of Student's t by the number of seeds (degrees of freedom: one less)."""

KINDS = ["plain", "learned", "distilled"]
BITS = (2, 3, 4)

Results = dict[tuple[int, str, int], dict[str, Any]]
"""By seed, kind and bits."""


class Interval(NamedTuple):
    """A mean over seeds with its 95% interval."""

    mean: float
    low: float
    high: float


class Row(NamedTuple):
    """One kind of training at one width against its control, over seeds."""

    kind: str
    bits: int
    gap: Interval
    """What rounding costs the control, nats a token."""
    gained: Interval
    """How far the trained arm's loss lies below the rounded control's, nats a token."""
    share: Interval | None
    """The second over the first; None where the gap of a seed is below three standard errors."""
    shares: tuple[float, ...]
    accuracy: tuple[float, float, float]
    """Answers wholly right: control in BF16, control rounded, trained; shares over all seeds."""


def summary(results: Results) -> dict[str, Any]:
    """Return what the page says of all arms, as the JSON file keeps it: the losses of single items are not kept."""
    rest = {arm: found for arm, found in results.items() if arm[0] != 0}
    return {
        "rows": [one._asdict() for one in rows(results, KINDS, BITS)],
        "without_seed_0": [one._asdict() for one in rows(rest, ["plain"], BITS)],
        "variants": [
            {"bits": bits, "kind": kind, "below_plain": found}
            for bits in BITS
            for kind in KINDS[1:]
            if (found := against(results, kind, "plain", bits)) is not None
        ],
    }


def read(folder: Path) -> Results:
    """Return all results that a folder holds."""
    found = (json.loads(path.read_text()) for path in sorted(folder.glob("*.json")))
    return {(one["seed"], one["kind"], one["bits"]): one for one in found if "kind" in one}


def rows(results: Results, kinds: list[str], widths: tuple[int, ...]) -> list[Row]:
    """Return a row for each kind and width that has results of at least two seeds."""
    made = (row(results, kind, bits) for bits in widths for kind in kinds)
    return [one for one in made if one is not None]


def row(results: Results, kind: str, bits: int) -> Row | None:
    """Return one row, or None where there are too few seeds."""
    seeds = sorted(seed for seed, k, b in results if (k, b) == (kind, bits) and (seed, "control", bits) in results)
    if len(seeds) < 2:
        return None
    controls, arms = ([results[seed, k, bits] for seed in seeds] for k in ("control", kind))
    gaps = [difference(one["rounded"], one["unrounded"]) for one in controls]
    gains = [difference(c["rounded"], a["rounded"]) for c, a in zip(controls, arms, strict=True)]
    told = all(mean > 3 * error for mean, error in gaps)
    shares = tuple(gain / gap for (gap, _), (gain, _) in zip(gaps, gains, strict=True))
    return Row(
        kind,
        bits,
        interval([gap for gap, _ in gaps]),
        interval([gain for gain, _ in gains]),
        interval(list(shares)) if told else None,
        shares if told else (),
        (right(controls, "unrounded"), right(controls, "rounded"), right(arms, "rounded")),
    )


def difference(first: dict[str, Any], second: dict[str, Any]) -> tuple[float, float]:
    """Return mean and standard error of the differences of two arms' losses, item by item."""
    return mean([a - b for a, b in zip(first["losses"], second["losses"], strict=True)])


def mean(values: list[float]) -> tuple[float, float]:
    """Return mean and standard error."""
    middle = math.fsum(values) / len(values)
    square = math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1)
    return middle, math.sqrt(square / len(values))


def interval(values: list[float]) -> Interval:
    """Return the mean over seeds with its two-sided 95% t-interval."""
    middle, error = mean(values)
    half = T_95[len(values)] * error
    return Interval(middle, middle - half, middle + half)


def right(arms: list[dict[str, Any]], which: str) -> float:
    """Return the share of answers that are wholly right, over all seeds."""
    found: float = sum(arm[which]["right"] for arm in arms) / sum(arm[which]["count"] for arm in arms)
    return found


def against(results: Results, kind: str, other: str, bits: int) -> Interval | None:
    """Return how far one kind's loss lies below another's, over seeds; None where there are too few."""
    seeds = sorted(seed for seed, k, b in results if (k, b) == (kind, bits) and (seed, other, bits) in results)
    if len(seeds) < 2:
        return None
    return interval(
        [difference(results[seed, other, bits]["rounded"], results[seed, kind, bits]["rounded"])[0] for seed in seeds]
    )
