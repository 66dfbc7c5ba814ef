"""The pass that measures: a checkpoint a layer at a time, and what goes into each of its matrices.

Naming this package loads no torch; how much memory a pass takes can be asked without it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from k2quant.ground.extras import need

if TYPE_CHECKING:
    from k2quant.calib.collecting.memory import Needs, needs
    from k2quant.calib.collecting.running import Collected, collect

_HOMES = {"Collected": "running", "Needs": "memory", "collect": "running", "needs": "memory"}

__all__ = ["Collected", "Needs", "collect", "needs"]


def __getattr__(name: str) -> Any:
    """Load a function and what it needs when it is first asked for."""
    if _HOMES.get(name) == "running":
        need("run", "running a model")
    if name in _HOMES:
        return getattr(import_module(f"k2quant.calib.collecting.{_HOMES[name]}"), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
