"""Calibration: what data says of a model, so that its weights are rounded where it matters least.

k2quant.calib.calibrate("Kimi-K2-Instruct", "stats", data="chats.jsonl")
k2quant.convert("Kimi-K2-Instruct", "Kimi-K2-INT4", to="int4", method="imatrix", stats="stats")
k2quant.calib.solve("Kimi-K2-Instruct", "Kimi-K2-GPTQ", data="chats.jsonl")

Naming this package loads neither torch nor numpy; each name loads what it needs.
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k2quant.ground.extras import need

if TYPE_CHECKING:
    from k2quant.calib.budget.allotting import allot
    from k2quant.calib.budget.result import Allotment
    from k2quant.calib.calibrating import Calibration, calibrate
    from k2quant.calib.coverage import Coverage, coverage_of
    from k2quant.calib.planning import CalibrationPlan, plan_calibration
    from k2quant.calib.solving.solve import solve
    from k2quant.calib.stats.reading import Stats

_HOMES = {
    "Allotment": "budget.result",
    "Calibration": "calibrating",
    "CalibrationPlan": "planning",
    "Coverage": "coverage",
    "allot": "budget.allotting",
    "calibrate": "calibrating",
    "coverage_of": "coverage",
    "plan_calibration": "planning",
    "solve": "solving.solve",
}

__all__ = [
    "Allotment",
    "Calibration",
    "CalibrationPlan",
    "Coverage",
    "allot",
    "calibrate",
    "coverage_of",
    "open_stats",
    "plan_calibration",
    "solve",
]


def open_stats(folder: str | os.PathLike[str]) -> Stats:
    """Open what `calibrate` wrote; see `k2quant.calib.stats.reading` for what is checked then, and what later.

    Args:
        folder: with the statistics.

    Raises:
        CheckpointError: it is not finished, or not whole, or holds what cannot have been measured.
    """
    from k2quant.calib.stats import reading

    return reading.open_stats(Path(folder))


def __getattr__(name: str) -> Any:
    """Load a function and what it needs when it is first asked for."""
    if _HOMES.get(name) in {"calibrating", "solving.solve"}:  # all else reads files
        need("run", "running a model")
    if name in _HOMES:
        return getattr(import_module(f"k2quant.calib.{_HOMES[name]}"), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
