"""What rounding explains: how far off a weight may be before `verify` calls it wrong."""

from __future__ import annotations

import numpy as np
import pytest

from k2quant.formats.format import Parts
from k2quant.formats.int4 import Int4
from k2quant.kernels.codecs.values import U16, float_to_bf16


def bits(*values: float) -> U16:
    """Return a group of 32 weights as BF16 bits: these, then zeros."""
    group = np.zeros((1, 32), np.float32)
    group[0, : len(values)] = values
    return float_to_bf16(group)


def int4_parts(scale: float) -> Parts:
    """Return the arrays of one INT4 group, of which only the scale matters here."""
    return {"weight_packed": np.zeros((1, 4), np.int32), "weight_scale": float_to_bf16(np.full((1, 1), scale))}


@pytest.mark.parametrize(
    ("before", "after", "outside"),
    [
        (3.5, 4.0, 0),  # half a step: a tie
        (0.453125, 1.0, 0),  # 0.547 of a step: a tie, and what compressed-tensors and BF16 add to it
        (3.4375, 4.0, 1),  # 0.5625
        (-3.4375, -4.0, 1),
        (3.28125, 4.0, 1),  # 0.72: what INT4 three quarters as fine would be
        (6.5, 6.0, 0),
        (5.4375, 6.0, 1),  # as many steps off as 3.4375: a large weight has no more room
    ],
)
def test_int4_rounding_explains_little_more_than_half_a_step(before: float, after: float, outside: int) -> None:
    """A weight may lie 0.55 steps from its code, large or small: 0.547 is rounding, 0.5625 is a wrong code."""
    assert Int4().outside(bits(7.0, before), bits(7.0, after), int4_parts(1.0)) == outside


@pytest.mark.parametrize(("amax", "outside"), [(7.0, 1), (14.0, 0), (13.75, 1)])
def test_an_int4_scale_excuses_what_the_largest_weight_asks_for(amax: float, outside: int) -> None:
    """Under a scale of 2, an error of 1.1 is half a step for a largest weight of 14, and too much for one of 7."""
    before, after = bits(amax, 2.90625), bits(amax, 4.0)
    assert Int4().outside(before, after, int4_parts(2.0)) == outside


@pytest.mark.parametrize(("units", "outside"), [(8, 0), (9, 1)])
def test_where_scales_are_subnormal_two_to_the_minus_130_is_nothing(units: int, outside: int) -> None:
    """Eight units of BF16's smallest number are 2^-130: a group whose scale vanished may lose that, and not nine."""
    before = np.full((1, 32), units, np.uint16)
    found = Int4().outside(before, np.zeros((1, 32), np.uint16), int4_parts(0.0))
    assert found == 32 * outside


def test_each_row_has_a_step_of_its_own() -> None:
    """A row is not excused by the large weights of the row beside it."""
    before, after = np.concatenate((bits(70.0), bits(7.0, 3.4375))), np.concatenate((bits(70.0), bits(7.0, 4.0)))
    parts: Parts = {
        "weight_packed": np.zeros((2, 4), np.int32),
        "weight_scale": float_to_bf16(np.array([[10.0], [1.0]])),
    }
    assert Int4().outside(before, after, parts) == 1
