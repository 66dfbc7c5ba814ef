"""The pass that solves: a model a layer at a time, each layer seeing what the quantised ones before it give.

Naming this package loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from k2quant.ground.extras import need

if TYPE_CHECKING:
    from k2quant.calib.solving.passing.records import LayerFacts
    from k2quant.calib.solving.passing.running import Pass
    from k2quant.calib.solving.passing.sinks import Sink

_HOMES = {"LayerFacts": "records", "Pass": "running", "Sink": "sinks"}

__all__ = ["LayerFacts", "Pass", "Sink"]


def __getattr__(name: str) -> Any:
    """Load a class and what it needs when it is first asked for."""
    if _HOMES.get(name) == "running":
        need("run", "running a model")
    if name in _HOMES:
        return getattr(import_module(f"k2quant.calib.solving.passing.{_HOMES[name]}"), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
