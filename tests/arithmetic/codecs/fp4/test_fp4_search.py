"""The search for FP4 scales, held to plain Python block by block, and to the plain rule, which is never better."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codec_makers import (
    EACH,
    from_mxfp4,
    from_nvfp4,
    gaussian,
    mxfp4_at,
    nvfp4_at,
    searched_mxfp4,
    searched_nvfp4,
    to_mxfp4,
    to_nvfp4,
    uneven,
)
from k2quant.errors import UsageError
from k2quant.kernels.codecs import fp4
from k2quant.kernels.codecs.cpu import CODECS
from k2quant.kernels.codecs.fp4 import TensorScale, tensor_scale
from k2quant.kernels.codecs.scales.fp4 import MXFP4_STEPS, NVFP4_STEPS
from k2quant.kernels.codecs.seam import Codecs
from k2quant.kernels.codecs.values import F32, F64, U8, U16, bf16_to_float, float_to_bf16

Maker = Callable[[], Codecs]
COLUMNS = 64


def columns(seed: int = 1) -> tuple[F32, F32]:
    """Return importances far apart, some zero, and means whose squares they are not below."""
    generator = np.random.default_rng(seed)
    importance = np.exp(2 * generator.standard_normal(COLUMNS)).astype(np.float32)
    importance[generator.random(COLUMNS) < 0.1] = 0
    return importance, (np.sqrt(importance) * generator.uniform(-1, 1, COLUMNS)).astype(np.float32)


def lost(weights: U16, values: U16, importance: F32 | None, mean: F32 | None, block: int) -> F64:
    """Return the error of each block in float64, as the rule says it."""
    difference = (bf16_to_float(weights).astype(np.float64) - bf16_to_float(values)).reshape(len(weights), -1, block)
    heavy = np.ones(COLUMNS) if importance is None else importance.astype(np.float64)
    shift = np.zeros(COLUMNS) if mean is None else mean.astype(np.float64)
    if mean is not None:
        heavy = np.maximum(heavy - shift**2, 0)
    found: F64 = (difference**2 * heavy.reshape(-1, block)).sum(2) + (difference * shift.reshape(-1, block)).sum(2) ** 2
    return found


def nvfp4_errors(weights: U16, scale: U8, tensor: TensorScale, known: tuple[F32 | None, F32 | None]) -> F64:
    """Return the error of each block at its scale."""
    values = from_nvfp4(CODECS, nvfp4_at(CODECS, weights, scale, tensor), scale, tensor)
    return lost(weights, values, *known, fp4.NVFP4_BLOCK)


def mxfp4_errors(weights: U16, scale: U8, known: tuple[F32 | None, F32 | None]) -> F64:
    """Return the error of each block at its scale."""
    values = from_mxfp4(CODECS, mxfp4_at(CODECS, weights, scale), scale)
    return lost(weights, values, *known, fp4.MXFP4_BLOCK)


@pytest.mark.parametrize("divides", [False, True], ids=["multiplies", "divides"])
@pytest.mark.parametrize("kind", ["alike", "importance", "mean"])
def test_no_neighbour_errs_less(kind: str, *, divides: bool) -> None:
    """Of all the scales that the rule names, each in turn, none has a lesser error; and only they are taken."""
    importance, mean = columns()
    known = (None if kind == "alike" else importance, mean if kind == "mean" else None)
    weights = np.concatenate([gaussian(16, COLUMNS), uneven(6, COLUMNS, bottom=-14)])
    tensor = tensor_scale(CODECS.nvfp4.amax(weights), divides=divides)
    _, plain, _ = to_nvfp4(CODECS, weights, tensor)
    chosen = searched_nvfp4(CODECS, weights, tensor, *known)
    errors = nvfp4_errors(weights, chosen, tensor, known)
    taken = chosen == plain
    for step in NVFP4_STEPS:
        trial = np.clip(plain.astype(int) + step, 1, 126).astype(np.uint8)
        assert (errors <= nvfp4_errors(weights, trial, tensor, known) * (1 + 1e-6)).all()
        taken |= chosen == trial
    assert taken[plain != tensor.empty].all()
    assert (chosen != plain).any()


@pytest.mark.parametrize("kind", ["alike", "importance", "mean"])
def test_no_neighbour_of_mxfp4_errs_less(kind: str) -> None:
    """The same of MXFP4: half the scale and twice it."""
    importance, mean = columns()
    known = (None if kind == "alike" else importance, mean if kind == "mean" else None)
    weights = np.concatenate([gaussian(64, COLUMNS), uneven(6, COLUMNS)])
    _, plain, _ = to_mxfp4(CODECS, weights)
    chosen = searched_mxfp4(CODECS, weights, *known)
    errors = mxfp4_errors(weights, chosen, known)
    for step in MXFP4_STEPS:
        trial = np.clip(plain.astype(int) + step, 0, 254).astype(np.uint8)
        assert (errors <= mxfp4_errors(weights, trial, known) * (1 + 1e-6)).all()
    assert set((chosen.astype(int) - plain).reshape(-1).tolist()) <= {-1, 0, 1}
    assert (chosen != plain).any()


@EACH
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), divides=st.booleans(), kind=st.sampled_from(["alike", "importance", "mean"]))
def test_devices_find_the_same(maker: Maker, *, seed: int, divides: bool, kind: str) -> None:
    """Scales and weighted errors are the bits of the CPU's, whatever the weights, importances and means."""
    importance, mean = columns(seed)
    known = (None if kind == "alike" else importance, mean if kind == "mean" else None)
    weights = uneven(5, COLUMNS, seed, -18)  # blocks whose scale is 2^-9 or rounds to zero among them
    tensor = tensor_scale(CODECS.nvfp4.amax(weights), divides=divides)
    scale = searched_nvfp4(maker(), weights, tensor, *known)
    assert np.array_equal(scale, searched_nvfp4(CODECS, weights, tensor, *known))
    heavy, shift = known
    error = maker().nvfp4.weighted_error(weights, scale, tensor, heavy, mean=shift)
    assert error == CODECS.nvfp4.weighted_error(weights, scale, tensor, heavy, mean=shift)
    scale = searched_mxfp4(maker(), weights, *known)
    assert np.array_equal(scale, searched_mxfp4(CODECS, weights, *known))
    error = maker().mxfp4.weighted_error(weights, scale, heavy, mean=shift)
    assert error == CODECS.mxfp4.weighted_error(weights, scale, heavy, mean=shift)


def test_weighted_errors() -> None:
    """They are the sums of the rule; a mean's square is of a whole row's sum, not of a block's."""
    importance, mean = columns()
    weights = gaussian(5, COLUMNS)
    tensor = tensor_scale(CODECS.nvfp4.amax(weights), divides=False)
    codes, scale, figures = to_nvfp4(CODECS, weights, tensor)
    assert CODECS.nvfp4.weighted_error(weights, scale, tensor, None) == pytest.approx(figures.error, rel=1e-12)
    values = from_nvfp4(CODECS, codes, scale, tensor)
    for heavy, shift in ((importance, None), (importance, mean)):
        expected = lost(weights, values, heavy, shift, COLUMNS).sum()
        found = CODECS.nvfp4.weighted_error(weights, scale, tensor, heavy, mean=shift)
        assert found == pytest.approx(expected, rel=1e-6)
    codes, scale, figures = to_mxfp4(CODECS, weights)
    assert CODECS.mxfp4.weighted_error(weights, scale, None) == pytest.approx(figures.error, rel=1e-12)
    expected = lost(weights, from_mxfp4(CODECS, codes, scale), importance, mean, COLUMNS).sum()
    assert CODECS.mxfp4.weighted_error(weights, scale, importance, mean=mean) == pytest.approx(expected, rel=1e-6)


@EACH
def test_what_keeps_the_plain_scale(maker: Maker) -> None:
    """Zeros, columns that weigh nothing, the tiniest and the largest blocks, and blocks that lose nothing already."""
    weights = gaussian(5, COLUMNS)
    weights[0], weights[1] = 0, float_to_bf16(bf16_to_float(gaussian(1, COLUMNS)[0]) * np.float32(1e-36))
    weights[3] = np.tile(float_to_bf16(np.array(fp4.E2M1, np.float32)), COLUMNS // 8)
    weights[4] = np.tile(float_to_bf16(np.array([2.0**126, -1.5 * 2.0**125], np.float32)), COLUMNS // 2)
    tensor = TensorScale(2.0**-3, divides=False)
    importance = np.ones(COLUMNS, np.float32)
    importance[:32] = 0
    for heavy in (None, importance):
        found = searched_nvfp4(maker(), weights[:4], tensor, heavy), searched_mxfp4(maker(), weights, heavy)
        plain = to_nvfp4(CODECS, weights[:4], tensor)[1], to_mxfp4(CODECS, weights)[1]
        for row in (0, 1, 3):
            assert np.array_equal(found[0][row], plain[0][row])
            assert np.array_equal(found[1][row], plain[1][row])
        assert np.array_equal(found[1][4], plain[1][4])
        if heavy is not None:
            assert np.array_equal(found[0][:, :2], plain[0][:, :2])
            assert np.array_equal(found[1][:, :1], plain[1][:, :1])
    assert not np.array_equal(searched_nvfp4(maker(), weights[:4], tensor)[2], plain[0][2])


def test_what_is_no_importance() -> None:
    """NaN, infinity and negative numbers, another length, and a mean alone, are mistakes that are named."""
    weights = gaussian(2, COLUMNS)
    good = np.ones(COLUMNS, np.float32)
    bad = [(good[:-1], "one for each column"), *((good * number, "finite numbers") for number in (np.nan, -1, np.inf))]
    acts = [searched_mxfp4, lambda codecs, bits, *known: searched_nvfp4(codecs, bits, TensorScale(1.0, False), *known)]
    for act, (importance, said) in itertools.product(acts, bad):
        with pytest.raises(UsageError, match=f"importance: expected .*{said}"):
            act(CODECS, weights, importance.astype(np.float32))
    for act in acts:
        with pytest.raises(UsageError, match="mean: expected only beside an importance"):
            act(CODECS, weights, None, good)
    with pytest.raises(UsageError, match="importance: expected"):
        CODECS.nvfp4.weighted_error(
            weights, to_nvfp4(CODECS, weights, TensorScale(1.0, False))[1], TensorScale(1.0, False), -good
        )
