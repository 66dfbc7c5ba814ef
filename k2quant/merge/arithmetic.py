"""The arithmetic of a merge on one band of rows, in float64.

Arrays are numpy arrays `[R, K]`; BF16 is uint16 bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from k2quant.checkpoint.panels import Panel
from k2quant.formats.format import Format, Parts
from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.values import F64, U16, bf16_to_float
from k2quant.merge.figures import MergeFigures


def as_float64(bits: U16) -> F64:
    """Widen BF16 bits, exactly."""
    return bf16_to_float(bits).astype(np.float64)


def effect(figures: Figures, exact: F64, after: Panel, without: Panel, written: Format) -> MergeFigures:
    """Return what of an update is left.

    Args:
        figures: what rounding did to the updated weights.
        exact: the update D.
        after: the weights that are written.
        without: the base's weights as they would be written without the update.
        written: the format of both.
    """
    real = as_float64(after.values) - as_float64(without.values)
    energy = exact * exact
    groups, below = _groups(exact, written.steps(without.parts))
    return MergeFigures(
        figures.count,
        figures.changed,
        figures.energy,
        figures.error,
        figures.worst,
        update=float(energy.sum()),
        effective=float((real * real).sum()),
        inner=float((exact * real).sum()),
        lost=float(np.minimum(energy, (exact - real) ** 2).sum()),
        codes_changed=written.codes_changed(after.parts, without.parts),
        groups=groups,
        groups_below_half_step=below,
    )


def _groups(exact: F64, steps: NDArray[np.float32] | None) -> tuple[int, int]:
    """Count the groups that share a step, and those in which the update stays below half of it; none without steps."""
    if steps is None:
        return 0, 0
    largest = np.abs(exact).reshape(*steps.shape, -1).max(axis=2)
    return steps.size, int(np.count_nonzero(largest < steps / 2))


def band_of(written: Format, outputs: Parts, start: int, stop: int) -> Parts:
    """Return views of rows `start` to `stop` of a panel's tensors; `start` is a multiple of `panels.ROW_STEP`."""
    return {suffix: array[slice(*written.rows(suffix, start, stop))] for suffix, array in outputs.items()}
