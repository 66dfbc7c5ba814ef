"""The arithmetic of a merge on one band of rows, in float64.

Arrays are numpy arrays `[R, K]`; BF16 is uint16 bits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from k2quant.formats.layouts import Format, Fp8, Int4
from k2quant.formats.transcode import Parts, widened
from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.values import F64, U16, bf16_to_float
from k2quant.merge.figures import MergeFigures


def as_float64(bits: U16) -> F64:
    """Widen BF16 bits, exactly."""
    return bf16_to_float(bits).astype(np.float64)


class Stored(NamedTuple):
    """A band of weights as they are stored."""

    parts: Parts
    """The tensors, by suffix."""
    values: U16
    """What they mean, `[R, K]`."""


def effect(figures: Figures, exact: F64, after: Stored, without: Stored, layout: Format) -> MergeFigures:
    """Return what of an update is left.

    Args:
        figures: what rounding did to the updated weights.
        exact: the update D.
        after: the weights that are written.
        without: the base's weights as they would be written without the update.
        layout: the format of both.
    """
    real = as_float64(after.values) - as_float64(without.values)
    energy = exact * exact
    groups, below = _groups(exact, without.parts, layout)
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
        codes_changed=_codes_changed(after.parts[layout.main], without.parts[layout.main], layout),
        groups=groups,
        groups_below_half_step=below,
    )


def _codes_changed(after: NDArray[np.generic], before: NDArray[np.generic], layout: Format) -> int:
    if not isinstance(layout, Int4):
        return int(np.count_nonzero(after != before))
    pairs = np.bitwise_xor(after.view(np.uint8), before.view(np.uint8))
    return int(np.count_nonzero(pairs & 15) + np.count_nonzero(pairs >> 4))


def _groups(exact: F64, before: Parts, layout: Format) -> tuple[int, int]:
    """Count the INT4 groups, and those in which the update stays below half a step; FP8 and BF16 have no such step."""
    if not isinstance(layout, Int4):
        return 0, 0
    scale = widened(before["weight_scale"])
    largest = np.abs(exact).reshape(scale.shape[0], scale.shape[1], layout.group).max(axis=2)
    return scale.size, int(np.count_nonzero(largest < scale / 2))


def band_of(layout: Format, outputs: Parts, start: int, stop: int) -> Parts:
    """Return views of rows `start` to `stop` of a panel's tensors; `start` is a multiple of 128."""
    block = layout.block[0] if isinstance(layout, Fp8) else 1
    steps = {suffix: block if suffix == "weight_scale_inv" else 1 for suffix in outputs}
    return {suffix: array[start // steps[suffix] : -(-stop // steps[suffix])] for suffix, array in outputs.items()}
