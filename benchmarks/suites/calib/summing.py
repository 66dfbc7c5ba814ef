"""What the arms of the proof say together: shares of linears, and differences with intervals over models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from k2quant.eval.statistics.paired import interval as paired_interval
from suites.calib.rounding import METHODS
from suites.qat.summaries import Interval, interval

PAIRS = (("rtn", "mse"), ("mse", "imatrix"), ("rtn", "imatrix"))
"""Each method, and the one that claims to be better."""
BAR = 0.95
"""Of the linears."""
ALPHA = 0.025
"""On each side of an interval."""

Rows = Sequence[dict[str, Any]]
Pairs = Sequence[tuple[str, str]]

_WITHOUT_DATA = frozenset({"none", "rtn", "mse"})


class Answers(NamedTuple):
    """How the answers of two methods differ at one width."""

    gain: Interval
    """Of the better one's share of right answers, mean over draws, with its interval over models."""
    lost: int
    """Answers that only the first has right, all models, one draw."""
    gained: int
    """Answers that only the second has right."""
    low: float
    """The lower end of the gain by Tango's paired interval: these models, any items."""
    high: float
    """Its upper end."""

    @property
    def claimed(self) -> bool:
        """Whether neither interval holds zero."""
        return self.gain.low * self.gain.high > 0 and self.low * self.high > 0


def mean(values: Iterable[float]) -> float:
    """Return the mean."""
    found = list(values)
    return math.fsum(found) / len(found)


def over_seeds(arms: Rows, of: Callable[[dict[str, Any]], float]) -> Interval:
    """Return the interval of a figure of each arm: draws of a model are averaged, models are what varies."""
    seeds = sorted({arm["seed"] for arm in arms})
    return interval([mean(of(arm) for arm in arms if arm["seed"] == seed) for seed in seeds])


def shares(arms: Rows, widths: Sequence[int], pairs: Pairs = PAIRS) -> Iterator[dict[str, Any]]:
    """Yield for each width and pair on which share of the linears the second has the smaller error."""
    for bits in widths:
        for worse, better in pairs:

            def won(arm: dict[str, Any], bits: int = bits, pair: tuple[str, str] = (worse, better)) -> float:
                rows = [row["true"] for row in arm["rows"] if row["bits"] == bits]
                return mean(row[pair[1]] < row[pair[0]] for row in rows)

            found = over_seeds(arms, won)
            count = sum(row["bits"] == bits for arm in arms for row in arm["rows"])
            yield {"bits": bits, "worse": worse, "better": better, "share": found._asdict(), "count": count}


def kinds(
    arms: Rows, widths: Sequence[int], methods: Sequence[str] = METHODS, pairs: Pairs = PAIRS[:2]
) -> Iterator[dict[str, Any]]:
    """Yield for each width and kind of linear the mean errors over those of `rtn`, and how often each method wins."""
    names = list(dict.fromkeys(row["kind"] for arm in arms for row in arm["rows"]))
    for bits in widths:
        for name in [*names, "all"]:
            rows = [
                row["true"]
                for arm in arms
                for row in arm["rows"]
                if row["bits"] == bits and name in {row["kind"], "all"}
            ]
            yield {
                "bits": bits,
                "kind": name,
                "count": len(rows),
                "error": {method: mean(row[method] for row in rows) for method in methods},
                "won": {better: mean(row[better] < row[worse] for row in rows) for worse, better in pairs},
            }


def judgement(arms: Rows, widths: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield for each width and pair how often the held-out diagonal names another winner than the true error does."""
    for bits in widths:
        rows = [row for arm in arms for row in arm["rows"] if row["bits"] == bits]
        for worse, better in PAIRS:
            verdicts = [
                (row["judged"][better] < row["judged"][worse], row["true"][better] < row["true"][worse]) for row in rows
            ]
            yield {
                "bits": bits,
                "worse": worse,
                "better": better,
                "count": len(rows),
                "wrong": sum(judged != true for judged, true in verdicts),
                "shipped_worse": sum(judged and not true for judged, true in verdicts),
            }


def drift_of(arms: Rows, seed: int, draw: int, method: str, bits: int) -> dict[str, Any]:
    """Return a row of drift; what needs no data is with a model's first draw."""
    wanted = min(arm["draw"] for arm in arms) if method in _WITHOUT_DATA else draw
    arm = next(arm for arm in arms if (arm["seed"], arm["draw"]) == (seed, wanted))
    found: dict[str, Any] = next(row for row in arm["drift"] if (row["method"], row["bits"]) == (method, bits))
    return found


def levels(arms: Rows, widths: Sequence[int], methods: Sequence[str] = METHODS) -> Iterator[dict[str, Any]]:
    """Yield for each width and method the KL and the share of right answers, means over models."""
    for bits, method in [(16, "none"), *((bits, method) for bits in widths for method in methods)]:
        rows = [drift_of(arms, arm["seed"], arm["draw"], method, bits) for arm in arms]
        right = mean(mean(map(int, row["right"])) for row in rows)
        yield {"bits": bits, "method": method, "kl": mean(row.get("kl", 0.0) for row in rows), "right": right}


def closer(arms: Rows, bits: int, worse: str, better: str) -> Interval:
    """Return the better one's KL over the worse one's, geometric mean over draws and models."""

    def ratio(arm: dict[str, Any]) -> float:
        first, second = (drift_of(arms, arm["seed"], arm["draw"], method, bits)["kl"] for method in (worse, better))
        return math.log(second / first)

    return Interval(*map(math.exp, over_seeds(arms, ratio)))


def answers(arms: Rows, bits: int, worse: str, better: str) -> Answers:
    """Return how the answers differ."""
    lost = gained = n = 0
    gains: dict[tuple[int, int], float] = {}
    for arm in arms:
        first, second = (drift_of(arms, arm["seed"], arm["draw"], method, bits)["right"] for method in (worse, better))
        only = [sum(a == one and b != one for a, b in zip(first, second, strict=True)) for one in "10"]
        if arm["draw"] == min(each["draw"] for each in arms):  # other draws ask the same of the same models
            lost, gained, n = lost + only[0], gained + only[1], n + len(first)
        gains[arm["seed"], arm["draw"]] = (only[1] - only[0]) / len(first)
    low, high = paired_interval(lost, gained, n, ALPHA)
    return Answers(over_seeds(arms, lambda arm: gains[arm["seed"], arm["draw"]]), lost, gained, -high, -low)


def differences(arms: Rows, widths: Sequence[int], pairs: Pairs = PAIRS) -> Iterator[dict[str, Any]]:
    """Yield for each width and pair what the better method wins in KL and in answers."""
    for bits in widths:
        for worse, better in pairs:
            kl, found = closer(arms, bits, worse, better), answers(arms, bits, worse, better)
            yield {
                "bits": bits,
                "worse": worse,
                "better": better,
                "kl": kl._asdict(),
                "kl_claimed": not kl.low <= 1 <= kl.high,
                "answers": found._asdict() | {"gain": found.gain._asdict(), "claimed": found.claimed},
            }


def bars(found: Iterable[dict[str, Any]], pairs: Pairs = PAIRS[:2]) -> list[dict[str, Any]]:
    """Return what the shares are held to."""
    made = []
    for row in found:
        share, low, high = (row["share"][key] for key in ("mean", "low", "high"))
        if (row["worse"], row["better"]) in pairs:
            made.append(
                {
                    "what": f"INT{row['bits']}: `{row['better']}` below `{row['worse']}`, {row['count']:,} linears",
                    "bar": f"at least {BAR:.0%}",
                    "measured": f"{share:.1%} ({low:.1%} to {min(1.0, high):.1%})",
                    "met": share >= BAR,
                }
            )
    return made


def fidelity(arms: Rows) -> Iterator[dict[str, Any]]:
    """Yield the KL that `eval fidelity` measured between checkpoints, beside that of the same models in memory."""
    for arm in arms:
        for row in arm["drift"]:
            if "fidelity" in row:
                kept = {key: row[key] for key in ("method", "bits", "kl", "fidelity")}
                yield {"seed": arm["seed"], **kept}
