"""What a model is calibrated on: documents in three parts that share none, as rows of tokens.

Naming this package loads no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from k2quant.calib.inputs.reading import Reasoning, read_samples
    from k2quant.calib.inputs.samples import Part, Samples

_HOMES = {"Part": "samples", "Reasoning": "reading", "Samples": "samples", "read_samples": "reading"}

__all__ = ["Part", "Reasoning", "Samples", "read_samples"]


def __getattr__(name: str) -> Any:
    """Load what works on tensors, and torch with it, when it is first asked for."""
    if name in _HOMES:
        return getattr(import_module(f"k2quant.calib.inputs.{_HOMES[name]}"), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
