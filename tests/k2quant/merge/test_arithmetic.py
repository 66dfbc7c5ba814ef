"""What of an update is left, on numbers that one can add up by hand."""

from __future__ import annotations

import numpy as np
import pytest

from k2quant.checkpoint.panels import Panel
from k2quant.formats.bf16 import Bf16
from k2quant.formats.format import Parts
from k2quant.formats.int4 import Int4
from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.values import U16, float_to_bf16
from k2quant.merge.arithmetic import as_float64, band_of, effect

ROUNDING = Figures(count=4, changed=1, energy=2.0, error=3.0, worst=4.0)


def bits(*values: float) -> U16:
    """Return a row of BF16 bits."""
    return float_to_bf16(np.array([values], np.float32))


def test_an_update_is_measured_against_what_is_stored() -> None:
    """Of an update of 5, -1, 0.5 and 0 the weights got 2, -3, 0 and 0: the sums are these."""
    exact = np.array([[5.0, -1.0, 0.5, 0.0]])
    without, after = bits(1, 1, 1, 1), bits(3, -2, 1, 1)
    found = effect(ROUNDING, exact, Panel({"weight": after}, after), Panel({"weight": without}, without), Bf16())
    assert found.update == 25 + 1 + 0.25
    assert found.effective == 4 + 9
    assert found.inner == 5 * 2 + 1 * 3
    assert found.lost == 9 + 1 + 0.25  # (5 - 2)^2; all of 1, for it moved by 2 too much; all of 0.25
    assert found.codes_changed == 2
    assert (found.groups, found.groups_below_half_step) == (0, 0)
    assert (found.count, found.changed, found.energy, found.error, found.worst) == (4, 1, 2.0, 3.0, 4.0)


@pytest.mark.parametrize(("largest", "below"), [(0.49, 1), (0.5, 0), (-0.49, 1), (-0.5, 0), (2.0, 0), (0.0, 1)])
def test_a_group_counts_as_below_where_no_weight_gets_half_a_step(largest: float, below: int) -> None:
    """Two groups with steps of 1 and 8: one update of half a step is enough, of either sign; the other group has 4."""
    exact = np.zeros((1, 64))
    exact[0, 5], exact[0, 40] = largest, 4.0
    scale = bits(1, 8)
    words = np.zeros((1, 8), np.int32)
    values = np.zeros((1, 64), np.uint16)
    panel = Panel({"weight_packed": words, "weight_scale": scale}, values)
    found = effect(ROUNDING, exact, panel, panel, Int4())
    assert (found.groups, found.groups_below_half_step) == (2, below)
    exact[0, 40] = 3.9
    assert effect(ROUNDING, exact, panel, panel, Int4()).groups_below_half_step == below + 1


def test_bf16_is_widened_exactly() -> None:
    """Every bit pattern is the float64 that it stands for."""
    assert as_float64(bits(1.0, -0.0078125)).tolist() == [[1.0, -0.0078125]]
    assert as_float64(bits(1.0)).dtype == np.float64


def test_a_band_is_a_view_of_its_rows_in_every_tensor() -> None:
    """What is written to a band is written to the panel."""
    outputs: Parts = {"weight_packed": np.zeros((4, 8), np.int32), "weight_scale": np.zeros((4, 2), np.uint16)}
    band = band_of(Int4(), outputs, 1, 3)
    assert {suffix: array.shape for suffix, array in band.items()} == {"weight_packed": (2, 8), "weight_scale": (2, 2)}
    band["weight_scale"][...] = 1
    assert outputs["weight_scale"][:, 0].tolist() == [0, 1, 1, 0]
