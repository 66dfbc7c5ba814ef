"""From one format to another, a panel of rows at a time, on plain numpy arrays.

BF16 is the pivot of meaning: every pair gives the bits that going through BF16 would give. The pairs FP8 -> INT4 and
INT4 -> FP8 are fused and write no BF16; F16 and F32 sources become BF16 in a scratch buffer first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from k2quant.errors import BadValue
from k2quant.formats.dtypes import TensorSpec
from k2quant.formats.layouts import Bf16, Format, Fp8, Int4
from k2quant.kernels.codecs.values import ValueAt, bf16_to_float

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from k2quant.kernels.codecs.figures import Figures
    from k2quant.kernels.codecs.seam import Codecs

Parts = dict[str, "NDArray[Any]"]

_NUMPY = {
    "U8": np.uint8,
    "BF16": np.uint16,
    "F16": np.float16,
    "F32": np.float32,
    "F8_E4M3": np.uint8,
    "I32": np.int32,
    "I64": np.int64,
}
"""How a tensor's bytes are seen: BF16 and FP8 as bit patterns."""


class Scratch:
    """Buffers of one thread, kept from panel to panel. A buffer lives until its key is asked for again."""

    def __init__(self) -> None:
        self._buffers: dict[str, NDArray[np.uint8]] = {}

    def take(self, key: str, spec: TensorSpec) -> NDArray[Any]:
        """Return an array of this dtype and shape, with whatever content."""
        buffer = self._buffers.get(key)
        if buffer is None or buffer.nbytes < spec.nbytes:
            buffer = self._buffers[key] = np.empty(spec.nbytes, np.uint8)
        return as_array(buffer[: spec.nbytes], spec)


def as_array(data: NDArray[np.uint8], spec: TensorSpec) -> NDArray[Any]:
    """View bytes as the array that a spec describes."""
    return data.view(_NUMPY[spec.dtype]).reshape(spec.shape)


def transcode(
    source: Format, target: Format, parts: Parts, outputs: Parts, *, codecs: Codecs, scratch: Scratch
) -> Figures | None:
    """Convert a panel.

    Args:
        source: the format of `parts`.
        target: the format of `outputs`.
        parts: the panel's arrays by suffix, each with its own rows.
        outputs: arrays to fill, likewise; `weight_shape` is not touched.
        codecs: who does the arithmetic.
        scratch: this thread's buffers.

    Returns:
        what rounding did to the weights as BF16 has them, or None where the target is BF16.

    Raises:
        ValueAt: a value that cannot be carried, with its place in the panel.
    """
    if isinstance(target, Bf16):
        _to_bf16(source, parts, outputs["weight"], codecs)
        return None
    if isinstance(source, Bf16):
        weights = to_bf16(source, parts, codecs=codecs, scratch=scratch)
        if isinstance(target, Fp8):
            return codecs.fp8.encode(weights, target.block, outputs["weight"], outputs["weight_scale_inv"])
        return codecs.int4.encode(weights, target.grid, outputs["weight_packed"], outputs["weight_scale"])
    if isinstance(source, Fp8) and isinstance(target, Int4):
        return codecs.fused["fp8", "int4"](
            parts["weight"],
            parts["weight_scale_inv"],
            source.block,
            target.grid,
            outputs["weight_packed"],
            outputs["weight_scale"],
        )
    if isinstance(source, Int4) and isinstance(target, Fp8):
        return codecs.fused["int4", "fp8"](
            parts["weight_packed"],
            widened(parts["weight_scale"]),
            source.group,
            target.block,
            outputs["weight"],
            outputs["weight_scale_inv"],
        )
    msg = f"{source.name} to {target.name} with another layout has no codec"  # the policy refuses it before
    raise AssertionError(msg)


def to_bf16(layout: Format, parts: Parts, *, codecs: Codecs, scratch: Scratch) -> NDArray[np.uint16]:
    """Return a panel's weights as BF16 bit patterns; a view of `parts` where they are BF16 already."""
    if isinstance(layout, Bf16) and layout.dtype == "BF16":
        return parts["weight"]
    rows, width = parts[layout.main].shape
    width *= 8 if isinstance(layout, Int4) else 1
    weights = scratch.take("pivot", TensorSpec("BF16", (rows, width)))
    _to_bf16(layout, parts, weights, codecs)
    return weights


def _to_bf16(source: Format, parts: Parts, out: NDArray[np.uint16], codecs: Codecs) -> None:
    if isinstance(source, Fp8):
        codecs.fp8.decode(parts["weight"], parts["weight_scale_inv"], source.block, out)
    elif isinstance(source, Int4):
        codecs.int4.decode(parts["weight_packed"], widened(parts["weight_scale"]), source.group, out)
    elif source.dtype == "BF16":
        np.copyto(out, parts["weight"])
    else:
        _round_floats(parts["weight"], out, codecs)


def _round_floats(values: NDArray[Any], out: NDArray[np.uint16], codecs: Codecs) -> None:
    """Round F16 or F32; a single column, as tensors that are no matrices come, is worked on as one row."""
    if values.shape[1] != 1:
        codecs.floats.to_bf16(values, out)
        return
    try:
        codecs.floats.to_bf16(values.reshape(1, -1), out.reshape(1, -1))
    except ValueAt as error:
        raise ValueAt(row=error.column, column=0, what=error.what) from error


def widened(scale: NDArray[Any]) -> NDArray[np.float32]:
    """Return scales as float32, exactly: BF16 bit patterns, F16 or F32."""
    if scale.dtype == np.uint16:
        return bf16_to_float(scale)
    return scale.astype(np.float32, copy=False)


def located(error: ValueAt, layout: Format, start: int, names: Mapping[str, str], file: str) -> BadValue:
    """Turn a place in a panel into an error that names tensor, row and column of the whole tensor.

    Args:
        error: what the codec found.
        layout: the format that was read.
        start: the panel's first row of the weight.
        names: the names of the weight's tensors, by suffix.
        file: the shard of its main tensor.
    """
    suffix = layout.main
    if error.of == "scale" and not isinstance(layout, Bf16):
        suffix = "weight_scale_inv" if isinstance(layout, Fp8) else "weight_scale"
    row = error.row + layout.rows(suffix, start, start)[0]
    return BadValue(f"{error.what} at row {row}, column {error.column}", tensor=names[suffix], file=file)
