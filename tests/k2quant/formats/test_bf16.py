"""BF16 as a format: what is one, what rounding explains, and where a bad value is said to stand."""

from __future__ import annotations

import numpy as np
import pytest

from k2quant.checkpoint.header import TensorEntry
from k2quant.errors import MalformedFile
from k2quant.formats.bf16 import Bf16
from k2quant.formats.dtypes import TensorSpec
from k2quant.formats.format import Neighbours
from k2quant.kernels.codecs import cpu
from k2quant.kernels.codecs.values import ValueAt


def entry(suffix: str, dtype: str) -> TensorEntry:
    """Return a tensor of the weight `w`."""
    return TensorEntry(f"w.{suffix}", dtype, (2, 4), "one.safetensors", 0, 16)


def beside(*suffixes: str) -> Neighbours:
    """Return the tensors of a weight."""
    return Neighbours("w", {f"w.{suffix}": entry(suffix, "I32") for suffix in suffixes}, "what is read")


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_floats_that_are_called_a_weight_are_one(dtype: str) -> None:
    """Read in their dtype, written only in BF16; another suffix and another dtype are nobody's here."""
    found = Bf16.recognise("weight", entry("weight", dtype), beside())
    assert found is not None
    assert (found.format, found.shape, found.suffixes) == (Bf16(dtype=dtype), (2, 4), ("weight",))
    assert found.format.unwritable == (None if dtype == "BF16" else dtype)
    assert (found.format.unit, found.format.label) == (dtype, dtype.lower())
    assert found.format.state((2, 4)) == {"weight": TensorSpec(dtype, (2, 4))}
    assert Bf16.recognise("bias", entry("bias", dtype), beside()) is None
    assert Bf16.recognise("weight", entry("weight", "I32"), beside()) is None


def test_a_weight_that_also_stands_there_packed_is_refused() -> None:
    """Nobody knows which of the two counts."""
    with pytest.raises(MalformedFile, match="stored twice"):
        Bf16.recognise("weight", entry("weight", "BF16"), beside("weight_packed"))


@pytest.mark.parametrize(
    ("before", "after", "outside"),
    [
        (0x3F80, 0x3F80, 0),
        (0x3F80, 0x3F81, 1),
        (0x3F80, 0xBF80, 1),
        (0x0000, 0x8000, 0),
        (0x8000, 0x0000, 0),
        (0x0000, 0x0001, 1),
        (0x8001, 0x0001, 1),
        (0x4000, 0x0000, 1),
    ],
)
def test_nothing_explains_a_difference_but_the_sign_of_a_zero(before: int, after: int, outside: int) -> None:
    """One bit is one weight that differs."""
    one, other = (np.array([[0x3F80, bits]], np.uint16) for bits in (before, after))
    assert Bf16().outside(one, other, {}) == outside


def test_bf16_is_copied_and_wider_floats_are_rounded() -> None:
    """Half to even; the scales of BF16 are none."""
    out = np.zeros((2, 2), np.uint16)
    values = np.array([[1.0, 1 + 2**-8], [1 + 3 * 2**-8, -2.0]], np.float32)
    Bf16(dtype="F32").decode({"weight": values}, out, cpu.CODECS)
    assert out.tolist() == [[0x3F80, 0x3F80], [0x3F82, 0xC000]]
    copy = np.zeros((2, 2), np.uint16)
    Bf16().decode({"weight": out}, copy, cpu.CODECS)
    assert copy.tolist() == out.tolist()
    assert Bf16().choose(out, cpu.CODECS).shape == (2, 0)
    figures = Bf16().store(out, out[:, :0], {"weight": copy}, cpu.CODECS)
    assert (figures.count, figures.changed, copy.tolist()) == (4, 0, out.tolist())


@pytest.mark.parametrize("shape", [(3, 2), (6, 1), (1, 6)])
def test_a_bad_value_is_named_by_row_and_column(shape: tuple[int, int]) -> None:
    """A single column is worked on as a row, and named as the column that it is."""
    values = np.ones(shape, np.float32)
    values.reshape(-1)[4] = np.nan
    with pytest.raises(ValueAt) as caught:
        Bf16(dtype="F32").decode({"weight": values}, np.zeros(shape, np.uint16), cpu.CODECS)
    assert (caught.value.row, caught.value.column) == divmod(4, shape[1])


def test_it_is_neither_quantised_nor_rounded_in_training() -> None:
    """Its weights are what they are, in products and in training."""
    import torch

    weights = torch.ones(2, 2).bfloat16()
    assert not Bf16.quantised
    assert Bf16().unrunnable((2, 2)) is None  # type: ignore[func-returns-value]  # None is the answer
    assert Bf16().fake_quantized(weights, 16) is weights
    assert Bf16().exported(weights, 16) == {"weight": weights}
