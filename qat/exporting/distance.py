"""How far an export's weights are from those of its base, measured while they are written."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from k2quant.checkpoint.header import TensorEntry
from k2quant.checkpoint.panels import naming, read_values
from k2quant.checkpoint.reader import Checkpoint
from k2quant.checkpoint.reading import read_into
from k2quant.conversion.convert import codecs_of
from k2quant.conversion.placing import Job
from k2quant.errors import BadValue
from k2quant.formats.dtypes import FLOATS, TensorSpec, row_bytes, widened
from k2quant.formats.format import Parts
from k2quant.formats.transcode import Scratch, to_bf16
from k2quant.kernels.codecs.figures import Figures

if TYPE_CHECKING:
    from numpy.typing import NDArray


class _Buffers(threading.local):
    """A thread's own."""

    def __init__(self) -> None:
        self.base, self.written = Scratch(), Scratch()


class Distance:
    """Compares panels that are written with the same rows of the base, which it reads for that."""

    def __init__(self, base: Checkpoint) -> None:
        """Remember the base."""
        self._base, self._codecs, self._buffers = base, codecs_of("cpu"), _Buffers()

    def measured(self, job: Job, start: int, stop: int, parts: Parts) -> Figures | None:
        """Return the figures of what is written against the base's weights, both as BF16; of a bias, as it is stored.

        Args:
            job: whose rows these are.
            start: first row.
            stop: one past the last row.
            parts: the arrays that are written, by suffix, all of finite values.

        Returns:
            the figures; None for what is neither a weight nor floats.

        Raises:
            BadValue: the base holds a value that is not finite.
        """
        weight, written = job.weight, job.written
        if weight.format is None or written is None:
            return self._plain(weight.main, start, stop, parts)
        base = read_values(self._base, weight, start, stop, codecs=self._codecs, scratch=self._buffers.base)
        after = to_bf16(written, parts, codecs=self._codecs, scratch=self._buffers.written)
        with naming(weight, start):
            return self._codecs.floats.compare(base.values, after)

    def _plain(self, entry: TensorEntry, start: int, stop: int, parts: Parts) -> Figures | None:
        if entry.dtype not in FLOATS:
            return None
        spec = TensorSpec(entry.dtype, (stop - start, 1))
        stored = self._buffers.base.take("as it is", spec)
        read_into(self._base.shards[entry.file], entry.start + start * row_bytes(spec), stored.data.cast("B"))
        if not np.isfinite(widened(stored)).all():
            raise BadValue("not finite", tensor=entry.name, file=entry.file, remedy="is the base damaged?")
        (written,) = parts.values()
        return _figures(*(widened(values).astype(np.float64) for values in (stored, written)))


def _figures(before: NDArray[np.float64], after: NDArray[np.float64]) -> Figures:
    error = np.abs(after - before)
    return Figures(
        before.size,
        int(np.count_nonzero(error)),
        float((before * before).sum()),
        float((error * error).sum()),
        float(error.max(initial=0)),
    )
