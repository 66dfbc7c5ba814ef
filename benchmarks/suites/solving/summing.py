"""What the arms of the proof say together: what GPTQ wins, with intervals over models, and how it stands to QAT."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from k2quant.eval.gating.comparing import decision
from k2quant.eval.statistics import paired
from suites.calib import summing
from suites.calib.summing import drift_of, mean, over_seeds
from suites.common import machine
from suites.qat.summaries import Interval
from suites.solving.proof import ALONE, GPTQ, SHIPPED

METHODS = ("rtn", "imatrix", GPTQ, ALONE)
PAIRS = (("imatrix", ALONE), ("imatrix", GPTQ), ("rtn", GPTQ))
"""Each method, and the one that claims to be better."""
PROPAGATED = (ALONE, GPTQ)
"""What it wins that layers see the quantised ones before them."""
BAR_BITS = 3
BAR_SHARE = 0.5
"""Of the KL that rounding costs, at that width: what GPTQ takes back at least, with 95% confidence."""
MARGIN = 0.02
"""Of the gate: the largest drop in answers that is good enough."""
ALPHA = 0.05
"""Of the gate, its default."""
TOLERANCE = 1.02
"""Of rounding's true error: no matrix ships above it."""

Rows = Sequence[dict[str, Any]]


def taken_back(arms: Rows, bits: int, method: str = GPTQ) -> Interval:
    """Return the share of the KL of `rtn` that a method takes back, over models."""

    def share(arm: dict[str, Any]) -> float:
        first, second = (drift_of(arms, arm["seed"], arm["draw"], each, bits)["kl"] for each in ("rtn", method))
        return 1 - float(second) / float(first)

    return over_seeds(arms, share)


def recovered(arms: Rows, bits: int, method: str) -> Interval:
    """Return the share of the loss that rounding adds which a method takes back, over models; first draws alone."""
    first = min(arm["draw"] for arm in arms)

    def share(arm: dict[str, Any]) -> float:
        plain, rounded, found = (
            drift_of(arms, arm["seed"], first, each, width)["loss"]
            for each, width in (("none", 16), ("rtn", bits), (method, bits))
        )
        return float((rounded - found) / (rounded - plain))

    return over_seeds([arm for arm in arms if arm["draw"] == first], share)


def verdict(base: str, candidate: str) -> str:
    """Return what `k2quant eval gate` decides of these answers, a `1` for each that is right."""
    lost = sum(one > other for one, other in zip(base, candidate, strict=True))
    gained = sum(one < other for one, other in zip(base, candidate, strict=True))
    return _decided(lost, gained, len(base))


@functools.cache
def _decided(lost: int, gained: int, n: int) -> str:
    good, bad = (test(lost, gained, n, MARGIN) for test in (paired.p_good, paired.p_bad))
    return decision(good, bad, ALPHA)


def gates(arms: Rows, widths: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield for each width and method the gate's verdicts on all models and draws, against the model in BF16."""
    for bits in widths:
        for method in METHODS:
            found: Counter[str] = Counter()
            drops = []
            for arm in arms:
                base = drift_of(arms, arm["seed"], arm["draw"], "none", 16)["right"]
                right = drift_of(arms, arm["seed"], arm["draw"], method, bits)["right"]
                found[verdict(base, right)] += 1
                drops.append(mean(map(int, base)) - mean(map(int, right)))
            yield {"bits": bits, "method": method, "drop": mean(drops), "verdicts": dict(sorted(found.items()))}


def shipped(arms: Rows, widths: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield for each width what matrices ship with, and how many lose more than rounding does on the test."""
    for bits in widths:
        rows = [row for arm in arms for row in arm["rows"] if row["bits"] == bits]
        yield {
            "bits": bits,
            "count": len(rows),
            "ships": dict(sorted(Counter(row["ships"] for row in rows).items())),
            "worst": max(row["true"][ALONE] for row in rows),
            "above": sum(row["true"][ALONE] > TOLERANCE for row in rows),
            "judged": mean(row["judged"] for row in rows),
            "true": mean(row["true"][ALONE] for row in rows),
            "saturated": mean(row["saturated"] for row in rows),
        }


def trained() -> dict[int, dict[str, Any]]:
    """Return what QAT's own results say of plain training, by width."""
    content = json.loads((machine.ROOT / "benchmarks" / "results" / "qat.json").read_text())
    return {row["bits"]: row for row in content["rows"] if row["kind"] == "plain"}


def beside_qat(arms: Rows, widths: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield for each width and method the loss that comes back and the answers on QAT's exam; then QAT's own."""
    first, qat = min(arm["draw"] for arm in arms), trained()
    for bits in widths:
        for method in ("rtn", "imatrix", GPTQ):
            rows = [drift_of(arms, arm["seed"], first, method, bits) for arm in arms if arm["draw"] == first]
            plain = [drift_of(arms, arm["seed"], first, "none", 16) for arm in arms if arm["draw"] == first]
            yield {
                "bits": bits,
                "method": method,
                "recovered": None if method == "rtn" else recovered(arms, bits, method)._asdict(),
                "right": mean(row["exam"] for row in rows),
                "without": mean(row["exam"] for row in plain),
                "kl": mean(drift_of(arms, arm["seed"], arm["draw"], method, bits)["kl"] for arm in arms),
            }
        whole, _, own = qat[bits]["accuracy"]
        share = dict(zip(Interval._fields, qat[bits]["share"], strict=True))
        yield {"bits": bits, "method": "QAT", "recovered": share, "right": own, "without": whole, "kl": None}


def written(arms: Rows) -> Iterator[dict[str, Any]]:
    """Yield what the checkpoint that `solve` wrote is, beside the KL of the same model in memory."""
    for arm in arms:
        if "written" in arm:
            own = drift_of(arms, arm["seed"], arm["draw"], GPTQ, SHIPPED)
            yield arm["written"] | {"kl": own["kl"]}


def bars(shares: Rows, back: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return what the proof is held to."""
    made = summing.bars(shares, PAIRS[:1])
    share, low, high = (back[key] for key in ("mean", "low", "high"))
    made.append(
        {
            "what": f"INT{BAR_BITS}: of the KL that `rtn` costs, what `{GPTQ}` takes back, lower 95% bound",
            "bar": f"at least {BAR_SHARE:.0%}",
            "measured": f"{share:.1%} ({low:.1%} to {high:.1%})",
            "met": low >= BAR_SHARE,
        }
    )
    return made


def summary(arms: Rows, widths: Sequence[int]) -> dict[str, Any]:
    """Return all that the page says of the arms."""
    shares = list(summing.shares(arms, widths, PAIRS))
    back: list[dict[str, Any]] = [
        {"bits": bits, "method": method, "share": taken_back(arms, bits, method)._asdict()}
        for bits in widths
        for method in METHODS[1:]
    ]
    held_to = next(row["share"] for row in back if (row["bits"], row["method"]) == (BAR_BITS, GPTQ))
    return {
        "shares": shares,
        "bars": bars(shares, held_to),
        "back": back,
        "kinds": list(summing.kinds(arms, widths, METHODS, (("imatrix", ALONE), ("imatrix", GPTQ)))),
        "levels": list(summing.levels(arms, widths, METHODS)),
        "differences": list(summing.differences(arms, widths, (*PAIRS[1:], PROPAGATED))),
        "gates": list(gates(arms, widths)),
        "shipped": list(shipped(arms, widths)),
        "qat": list(beside_qat(arms, widths)),
        "written": next(iter(written(arms)), None),
    }
