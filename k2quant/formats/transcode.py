"""From one format to another, a panel of rows at a time, on plain numpy arrays.

BF16 is the pivot of meaning: every pair gives the bits that going through BF16 would give. Pairs for which the codecs
of a device have a fused loop (`Codecs.fused`) write no BF16; all others go through a panel of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from k2quant.errors import BadValue
from k2quant.formats.dtypes import TensorSpec, as_array
from k2quant.formats.format import Format, Parts
from k2quant.kernels.codecs.values import ValueAt

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from k2quant.kernels.codecs.figures import Figures
    from k2quant.kernels.codecs.seam import Codecs


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


def transcode(
    source: Format, target: Format, parts: Parts, outputs: Parts, *, codecs: Codecs, scratch: Scratch
) -> Figures | None:
    """Convert a panel.

    Args:
        source: the format of `parts`.
        target: the format of `outputs`.
        parts: the panel's arrays by suffix, each with its own rows.
        outputs: arrays to fill, likewise; what is not streamed is not touched. Afterwards some may be those of `parts`.
        codecs: who does the arithmetic.
        scratch: this thread's buffers.

    Returns:
        what rounding did to the weights as BF16 has them, or None where the target is not quantised or has the same
        codes and scales, and nothing may be rounded.

    Raises:
        ValueAt: a value that cannot be carried, with its place in the panel.
    """
    if source.relabels(target):
        values = to_bf16(source, parts, codecs=codecs, scratch=scratch)  # for its checks: a bad value is not passed on
        source.relabel(parts, outputs, target)
        if not target.rounds:
            return None
        after = np.empty_like(values)
        target.decode(outputs, after, codecs)
        return codecs.floats.compare(values, after)
    if not target.quantised:
        source.decode(parts, outputs[target.main], codecs)
        return None
    if target.restates(source):
        return target.restate(source, parts, outputs, codecs)
    fused = codecs.fused.get((source.name, target.name))
    if fused is not None:
        return fused(*source.reading(parts), *target.writing(outputs))
    return target.encode(to_bf16(source, parts, codecs=codecs, scratch=scratch), outputs, codecs)


def to_bf16(source: Format, parts: Parts, *, codecs: Codecs, scratch: Scratch) -> NDArray[np.uint16]:
    """Return a panel's weights as BF16 bit patterns; a view of `parts` where they are BF16 already."""
    return source.values(parts, codecs, scratch)


def located(error: ValueAt, source: Format, start: int, names: Mapping[str, str], file: str) -> BadValue:
    """Turn a place in a panel into an error that names tensor, row and column of the whole tensor.

    Args:
        error: what the codec found.
        source: the format that was read.
        start: the panel's first row of the weight.
        names: the names of the weight's tensors, by suffix.
        file: the shard of its main tensor.
    """
    suffix = source.suffix_of(error.of)
    if suffix in source.whole:
        return BadValue(error.what, tensor=names[suffix], file=file)
    row = error.row + source.rows(suffix, start, start)[0]
    return BadValue(f"{error.what} at row {row}, column {error.column}", tensor=names[suffix], file=file)
