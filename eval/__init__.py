"""Did quantisation cost accuracy, how much, how sure are we, and where did it come from?

Importing this loads neither torch nor lm-eval; each function loads what it needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from k2quant.eval.blame import find_blame
    from k2quant.eval.fidelity import measure_fidelity
    from k2quant.eval.gating import gate
    from k2quant.eval.planning import plan
    from k2quant.eval.policy import Policy
    from k2quant.eval.reading import read_run
    from k2quant.eval.running import run
    from k2quant.eval.verdict import Verdict

_HOMES = {
    "Policy": "policy",
    "Verdict": "verdict",
    "find_blame": "blame",
    "gate": "gating",
    "measure_fidelity": "fidelity",
    "plan": "planning",
    "read_run": "reading",
    "run": "running",
}

__all__ = ["Policy", "Verdict", "find_blame", "gate", "measure_fidelity", "plan", "read_run", "run"]


def __getattr__(name: str) -> Any:
    """Load a function and what it needs when it is first asked for."""
    if name in _HOMES:
        return getattr(import_module(f"k2quant.eval.{_HOMES[name]}"), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
