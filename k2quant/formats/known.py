"""The formats that k2quant knows, in the order in which people read of them. Whoever asks for all of them asks here."""

from __future__ import annotations

from typing import Literal

from k2quant.formats.bf16 import Bf16
from k2quant.formats.format import Format
from k2quant.formats.fp8 import Fp8
from k2quant.formats.int4 import Int4
from k2quant.formats.mxfp4 import Mxfp4
from k2quant.formats.nvfp4 import Nvfp4

FormatName = Literal["bf16", "fp8", "int4", "nvfp4", "mxfp4"]

ExportFormat = Literal["int4", "fp8", "nvfp4", "mxfp4"]
"""The formats that QAT trains for, the default first."""

FORMATS: dict[str, type[Format]] = {kind.name: kind for kind in (Bf16, Fp8, Int4, Nvfp4, Mxfp4)}
"""By name. The first that recognises a tensor has it."""


LADDER: tuple[FormatName, ...] = ("int4", "fp8", "bf16")
"""The formats from the cheapest to the dearest, each of which loses less than the one before."""


def supported() -> str:
    """Return what can be read, in words."""
    *first, last = (kind.reads for kind in FORMATS.values())
    return f"{', '.join(first)}, or {last}"


def quantised_names() -> tuple[str, ...]:
    """Return the names of the formats that are quantised."""
    return tuple(name for name, kind in FORMATS.items() if kind.quantised)
