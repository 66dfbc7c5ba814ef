"""Powers of two: what moving one changes, and how it is told from the outside."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2quant.conversion.searching.powers import MOST, fold_of, foldable, foldable_rows, shifted, shifted_scales
from k2quant.kernels.codecs import cpu
from k2quant.kernels.codecs.values import F32, I32, U16, ValueAt, bf16_to_float, float_to_bf16

SHAPE = (12, 96)


def drawn(seed: int) -> U16:
    """Return weights, some of them zero, a row of zeros among them."""
    random = np.random.default_rng(seed)
    values = random.standard_t(3, SHAPE) * random.choice([0.02, 3e-5, 40.0], (SHAPE[0], 1))
    values[random.random(SHAPE) < 0.1] = 0
    values[3] = 0
    values[5, :32] = 0
    return float_to_bf16(values.astype(np.float32))


def searched(values: U16, importance: F32 | None) -> tuple[I32, U16]:
    """Return packed words and scales."""
    packed, scale = np.empty((len(values), values.shape[1] // 8), np.int32), np.empty((len(values), 3), np.uint16)
    cpu.int4.search(values, importance, scale)
    cpu.int4.store(values, scale, "moonshot", packed)
    return packed, scale


def decoded(packed: I32, scale: U16) -> U16:
    """Return the values that they stand for."""
    out = np.empty((len(packed), packed.shape[1] * 8), np.uint16)
    cpu.int4.decode(packed, bf16_to_float(scale), 32, out)
    return out


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1))
def test_a_fold_of_rows_changes_no_code_and_is_found_again(seed: int) -> None:
    """Rows times 2^-k are exact, get the same codes at scales times 2^-k, and give k away."""
    values, random = drawn(seed), np.random.default_rng(seed + 1)
    able = foldable_rows(values)
    assert able.tolist() == values.astype(bool).any(1).tolist()
    k = np.where(able, random.integers(-MOST, MOST + 1, len(values)), 0).astype(np.int8)
    folded = shifted(values, -k[:, None])
    assert (bf16_to_float(folded) == np.ldexp(bf16_to_float(values), -k[:, None].astype(np.int32))).all()
    importance = random.lognormal(0, 1, SHAPE[1]).astype(np.float32)
    (packed, scale), (moved, lesser) = (searched(each, importance) for each in (values, folded))
    assert moved.tolist() == packed.tolist()
    assert lesser.tolist() == shifted_scales(scale, values, -k).tolist()
    assert lesser[3].tolist() == scale[3].tolist()
    assert fold_of(values, decoded(moved, lesser)).tolist() == k.tolist()


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32 - 1))
def test_what_was_not_folded_is_no_fold(seed: int) -> None:
    """Rounded by any rule, rows that nobody folded give zeros."""
    values = drawn(seed)
    scale = np.empty((len(values), 3), np.uint16)
    cpu.int4.choose(values, "moonshot", scale)
    packed = np.empty((len(values), values.shape[1] // 8), np.int32)
    cpu.int4.store(values, scale, "moonshot", packed)
    for output in (decoded(packed, scale), decoded(*searched(values, None))):
        assert not fold_of(values, output).any()


def test_rows_at_the_ends_of_the_exponent_are_not_folded() -> None:
    """A weight that a power of two would push out of the normal numbers keeps its row and column as they are."""
    values = np.full((5, 32), 0x3F00, np.uint16)
    for row, bad in enumerate((0x0001, 0x0D00, 0x7F00, 0x8001)):  # subnormal, 2^-101, 2^127, negative
        values[row, row] = bad
    assert foldable_rows(values).tolist() == [False] * 4 + [True]
    assert foldable(values)[0].all(0).tolist() == [False] * 4 + [True] * 28
    assert fold_of(values, values).tolist() == [0] * 5


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(
            lambda output: output.__setitem__((1, slice(32, 64)), shifted(output[1, 32:64], np.array(1))), id="a group"
        ),
        pytest.param(lambda output: output.__setitem__((1, slice(32, 64)), 0), id="erased"),
        pytest.param(lambda output: output.__setitem__(1, shifted(output[1], np.array(MOST + 1))), id="too far"),
        pytest.param(
            lambda output: output.__setitem__(
                (1, slice(32, 64)), float_to_bf16(bf16_to_float(output[1, 32:64]) * np.float32(0.515))
            ),
            id="no power",
        ),
    ],
)
def test_what_is_no_power_of_two_of_a_row_is_refused(change: object) -> None:
    """A group that moved alone, vanished, moved too far or by something between is named by row and column."""
    values = drawn(7)
    output = values.copy()
    assert callable(change)
    change(output)
    with pytest.raises(ValueAt, match="no power of two") as found:
        fold_of(values, output)
    assert (found.value.row, found.value.column) in {(1, 32), (1, 0)}
