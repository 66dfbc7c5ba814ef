"""Rule 7 where the columns' means are known: columns err against each other, and the reference has the CPU's bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from k2quant.errors import UsageError
from k2quant.kernels import ops
from k2quant.kernels.codecs import cpu
from k2quant.kernels.codecs.grids import PACKED_BITS
from k2quant.kernels.codecs.reference.seam import torch_codecs
from k2quant.kernels.codecs.values import F32, U16, bf16_to_float, float_to_bf16

EACH = (cpu.CODECS, torch_codecs("cpu"))


def made(seed: int, rows: int = 3, columns: int = 64) -> tuple[U16, F32, F32]:
    """Return weights, means and mean squares of inputs that vary by about as much as their means."""
    generator = np.random.default_rng(seed)
    mean = generator.standard_normal(columns, np.float32)
    return (
        float_to_bf16(generator.standard_normal((rows, columns), np.float32)),
        mean,
        mean**2 + generator.random(columns, np.float32),
    )


def searched(weights: U16, importance: F32, mean: F32 | None, bits: int = 4) -> U16:
    """Return the scales that the CPU chooses."""
    scale = np.zeros((len(weights), weights.shape[1] // 32), np.uint16)
    cpu.int4.search(weights, importance, scale, mean=mean, bits=bits)
    return scale


@pytest.mark.parametrize("bits", PACKED_BITS)
@given(seed=st.integers(0, 2**32 - 1), large=st.integers(-30, 30), heavy=st.integers(-15, 15))
@settings(max_examples=20, deadline=None)
def test_reference_and_cpu_have_equal_bits(bits: int, seed: int, large: int, heavy: int) -> None:
    """Whatever the magnitudes of weights and means, both choose the same scales and find the same error."""
    weights, mean, importance = made(seed)
    weights = float_to_bf16(bf16_to_float(weights) * np.float32(10.0**large))
    mean, importance = mean * np.float32(10.0**heavy), importance * np.float32(100.0**heavy)
    scales = [np.zeros((3, 2), np.uint16) for _ in EACH]
    for codecs, scale in zip(EACH, scales, strict=True):
        codecs.int4.search(weights, importance, scale, mean=mean, bits=bits)
    assert scales[0].tolist() == scales[1].tolist()
    errors = [each.int4.weighted_error(weights, scales[0], importance, mean=mean, bits=bits) for each in EACH]
    assert errors[0] == errors[1]


def test_what_never_varies_loses_what_its_output_is_shifted_by() -> None:
    """Where every input is always its mean, a row loses exactly the square of (w - w') . mean, over all its columns."""
    weights, mean, _ = made(0)
    scale = searched(weights, np.square(mean), mean)
    packed, decoded = np.zeros((3, 8), np.int32), np.zeros_like(weights)
    cpu.int4.store(weights, scale, "moonshot", packed)
    cpu.int4.decode(packed, bf16_to_float(scale), 32, decoded)
    lost = (bf16_to_float(weights) - bf16_to_float(decoded)).astype(np.float64) @ mean
    error = cpu.int4.weighted_error(weights, scale, np.square(mean), mean=mean)
    assert error == pytest.approx(float((lost**2).sum()), rel=1e-5)


def test_a_group_has_the_least_expected_error() -> None:
    """With means, the expected error of single groups falls below that of a search without them, and never rises."""
    weights, mean, importance = made(1, rows=256, columns=32)
    found = [searched(weights, importance, known) for known in (mean, None)]
    errors = [
        np.array(
            [
                cpu.int4.weighted_error(row[None], scale[None], importance, mean=mean)
                for row, scale in zip(weights, each, strict=True)
            ]
        )
        for each in found
    ]
    assert (errors[0] <= errors[1] * (1 + 1e-6)).all()
    assert errors[0].sum() < 0.95 * errors[1].sum()


def test_means_of_zero_change_nothing() -> None:
    """A mean of zeros is none: the same scales, the same error."""
    weights, mean, importance = made(2)
    plain, zeros = searched(weights, importance, None), searched(weights, importance, np.zeros_like(mean))
    assert plain.tolist() == zeros.tolist()
    judged = {cpu.int4.weighted_error(weights, plain, importance, mean=known) for known in (None, np.zeros_like(mean))}
    assert len(judged) == 1


def test_the_operator_takes_means() -> None:
    """`search_int4_scales` gives the codec's scales, and its fake kernel knows their shape."""
    weights, mean, importance = made(3)
    tensors = (torch.from_numpy(weights).view(torch.bfloat16), torch.from_numpy(importance), torch.from_numpy(mean))
    found = ops.search_int4_scales(*tensors)
    assert found.view(torch.uint16).numpy().tolist() == searched(weights, importance, mean).tolist()
    torch.library.opcheck(torch.ops.k2quant.search_int4_scales, (*tensors[:2], True, 4, tensors[2]))


@pytest.mark.parametrize(
    ("mean", "message"),
    [
        (np.zeros(32, np.float32), "mean: expected float32 .64., one for each column, found float32 .32."),
        (np.full(64, np.nan, np.float32), "mean: expected finite numbers, found nan at column 0"),
    ],
)
def test_what_is_no_mean_is_refused(mean: F32, message: str) -> None:
    """A mean of another length or with a NaN is refused by both codecs and both functions."""
    weights, _, importance = made(4)
    for codecs in EACH:
        with pytest.raises(UsageError, match=message):
            codecs.int4.search(weights, importance, np.zeros((3, 2), np.uint16), mean=mean)
        with pytest.raises(UsageError, match=message):
            codecs.int4.weighted_error(weights, np.full((3, 2), 0x3F80, np.uint16), importance, mean=mean)


def test_a_mean_stands_beside_an_importance() -> None:
    """A mean alone says nothing of how far a column varies."""
    weights, mean, _ = made(5)
    with pytest.raises(UsageError, match="mean: expected only beside an importance"):
        cpu.int4.search(weights, None, np.zeros((3, 2), np.uint16), mean=mean)
