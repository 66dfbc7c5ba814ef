"""Grouping: which tensors make a weight, which are none, and which are refused, one problem for each."""

from __future__ import annotations

import pytest

from k2quant.checkpoint.header import TensorEntry
from k2quant.checkpoint.weights import group_tensors
from k2quant.errors import MissingTensor, UnsupportedFormat
from k2quant.formats.bf16 import Bf16
from k2quant.formats.int4 import Int4

BASE = "model.layers.1.mlp.experts.0.up_proj"


def tensors(*entries: tuple[str, str, tuple[int, ...]]) -> dict[str, TensorEntry]:
    """Return tensors by name, each of 16 bytes."""
    return {name: TensorEntry(name, dtype, shape, "one.safetensors", 0, 16) for name, dtype, shape in entries}


INT4 = (
    (f"{BASE}.weight_shape", "I32", (2,)),
    (f"{BASE}.weight_packed", "I32", (1, 4)),
    (f"{BASE}.weight_scale", "BF16", (1, 1)),
)


def test_a_weight_has_its_partners_and_a_bias_is_itself() -> None:
    """Weights come in the order of their main tensors, and a tensor that is none has no format."""
    found = group_tensors(tensors(("lm_head.weight", "F32", (2, 2)), *INT4, ("lm_head.bias", "F32", (4,))))
    assert found.problems == []
    head, expert, bias = found.weights
    assert (head.base, head.format, list(head.parts)) == ("lm_head", Bf16(dtype="F32"), ["weight"])
    assert (expert.base, expert.format, expert.shape) == (BASE, Int4(), (1, 32))
    assert [entry.name for entry in expert.parts.values()] == [INT4[1][0], INT4[2][0], INT4[0][0]]
    assert list(expert.parts) == ["weight_packed", "weight_scale", "weight_shape"]
    assert (expert.main.name, expert.nbytes) == (f"{BASE}.weight_packed", 48)
    assert (bias.format, bias.shape, bias.main.name, bias.nbytes) == (None, (4,), "lm_head.bias", 16)


@pytest.mark.parametrize("place", [0, 2])
def test_a_partner_without_its_weight_is_a_problem(place: int) -> None:
    """It is named, and the others go on."""
    found = group_tensors(tensors(INT4[place], ("a.weight", "BF16", (2, 4))))
    assert [weight.base for weight in found.weights] == ["a"]
    (problem,) = found.problems
    assert isinstance(problem, MissingTensor)
    assert INT4[place][0] in str(problem)
    assert "without its weight" in str(problem)


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "weight_blocks", "weight_scales"])
def test_tensors_of_other_formats_are_refused(suffix: str) -> None:
    """Each by its name, as belonging to a format that is not read."""
    found = group_tensors(tensors((f"a.{suffix}", "I32", (2, 4))))
    (problem,) = found.problems
    assert found.weights == []
    assert isinstance(problem, UnsupportedFormat)
    assert f"a.{suffix}" in str(problem)


@pytest.mark.parametrize(
    ("suffix", "dtype", "words"),
    [
        ("weight", "I8", "a weight of dtype I8 is not supported"),
        ("weight_packed", "I8", "packed weights of dtype I8"),
        ("weight_zero_point", "I32", "asymmetric INT4"),
    ],
)
def test_a_weight_that_no_format_takes_is_refused(suffix: str, dtype: str, words: str) -> None:
    """In the words of the format that knows better, where one does."""
    (problem,) = group_tensors(tensors((f"a.{suffix}", dtype, (2, 4)))).problems
    assert words in str(problem)


def test_a_weight_that_lacks_a_partner_is_a_problem() -> None:
    """And its other partner is none: it has its weight."""
    found = group_tensors(tensors(*INT4[:2]))
    assert found.weights == []
    assert ["weight_scale" in str(problem) for problem in found.problems] == [True]
