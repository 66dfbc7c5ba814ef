"""Quantization and compression toolkit for Kimi K2: BF16, block-FP8 and INT4, exact, safe, at disk speed.

Importing this package loads neither torch nor numpy; each function loads what it needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from k2quant.checking.inspection import Inspection, inspect
from k2quant.checking.verify import Verification, verify, verify_checksums
from k2quant.conversion.convert import Conversion, convert
from k2quant.errors import K2QuantError
from k2quant.formats.known import FormatName
from k2quant.ground.spinning import shorten_spinning
from k2quant.ground.version import __version__
from k2quant.kernels.codecs.grids import Grid
from k2quant.merge import merge

if TYPE_CHECKING:
    from k2quant.checking.engines import EngineCheck, check_engine
    from k2quant.formats.tensor import QuantizedTensor, dequantize, quantize
    from k2quant.model import LayerHooks, load_model, save_model, stream_forward

__all__ = [
    "Conversion",
    "EngineCheck",
    "FormatName",
    "Grid",
    "Inspection",
    "K2QuantError",
    "LayerHooks",
    "QuantizedTensor",
    "Verification",
    "__version__",
    "check_engine",
    "convert",
    "dequantize",
    "inspect",
    "load_model",
    "merge",
    "quantize",
    "save_model",
    "stream_forward",
    "verify",
    "verify_checksums",
]

shorten_spinning()


def __getattr__(name: str) -> Any:
    """Load what works on tensors, and numpy or torch with it, when it is first asked for."""
    if name in {"EngineCheck", "check_engine"}:
        from k2quant.checking import engines

        return getattr(engines, name)
    if name in {"QuantizedTensor", "dequantize", "quantize"}:
        from k2quant.formats import tensor

        return getattr(tensor, name)
    if name in {"LayerHooks", "load_model", "save_model", "stream_forward"}:
        from k2quant import model

        return getattr(model, name)
    if name in {"calib", "eval", "qat"}:  # rooms of their own; naming them is enough
        return import_module(f"k2quant.{name}")
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    """Name what is loaded later too: completion in a notebook asks here."""
    return sorted({*globals(), *__all__})
