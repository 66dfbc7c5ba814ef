"""Quantization-aware training: what is trained is, bit for bit, what is served.

model = k2quant.qat.load("Kimi-K2-Base", dtype=torch.float32)
k2quant.qat.prepare(model, k2quant.qat.QATConfig(to="int4"))
...                                          # any training loop
k2quant.qat.export(model, "Kimi-K2-QAT-INT4")

Importing this package loads no torch; each name loads what it needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from k2quant.ground.extras import need
from k2quant.qat.config import Adapter, QATConfig

if TYPE_CHECKING:
    from k2quant.qat.exporting.export import export
    from k2quant.qat.loading import load
    from k2quant.qat.preparing import Prepared, prepare, prepared
    from k2quant.qat.rounding.estimators import fake_quantize, fake_quantize_learned

__all__ = [
    "Adapter",
    "Prepared",
    "QATConfig",
    "export",
    "fake_quantize",
    "fake_quantize_learned",
    "load",
    "prepare",
    "prepared",
]

_HOMES = {
    "export": "exporting.export",
    "fake_quantize": "rounding.estimators",
    "fake_quantize_learned": "rounding.estimators",
    "load": "loading",
    "prepare": "preparing",
    "prepared": "preparing",
    "Prepared": "preparing",
}


def __getattr__(name: str) -> Any:
    """Load what works on tensors, and torch with it, when it is first asked for."""
    if name in _HOMES:
        need("run", f"k2quant.qat.{name}")
        return getattr(import_module(f"k2quant.qat.{_HOMES[name]}"), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
