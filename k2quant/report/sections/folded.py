"""What folding did: how many MLPs have powers of two moved from `up_proj` to `down_proj`, and what it bought."""

from __future__ import annotations

from collections import Counter
from statistics import median
from typing import Any

from k2quant.report.choices.searches import Fold
from k2quant.report.content import Report
from k2quant.report.words import DASH, code, table, text

_CONSUMER = ".down_proj."
_REASONS, _SHOWN = 20, 10


def section(report: Report) -> str:
    """Return what was folded and why not; nothing where no fold was tried."""
    tried = _tried(report)
    if not tried:
        return ""
    folds = {name: fold for name, fold in tried.items() if fold.columns}
    reasons = Counter(fold.reason for fold in tried.values() if not fold.columns)
    rows = [["folded", f"{len(folds):,}", DASH]]
    rows += [
        ["not folded", f"{number:,}", text(reason) if reason else DASH]
        for reason, number in reasons.most_common(_REASONS)
    ]
    note = (
        "Row j of <code>up_proj</code> divided by a power of two and column j of <code>down_proj</code> multiplied by "
        "it give the same output, bit for bit before they are rounded; of a group of columns that share a scale, those "
        f"that are doubled lose less.{_gain(folds)}"
    )
    heads = ["MLPs", "how many", "why"]
    return (
        f"<section class=card><h2>Folds</h2><p class=note>{note}</p>"
        f"{table(heads, rows, css='compact', label='folds')}{_most(folds)}</section>"
    )


def as_json(report: Report) -> dict[str, Any] | None:
    """Return it as JSON holds it; None where no fold was tried."""
    tried = _tried(report)
    if not tried:
        return None
    folds = [fold.relative for fold in tried.values() if fold.columns]
    reasons = Counter(fold.reason for fold in tried.values() if not fold.columns)
    return {
        "tried": len(tried),
        "folded": len(folds),
        "relative": median(folds) if folds else None,
        "not": [{"reason": reason, "mlps": number} for reason, number in reasons.most_common()],
    }


def _tried(report: Report) -> dict[str, Fold]:
    """Return what was tried of each MLP, by its down, which speaks for both."""
    return {
        tensor.name: tensor.fold for tensor in report.tensors if tensor.fold is not None and _CONSUMER in tensor.name
    }


def _gain(folds: dict[str, Fold]) -> str:
    if not folds:
        return ""
    middle = median(fold.relative for fold in folds.values())
    return f" Where it was done, down&rsquo;s held-out error is {middle:.3f} of what it is without (median)."


def _most(folds: dict[str, Fold]) -> str:
    """List the folds that bought most."""
    if not folds:
        return ""
    best = sorted(folds.items(), key=lambda pair: (pair[1].relative, pair[0]))[:_SHOWN]
    rows = [
        [code(name), f"{fold.relative:.3f}", f"{fold.columns:,}", f"{fold.least} to {fold.most}"] for name, fold in best
    ]
    heads = ["tensor", "error over that without", "columns", "powers of two"]
    listed = table(heads, rows, label="folds that bought most")
    return f"<details><summary>The {len(best):,} that bought most</summary>{listed}</details>"
