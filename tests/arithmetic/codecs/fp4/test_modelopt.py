"""NVFP4 of ModelOpt's layout is, byte for byte, what its `NVFP4QTensor` writes: `make fp4-oracles` asked it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from codec_makers import EACH, FINITE, SWIFT, from_nvfp4, nvfp4_at, to_nvfp4
from k2quant.kernels.codecs import fp4
from k2quant.kernels.codecs.cpu import CODECS
from k2quant.kernels.codecs.fp4 import TensorScale, tensor_scale
from k2quant.kernels.codecs.seam import Codecs
from places import DATA

GOLDEN = json.loads((DATA / "golden_modelopt_nvfp4.json").read_text())
CASES = pytest.mark.parametrize("case", GOLDEN["cases"].values(), ids=GOLDEN["cases"])
Maker = Callable[[], Codecs]
Case = dict[str, Any]


def array(case: Case, part: str, dtype: type) -> NDArray[Any]:
    """Return an array of a case."""
    return np.frombuffer(bytes.fromhex(case[part]), dtype).reshape(case["shape"][0], -1)


def given(case: Case) -> TensorScale:
    """Return the tensor scale of a case."""
    return TensorScale(float(array(case | {"shape": [1]}, "tensor_scale", np.float32)[0, 0]), divides=False)


def digest(found: NDArray[Any]) -> str:
    """Return the SHA-256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(found).tobytes()).hexdigest()


@CASES
def test_the_tensor_scale(case: Case) -> None:
    """Where the tensor scale is the matrix's own, it is `tensor_scale` of its largest weight."""
    if case["own_tensor_scale"]:
        weights = array(case, "weights", np.uint16)
        assert tensor_scale(CODECS.nvfp4.amax(weights), divides=False) == given(case)


@EACH
@CASES
def test_codes_and_scales(maker: Maker, case: Case) -> None:
    """The same block scales and codes: of ordinary weights, zeros of both signs, ties, the tiniest and the largest."""
    codes, scale, _ = to_nvfp4(maker(), array(case, "weights", np.uint16), given(case))
    assert np.array_equal(scale, array(case, "scale", np.uint8))
    assert np.array_equal(codes, array(case, "codes", np.uint8))


@EACH
@CASES
def test_values(maker: Maker, case: Case) -> None:
    """ModelOpt's own codes mean the BF16 values that ModelOpt decodes; its zeros have no sign, ours keep it."""
    codes, scale = array(case, "codes", np.uint8), array(case, "scale", np.uint8)
    found, theirs = from_nvfp4(maker(), codes, scale, given(case)), array(case, "values", np.uint16)
    assert np.array_equal(np.where(found == 0x8000, 0, found), np.where(theirs == 0x8000, 0, theirs))
    assert (found[fp4.nibbles(codes) == 8] == 0x8000).all()


@SWIFT
@pytest.mark.parametrize("known", GOLDEN["all_weights"], ids=lambda known: f"{known['scale']:#x}")
def test_every_weight(maker: Maker, known: Case) -> None:
    """All finite BF16 numbers are rounded to ModelOpt's codes: its hash of them."""
    weights = FINITE.reshape(-1, 16)
    tensor = TensorScale(float(np.float32(known["tensor_scale"])), divides=False)
    scale = np.full((len(weights), 1), known["scale"], np.uint8)
    assert digest(nvfp4_at(maker(), weights, scale, tensor)) == known["codes"]


@SWIFT
@pytest.mark.parametrize("known", GOLDEN["all_largest"], ids=lambda known: f"{known['tensor_scale']:g}")
def test_the_block_scale_of_every_largest_weight(maker: Maker, known: Case) -> None:
    """Whatever the largest weight of a block, its scale is ModelOpt's: its hash of them, clamps and zero included."""
    weights = np.zeros((0x7F80, 16), np.uint16)
    weights[:, 3] = np.arange(0x7F80)
    scale = np.empty((len(weights), 1), np.uint8)
    maker().nvfp4.choose(weights, TensorScale(float(np.float32(known["tensor_scale"])), divides=False), scale)
    assert digest(scale) == known["scale"]


@SWIFT
@pytest.mark.parametrize("known", GOLDEN["all_codes"], ids=lambda known: f"{known['tensor_scale']:g}")
def test_every_code_at_every_scale(maker: Maker, known: Case) -> None:
    """The 16 codes at the 127 scales that are numbers mean what ModelOpt decodes, zeros without sign."""
    codes = np.tile(np.arange(0x10, 0x100, 0x22, dtype=np.uint8), (0x7F, 1))
    scale = np.arange(0x7F, dtype=np.uint8).reshape(-1, 1)
    tensor = TensorScale(float(np.float32(known["tensor_scale"])), divides=False)
    found = from_nvfp4(maker(), codes, scale, tensor)
    assert digest(np.where(found == 0x8000, 0, found).astype(np.uint16)) == known["values"]


@EACH
def test_a_matrix_of_zeros_can_be_read(maker: Maker) -> None:
    """ModelOpt's zeros alone have the tensor scale 0 and NaN block scales, which nobody reads; ours have 1.0."""
    case = GOLDEN["zeros_alone"]
    assert array(case | {"shape": [1]}, "tensor_scale", np.float32) == 0
    assert (array(case, "scale", np.uint8) & 0x7F == fp4.NAN_E4M3).all()
    tensor = tensor_scale(0.0, divides=False)
    codes, scale, _ = to_nvfp4(maker(), array(case, "weights", np.uint16), tensor)
    assert tensor == (1.0, False)
    assert scale.tolist() == [[0x38]]
    assert not from_nvfp4(maker(), codes, scale, tensor).any()
