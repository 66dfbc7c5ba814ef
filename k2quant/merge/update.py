"""The values of a merged checkpoint, a panel at a time, for the stream that writes it.

The rule: updated = bf16(float64(W0) + scaling * sum over r of float64(B) * float64(A)), W0 being the base's weight as
BF16; sums in float64, one rounding to BF16, then whatever `k2quant convert` does with a BF16 weight. Panels are worked
on in bands of 128 rows, so that memory stays small and figures do not depend on the panels.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from k2quant.checkpoint.panels import ROW_STEP, panel_shape, panel_state, read_panel
from k2quant.checkpoint.reading import read_into
from k2quant.checkpoint.weights import Weight
from k2quant.conversion.plan import Job, Plan
from k2quant.errors import BadValue
from k2quant.formats.dtypes import ITEM_BYTES, TensorSpec
from k2quant.formats.layouts import Bf16, Format, Int4
from k2quant.formats.transcode import Parts, Scratch, located, to_bf16, transcode
from k2quant.kernels.codecs.values import (
    F64,
    INFINITY,
    U16,
    ValueAt,
    bad_weight,
    bf16_to_float,
    double_to_bf16,
    float_to_bf16,
)
from k2quant.merge import factors
from k2quant.merge.adapter import Adapter
from k2quant.merge.arithmetic import Stored, as_float64, band_of, effect
from k2quant.merge.figures import MergeFigures, total
from k2quant.merge.targets import Change, LowRank, Whole

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from k2quant.kernels.codecs.figures import Figures
    from k2quant.kernels.codecs.seam import Codecs


class _Buffers(threading.local):
    """A thread's own; what is decoded from one of them lives until the same one decodes again."""

    def __init__(self) -> None:
        self.base, self.without, self.after, self.adapter = Scratch(), Scratch(), Scratch(), Scratch()


class Merger:
    """A `stream.Substitute`: the base's values with an adapter's update added."""

    def __init__(self, plan: Plan, adapter: Adapter, changes: Mapping[str, Change], codecs: Codecs) -> None:
        """Remember what changes.

        Args:
            plan: of the conversion.
            adapter: whose values were checked to be finite.
            changes: by the name of the main tensor of each weight.
            codecs: who does the arithmetic of the formats.
        """
        self._plan, self._adapter, self._changes, self._codecs = plan, adapter, changes, codecs
        self._buffers = _Buffers()

    def replaces(self, weight: Weight) -> bool:
        """Tell whether a weight is changed."""
        return weight.main.name in self._changes

    def panel(self, job: Job, start: int, stop: int) -> tuple[Parts, Figures | None]:
        """Return rows `start` to `stop` of the tensors that are written, and what became of the update."""
        change, layout = self._changes[job.weight.main.name], self._layout(job)
        if layout is None or (isinstance(layout, Bf16) and layout.dtype != "BF16"):
            if not isinstance(change, Whole):
                msg = f"{job.weight.base} has no BF16 values to add to"  # refused before
                raise AssertionError(msg)
            return self._verbatim(job, change, start, stop), None
        state = panel_state(layout, job.weight.shape, start, stop)
        outputs = {suffix: self._buffers.after.take(f"out {suffix}", spec) for suffix, spec in state.items()}
        shared = self._shared(change)
        figures = []
        for row in range(start, stop, ROW_STEP):
            end = min(row + ROW_STEP, stop)
            band = band_of(layout, outputs, row - start, end - start)
            figures.append(self._band(job, layout, shared, (row, end), band))
        return outputs, total(figures)

    def _shared(self, change: Change) -> F64 | None:
        """Return the factor that all rows of a weight share; None for one that is replaced."""
        if isinstance(change, Whole):
            return None
        return factors.right(self._adapter.shard, change, self._buffers.adapter)

    def _layout(self, job: Job) -> Format | None:
        """Return the format that is written; a weight that stays INT4 is rounded by the grid that was asked for."""
        layout, asked = job.target or job.weight.format, self._plan.policy.target
        if isinstance(layout, Int4) and isinstance(asked, Int4):
            return replace(layout, grid=asked.grid)
        return layout

    def _band(
        self, job: Job, layout: Format, shared: F64 | None, rows: tuple[int, int], outputs: Parts
    ) -> MergeFigures:
        """Fill a band of the outputs."""
        base = self._base(job.weight, *rows)
        exact, update = self._sum(job.weight, shared, rows, as_float64(base.values))
        updated = double_to_bf16(exact)
        if (updated & 0x7FFF >= INFINITY).any():
            row, column = divmod(int((updated & 0x7FFF >= INFINITY).argmax()), updated.shape[1])
            raise self._too_large(job.weight, rows[0] + row, column)
        figures, after = self._stored(job.weight, layout, updated, rows[0], outputs, self._buffers.after)
        without = self._without(job, layout, base, rows[0])
        return effect(figures, update, after, without, layout)

    def _too_large(self, weight: Weight, row: int, column: int) -> BadValue:
        return BadValue(
            f"with the update of {self._adapter.folder}, the weight at row {row}, column {column} exceeds bfloat16",
            tensor=weight.main.name,
            file=self._plan.source.folder / weight.main.file,
            remedy="is it the base that the adapter was trained on, and lora_alpha right? or did the training diverge?",
        )

    def _base(self, weight: Weight, start: int, stop: int) -> Stored:
        """Read a band of the base."""
        layout = weight.format
        if layout is None:
            msg = f"{weight.base} is no weight"
            raise TypeError(msg)
        parts = read_panel(self._plan.source, weight, start, stop, self._buffers.base, key="in")
        try:
            values = to_bf16(layout, parts, codecs=self._codecs, scratch=self._buffers.base)
            if (values & 0x7FFF >= INFINITY).any():
                raise bad_weight(values)
        except ValueAt as error:
            tensors = {suffix: entry.name for suffix, entry in weight.parts.items()}
            raise located(error, layout, start, tensors, weight.main.file) from error
        return Stored(parts, values)

    def _sum(self, weight: Weight, shared: F64 | None, rows: tuple[int, int], base: F64) -> tuple[F64, F64]:
        """Return a band of the new values and of the update, both exact but for float64's own rounding."""
        change, shard = self._changes[weight.main.name], self._adapter.shard
        if shared is not None and isinstance(change, LowRank):
            update = change.scaling * (factors.left(shard, change, *rows, self._buffers.adapter) @ shared)
            exact = base + update
            np.copyto(exact, base, where=update == 0)  # what gets no update keeps its bits: -0 + 0 would be +0
            return exact, update
        new = self._whole(weight, change, *rows).astype(np.float64)
        return new, new - base

    def _whole(self, weight: Weight, change: Change, start: int, stop: int) -> NDArray[Any]:
        """Return rows of a tensor that replaces the base's: BF16 as float32, F16 and F32 as they are."""
        if not isinstance(change, Whole):
            msg = f"{weight.base} is updated, not replaced"
            raise TypeError(msg)
        dtype, width = change.entry.dtype, panel_shape(weight.shape)[1]
        values = self._buffers.adapter.take("whole", TensorSpec(dtype, (stop - start, width)))
        read_into(self._adapter.shard, change.entry.start + start * width * ITEM_BYTES[dtype], values.data.cast("B"))
        return bf16_to_float(values) if dtype == "BF16" else values

    def _without(self, job: Job, layout: Format, base: Stored, start: int) -> Stored:
        """Return the base as it would be stored without the update."""
        if isinstance(layout, Bf16):
            return Stored({"weight": base.values}, base.values)
        if job.target is None:
            return base
        scratch = self._buffers.without
        state = panel_state(layout, base.values.shape, 0, len(base.values))
        outputs = {suffix: scratch.take(f"out {suffix}", spec) for suffix, spec in state.items()}
        return self._stored(job.weight, layout, base.values, start, outputs, scratch)[1]

    def _stored(
        self, weight: Weight, layout: Format, values: U16, start: int, outputs: Parts, scratch: Scratch
    ) -> tuple[Figures, Stored]:
        """Write a band of BF16 weights in a format, as a conversion does; return its figures and what it means."""
        codecs = self._codecs
        try:
            figures = transcode(Bf16(), layout, {"weight": values}, outputs, codecs=codecs, scratch=scratch)
        except ValueAt as error:
            raise _blamed(error, weight, start) from error
        return figures or codecs.floats.compare(values, values), Stored(
            outputs, to_bf16(layout, outputs, codecs=codecs, scratch=scratch)
        )

    def _verbatim(self, job: Job, change: Whole, start: int, stop: int) -> Parts:
        """Return rows of a tensor that replaces one of F32, or one of the same dtype."""
        suffix, entry = next(iter(job.outputs.items()))
        values = self._whole(job.weight, change, start, stop)
        return {suffix: values if entry.dtype == change.entry.dtype != "BF16" else _narrowed(values, entry.dtype)}


def _narrowed(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Return values as BF16 bits that they came from, or as float32."""
    return float_to_bf16(values) if dtype == "BF16" else values.astype(np.float32)


def _blamed(error: ValueAt, weight: Weight, start: int) -> BadValue:
    """Name the place of a bad value that is not the base's own."""
    return located(error, Bf16(), start, {"weight": weight.main.name}, weight.main.file)
