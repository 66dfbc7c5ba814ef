"""What rounding explains: how far off a weight may be before `verify` calls it wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from k2quant.checkpoint.reader import open_checkpoint
from k2quant.checkpoint.reading import read_tensor
from k2quant.formats.format import Parts
from k2quant.formats.int4 import Int4
from k2quant.kernels.codecs.choice import codecs
from k2quant.kernels.codecs.scales.search import candidate_table, least_share
from k2quant.kernels.codecs.values import U16, bf16_to_float, float_to_bf16


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


@pytest.mark.parametrize(
    ("scale", "before", "after", "outside"),
    [
        (0.75, 7.0, 5.25, 0),  # 7 * 0.75: cut off, as a searched scale does
        (0.75, -7.0, -5.25, 0),
        (0.75, 7.0, 4.5, 1),  # the code 6
        (0.75, 7.0, -5.25, 1),
        (0.75, 5.25, 4.5, 1),  # not cut off: it has a code of its own, 7
        (0.5, 7.0, 3.5, 1),  # no search shrinks a scale so far
    ],
)
def test_an_int4_scale_may_cut_off_what_a_search_would(scale: float, before: float, after: float, outside: int) -> None:
    """Where a scale is as large as a search may leave it, weights above 7 s may have the code 7."""
    assert Int4().outside(bits(7.0, before), bits(7.0 * scale, after), int4_parts(scale)) == outside + (scale == 0.5)


def test_searched_scales_are_never_as_small_as_what_verify_refuses() -> None:
    """Whatever the largest weight of a group: its least candidate cuts off no more than is excused."""
    amax = bf16_to_float(np.arange(127 << 7, 128 << 7, dtype=np.uint16))
    for bits, largest in ((4, 7), (3, 3), (2, 1)):
        ratio = bf16_to_float(candidate_table(bits)) * np.float32(largest) / amax[:, None]
        assert 0.95 * ratio.min() < least_share(bits) < ratio.min()


def test_a_searched_scale_explains_no_wrong_code(k2_bf16: Path) -> None:
    """Groups at searched scales lie within; one code that is one off does not, nor do scales that are 10 % off."""
    found = open_checkpoint(k2_bf16)
    entry = found.tensors["model.layers.1.mlp.experts.0.up_proj.weight"]
    before = np.frombuffer(read_tensor(found, entry), np.uint16).reshape(entry.shape)
    cpu, int4 = codecs("cpu"), Int4()
    parts: Parts = {"weight_packed": np.empty((256, 64), np.int32)}
    parts["weight_scale"] = int4.search(before, None, cpu)
    int4.store(before, parts["weight_scale"].copy(), parts, cpu)
    after = np.empty_like(before)
    int4.decode(parts, after, cpu)
    assert int4.outside(before, after, parts) == 0
    parts["weight_packed"][3, 5] ^= 0x10
    int4.decode(parts, after, cpu)
    assert int4.outside(before, after, parts) == 1
    parts["weight_packed"][3, 5] ^= 0x10
    parts["weight_scale"] = float_to_bf16(bf16_to_float(parts["weight_scale"]) * np.float32(0.9))
    int4.decode(parts, after, cpu)
    assert int4.outside(before, after, parts) > before.size / 32


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
