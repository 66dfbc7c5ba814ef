"""The values of a merged checkpoint, a panel at a time, for the stream that writes it.

The rule: updated = bf16(float64(W0) + scaling * sum over r of float64(B) * float64(A)), W0 being the base's weight as
BF16; sums in float64, one rounding to BF16, then whatever `k2quant convert` does with a BF16 weight. Panels are worked
on in bands of 128 rows, so that memory stays small and figures do not depend on the panels.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from k2quant.checkpoint.panels import ROW_STEP, Panel, naming, panel_shape, panel_state, read_panel, read_values
from k2quant.checkpoint.reading import read_into
from k2quant.checkpoint.weights import StoredWeight
from k2quant.conversion.placing import Job
from k2quant.conversion.plan import Plan
from k2quant.errors import BadValue
from k2quant.formats.bf16 import Bf16
from k2quant.formats.dtypes import DTYPES, TensorSpec
from k2quant.formats.format import Format, Parts
from k2quant.formats.transcode import Scratch, located, to_bf16, transcode
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
from k2quant.merge.arithmetic import as_float64, band_of, effect
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

    def replaces(self, weight: StoredWeight) -> bool:
        """Tell whether a weight is changed."""
        return weight.main.name in self._changes

    def survey(self, job: Job, asked: Format, start: int, stop: int) -> object:
        """Return what a format says of rows `start` to `stop` with their update."""
        shared = self._shared(self._changes[job.weight.main.name])
        updated = self._buffers.after.take("updated", TensorSpec("BF16", (stop - start, job.weight.shape[-1])))
        for row in range(start, stop, ROW_STEP):
            end = min(row + ROW_STEP, stop)
            base = self._base(job.weight, row, end)
            updated[row - start : end - start], _ = self._updated(job.weight, shared, (row, end), base)
        return asked.survey(updated, self._codecs)

    def panel(self, job: Job, start: int, stop: int) -> tuple[Parts, Figures | None]:
        """Return rows `start` to `stop` of the tensors that are written, and what became of the update."""
        change, written = self._changes[job.weight.main.name], self._written(job)
        if written is None or (written.unwritable is not None and not written.quantised):
            if not isinstance(change, Whole):
                msg = f"{job.weight.base} has no BF16 values to add to"  # refused before
                raise AssertionError(msg)
            return self._verbatim(job, change, start, stop), None
        state = panel_state(written, job.weight.shape, start, stop)
        outputs = {suffix: self._buffers.after.take(f"out {suffix}", spec) for suffix, spec in state.items()}
        shared = self._shared(change)
        figures = []
        for row in range(start, stop, ROW_STEP):
            end = min(row + ROW_STEP, stop)
            band = band_of(written, outputs, row - start, end - start)
            figures.append(self._band(job, written, shared, (row, end), band))
        self._pass_on(job, written, start, outputs)
        return outputs, total(figures)

    def _pass_on(self, job: Job, written: Format, start: int, outputs: Parts) -> None:
        """Fill what goes along with a weight from the base, whatever its values are now."""
        base = job.weight.format
        if base is not None and written.along:
            stop = min(start + ROW_STEP, panel_shape(job.weight.shape)[0])
            with naming(job.weight, start):
                parts = read_panel(self._plan.source, job.weight, start, stop, self._buffers.base)
                base.pass_on(parts, outputs, written)

    def _shared(self, change: Change) -> F64 | None:
        """Return the factor that all rows of a weight share; None for one that is replaced."""
        if isinstance(change, Whole):
            return None
        return factors.right(self._adapter.shard, change, self._buffers.adapter)

    def _written(self, job: Job) -> Format | None:
        """Return the format that is written; one that stays as it is takes the rounding rule that was asked for."""
        return self._plan.recipe.rounding(job.written) if job.written is not None else None

    def _band(
        self, job: Job, written: Format, shared: F64 | None, rows: tuple[int, int], outputs: Parts
    ) -> MergeFigures:
        """Fill a band of the outputs."""
        base = self._base(job.weight, *rows)
        updated, update = self._updated(job.weight, shared, rows, base)
        figures, after = self._stored(job.weight, written, updated, rows[0], outputs, self._buffers.after)
        without = self._without(job, written, base, rows[0])
        return effect(figures, update, after, without, written)

    def _updated(self, weight: StoredWeight, shared: F64 | None, rows: tuple[int, int], base: Panel) -> tuple[U16, F64]:
        """Return a band of the new values as BF16, and its update."""
        exact, update = self._sum(weight, shared, rows, as_float64(base.values))
        updated = double_to_bf16(exact)
        if (updated & 0x7FFF >= INFINITY).any():
            row, column = divmod(int((updated & 0x7FFF >= INFINITY).argmax()), updated.shape[1])
            raise self._too_large(weight, rows[0] + row, column)
        return updated, update

    def _too_large(self, weight: StoredWeight, row: int, column: int) -> BadValue:
        return BadValue(
            f"with the update of {self._adapter.folder}, the weight at row {row}, column {column} exceeds bfloat16",
            tensor=weight.main.name,
            file=self._plan.source.folder / weight.main.file,
            remedy="is it the base that the adapter was trained on, and lora_alpha right? or did the training diverge?",
        )

    def _base(self, weight: StoredWeight, start: int, stop: int) -> Panel:
        """Read a band of the base."""
        source, scratch = self._plan.source, self._buffers.base
        panel = read_values(source, weight, start, stop, codecs=self._codecs, scratch=scratch)
        if (panel.values & 0x7FFF >= INFINITY).any():
            with naming(weight, start):
                raise bad_weight(panel.values)
        return panel

    def _sum(self, weight: StoredWeight, shared: F64 | None, rows: tuple[int, int], base: F64) -> tuple[F64, F64]:
        """Return a band of the new values and of the update, both exact but for float64's own rounding."""
        change, shard = self._changes[weight.main.name], self._adapter.shard
        if shared is not None and isinstance(change, LowRank):
            update = change.scaling * (factors.left(shard, change, *rows, self._buffers.adapter) @ shared)
            exact = base + update
            np.copyto(exact, base, where=update == 0)  # what gets no update keeps its bits: -0 + 0 would be +0
            return exact, update
        new = self._whole(weight, change, *rows).astype(np.float64)
        return new, new - base

    def _whole(self, weight: StoredWeight, change: Change, start: int, stop: int) -> NDArray[Any]:
        """Return rows of a tensor that replaces the base's: BF16 as float32, F16 and F32 as they are."""
        if not isinstance(change, Whole):
            msg = f"{weight.base} is updated, not replaced"
            raise TypeError(msg)
        dtype, width = change.entry.dtype, panel_shape(weight.shape)[1]
        values = self._buffers.adapter.take("whole", TensorSpec(dtype, (stop - start, width)))
        read_into(self._adapter.shard, change.entry.start + start * width * DTYPES[dtype].nbytes, values.data.cast("B"))
        return bf16_to_float(values) if dtype == "BF16" else values

    def _without(self, job: Job, written: Format, base: Panel, start: int) -> Panel:
        """Return the base as it would be stored without the update."""
        if not written.quantised:
            return Panel({written.main: base.values}, base.values)
        if job.target is None:
            return base
        scratch = self._buffers.without
        state = panel_state(written, base.values.shape, 0, len(base.values))
        outputs = {suffix: scratch.take(f"out {suffix}", spec) for suffix, spec in state.items()}
        return self._stored(job.weight, written, base.values, start, outputs, scratch)[1]

    def _stored(
        self, weight: StoredWeight, written: Format, values: U16, start: int, outputs: Parts, scratch: Scratch
    ) -> tuple[Figures, Panel]:
        """Write a band of BF16 weights in a format, as a conversion does; return its figures and what it means."""
        codecs = self._codecs
        try:
            figures = transcode(Bf16(), written, {"weight": values}, outputs, codecs=codecs, scratch=scratch)
        except ValueAt as error:
            raise _blamed(error, weight, start) from error
        decoded = to_bf16(written, outputs, codecs=codecs, scratch=scratch)
        return figures or codecs.floats.compare(values, values), Panel(outputs, decoded)

    def _verbatim(self, job: Job, change: Whole, start: int, stop: int) -> Parts:
        """Return rows of a tensor that replaces one of F32, or one of the same dtype."""
        suffix, entry = next(iter(job.outputs.items()))
        values = self._whole(job.weight, change, start, stop)
        return {suffix: values if entry.dtype == change.entry.dtype != "BF16" else _narrowed(values, entry.dtype)}


def _narrowed(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Return values as BF16 bits that they came from, or as float32."""
    return float_to_bf16(values) if dtype == "BF16" else values.astype(np.float32)


def _blamed(error: ValueAt, weight: StoredWeight, start: int) -> BadValue:
    """Name the place of a bad value that is not the base's own."""
    return located(error, Bf16(), start, {"weight": weight.main.name}, weight.main.file)
