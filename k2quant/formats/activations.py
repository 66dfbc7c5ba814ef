"""Scales that are no weight's: of what flows into and out of a layer, and of the KV cache.

A conversion of weights neither needs nor changes them. They are kept where the output's config speaks of them.
"""

from __future__ import annotations

from typing import Literal

from k2quant.errors import DtypeMismatch, ShapeMismatch
from k2quant.formats.dtypes import FLOATS
from k2quant.formats.format import Entry

Flow = Literal["input", "output", "cache"]
"""What a scale belongs to: a layer's input, its output, or attention's queries, keys and values."""

ActivationScales = Literal["one", "stats"]
"""Where scales of inputs that an output gets come from. `one`: 1.0 everywhere, as NVIDIA's own script writes for
Kimi-K3; `stats`: by the largest input that a calibration saw."""

KvCache = Literal["fp8"]
"""How engines are asked to keep keys and values. No scales stand in the checkpoint, and engines take 1.0."""

_FLOWS: dict[str, Flow] = {
    "input_scale": "input",
    "input_zero_point": "input",
    "input_global_scale": "input",
    "output_scale": "output",
    "output_zero_point": "output",
    **{f"{what}_scale": "cache" for what in ("k", "v", "kv", "q", "prob_output")},
    **{f"{what}_zero_point": "cache" for what in ("k", "v", "q")},
}
"""By the suffix that compressed-tensors and engines read."""


def flow(suffix: str) -> Flow | None:
    """Return what a tensor with this suffix is the scale of; None: it is no such scale."""
    return _FLOWS.get(suffix)


def check_scale(suffix: str, entry: Entry) -> None:
    """Refuse what can be no scale: an engine would read it as one.

    Raises:
        DtypeMismatch: it does not hold floats.
        ShapeMismatch: it is empty, or neither one scale nor one for each head, expert or group.
    """
    if suffix.endswith("scale") and entry.dtype not in FLOATS:
        raise DtypeMismatch(
            tensor=entry.name, file=entry.file, expected=f"a scale of {' or '.join(FLOATS)}", found=entry.dtype
        )
    if not entry.nbytes or sum(length > 1 for length in entry.shape) > 1:
        raise ShapeMismatch(
            tensor=entry.name, file=entry.file, expected="one scale, or one for each head or group", found=entry.shape
        )
