"""Did quantisation cost accuracy, how much, how sure are we, and where did it come from?

Importing this loads neither torch nor lm-eval; each function loads what it needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from k2quant.ground.extras import need

if TYPE_CHECKING:
    from k2quant.eval.asking.running import run
    from k2quant.eval.drift.blame import find_blame
    from k2quant.eval.drift.fidelity import measure_fidelity
    from k2quant.eval.drift.keeping import discard_passes
    from k2quant.eval.gating.gate import gate
    from k2quant.eval.gating.policy import Policy
    from k2quant.eval.gating.verdict import Verdict
    from k2quant.eval.runs.reading import read_run
    from k2quant.eval.statistics.planning import plan
    from k2quant.eval.tools.running import run_tools

_HOMES = {
    "Policy": "gating.policy",
    "Verdict": "gating.verdict",
    "discard_passes": "drift.keeping",
    "find_blame": "drift.blame",
    "gate": "gating.gate",
    "measure_fidelity": "drift.fidelity",
    "plan": "statistics.planning",
    "read_run": "runs.reading",
    "run": "asking.running",
    "run_tools": "tools.running",
}

__all__ = [
    "Policy",
    "Verdict",
    "discard_passes",
    "find_blame",
    "gate",
    "measure_fidelity",
    "plan",
    "read_run",
    "run",
    "run_tools",
]


def __getattr__(name: str) -> Any:
    """Load a function and what it needs when it is first asked for."""
    if _HOMES.get(name, "").startswith("drift."):  # all that stands there passes texts through models
        need("run", "running a model")
    if name in _HOMES:
        return getattr(import_module(f"k2quant.eval.{_HOMES[name]}"), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
