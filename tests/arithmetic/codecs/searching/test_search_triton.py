"""The search for INT4 scales as Triton kernels: the reference's bits, on a GPU or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from k2quant.errors import UsageError
from k2quant.kernels.codecs.gpu import search
from k2quant.kernels.codecs.gpu.seam import cuda_codecs
from k2quant.kernels.codecs.reference.seam import torch_codecs
from k2quant.kernels.codecs.scales.search import column_moments, column_weights
from k2quant.kernels.codecs.seam import Codecs
from k2quant.kernels.codecs.values import F32, U16, ValueAt, float_to_bf16

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = (12, 160)  # less than a program searches
TALL = (27, 160)  # a little more


def random() -> np.random.Generator:
    """Return the same random numbers for every test."""
    return np.random.default_rng(7)


def drawn(kind: str, shape: tuple[int, int] = SHAPE) -> U16:
    """Return BF16 bits of one kind; the first group is zeros, and the second lies on the grid."""
    wide = random().standard_normal(shape, np.float32) * np.float32(0.02)
    wide[0, :64] = np.linspace(-7, 7, 64).round() * 0.125
    found = float_to_bf16(wide)
    if kind != "gaussian":
        lowest, highest = {"any": (0, 0x7F80), "subnormal": (0, 0x300), "large": (0x7C00, 0x7F80)}[kind]
        found = random().integers(lowest, highest, shape, np.uint16) | (found & np.uint16(0x8000))
    found[0, :32] = 0
    return found


def importance(kind: str) -> F32 | None:
    """Return what columns weigh: nothing, some numbers, or numbers of every size with a group of zeros."""
    if kind == "none":
        return None
    if kind == "some":
        return random().random(SHAPE[1], np.float32)
    found = np.ldexp(random().random(SHAPE[1], np.float32), random().integers(-148, 128, SHAPE[1])).astype(np.float32)
    found[32:64] = 0
    found[64:96] = np.float32(2) ** -149
    return found


def moments(kind: str) -> tuple[F32 | None, F32 | None]:
    """Return what columns weigh, and their means: those of `importance` have none, but these do."""
    if not kind.startswith("means"):
        return importance(kind), None
    mean = random().standard_normal(SHAPE[1], np.float32)
    if kind == "means of every size":
        mean = np.ldexp(mean, random().integers(-148, 58, SHAPE[1])).astype(np.float32)
        mean[32:64] = 0
    square = mean * mean * (random().random(SHAPE[1], np.float32) + np.float32(0.75))  # some less than the mean's
    square[64:96] = np.float32(2) ** -149
    return square, mean


def searched(
    codecs: Codecs,
    weights: U16,
    weighs: F32 | None,
    mean: F32 | None = None,
    *,
    bits: int = 4,
    recover: bool = True,
) -> U16:
    """Return what a search gives, as BF16 bits."""
    scale = np.empty((len(weights), SHAPE[1] // 32), np.uint16)
    codecs.int4.search(weights, weighs, scale, mean=mean, bits=bits, recover=recover)
    return scale


@pytest.mark.parametrize(
    ("kind", "weighs", "bits", "recover"),
    [
        ("tall", "none", 4, True),
        ("gaussian", "some", 4, False),
        ("any", "every size", 4, True),
        ("subnormal", "none", 4, True),
        ("large", "some", 4, False),
        ("any", "none", 3, True),
        ("gaussian", "every size", 2, True),
        ("tall", "means", 4, True),
        ("any", "means of every size", 3, True),
    ],
)
def test_a_search_has_the_bits_of_the_reference(kind: str, weighs: str, bits: int, *, recover: bool) -> None:
    """Rule 7: scales are equal, and so is what they lose, summed in the reference's order to the last bit."""
    weights = drawn("gaussian", TALL) if kind == "tall" else drawn(kind)
    known, mean = moments(weighs)
    ours, truth = cuda_codecs(DEVICE), torch_codecs("cpu")
    found = searched(ours, weights, known, mean, bits=bits, recover=recover)
    np.testing.assert_array_equal(found, searched(truth, weights, known, mean, bits=bits, recover=recover))
    if mean is not None:
        assert (found != searched(truth, weights, known, bits=bits, recover=recover)).any()
    if kind != "large" and weighs != "every size":
        errors = [each.int4.weighted_error(weights, found, known, mean=mean, bits=bits).hex() for each in (ours, truth)]
        assert errors[0] == errors[1]


def test_a_search_finds_what_plain_rounding_does_not() -> None:
    """Most groups of random weights get a lesser scale; the one on the grid keeps its own."""
    weights, codecs = drawn("gaussian"), cuda_codecs(DEVICE)
    found, plain = searched(codecs, weights, None), np.empty((SHAPE[0], SHAPE[1] // 32), np.uint16)
    codecs.int4.choose(weights, "moonshot", plain)
    assert (found <= plain).all()
    assert (found < plain).mean() > 0.5
    assert found[0, 1] == plain[0, 1]
    assert codecs.int4.weighted_error(weights, found, None) < codecs.int4.weighted_error(weights, plain, None)


def test_scales_that_are_given_may_be_any() -> None:
    """An error is judged at scales far too large and far too small, as storing would divide."""
    weights, known = drawn("gaussian"), importance("some")
    scale = float_to_bf16(np.ldexp(np.float32(0.7), random().integers(-130, 120, (SHAPE[0], 5))).astype(np.float32))
    ours = cuda_codecs(DEVICE).int4.weighted_error(weights, scale, known)
    assert ours == torch_codecs("cpu").int4.weighted_error(weights, scale, known) > 0


@pytest.mark.parametrize("kind", ["some", "every size"])
def test_columns_weigh_what_they_weigh_on_the_cpu(kind: str) -> None:
    """Powers of two are taken off exactly, of subnormal and of the largest numbers too, and zeros stay."""
    known = importance(kind)
    assert known is not None
    found = search.column_weights(torch.from_numpy(known).to(DEVICE), len(known)).cpu().numpy()
    assert found.tobytes() == column_weights(known, len(known)).tobytes()


@pytest.mark.parametrize("kind", ["means", "means of every size"])
def test_columns_vary_as_they_do_on_the_cpu(kind: str) -> None:
    """A variance is never negative, and powers of four and of two are taken off exactly."""
    known, mean = moments(kind)
    assert known is not None
    assert mean is not None
    given = [torch.from_numpy(part).to(DEVICE) for part in (known, mean)]
    found = search.column_moments(given[0], given[1], len(mean))
    for ours, truth in zip(found, column_moments(known, mean, len(mean)), strict=True):
        assert ours.cpu().numpy().tobytes() == truth.tobytes()
    assert (found[0] == 0).sum() > 32  # a group of zeros, and columns that never vary


def test_what_is_not_finite_spreads_instead_of_passing_unseen() -> None:
    """Where nobody reads a flag, a group with a bad weight or a bad importance gets the scale NaN, and no other."""
    bits = drawn("gaussian")
    bits[3, 40] = 0x7F80
    weights, known = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).to(DEVICE), torch.ones(160)
    for column, value in ((70, float("nan")), (100, -1.0), (130, float("inf"))):
        known[column] = value
    found = search.search_int4_scales(weights, known.to(DEVICE)).isnan().cpu()
    assert found[:, 2:].all()
    assert found[:, :2].nonzero().tolist() == [[3, 1]]
    mean = torch.zeros(160)
    mean[5], known[100] = float("-inf"), 1.0
    found = search.search_int4_scales(weights, known.to(DEVICE), mean.to(DEVICE)).isnan().cpu()
    assert found[1].tolist() == [True, False, True, False, True]


JOBS: dict[str, Callable[[Codecs, U16, F32, U16], object]] = {
    "an infinite weight": lambda c, w, i, _: searched(c, w | np.uint16(0x7F80), i),
    "a weight of NaN, judged": lambda c, w, i, s: c.int4.weighted_error(w | np.uint16(0x7FC0), s, i),
    "a scale of zero": lambda c, w, i, s: c.int4.weighted_error(w, s * np.uint16(0), i),
    "a negative scale": lambda c, w, i, s: c.int4.weighted_error(w, s | np.uint16(0x8000), i),
    "a scale of NaN": lambda c, w, i, s: c.int4.weighted_error(w, s | np.uint16(0x7FC0), i),
    "a product beyond BF16": lambda c, w, i, s: c.int4.weighted_error(w | np.uint16(0x7F00), s | np.uint16(0x7F00), i),
    "a negative importance": lambda c, w, i, _: searched(c, w, -i),
    "too few, judged": lambda c, w, i, s: c.int4.weighted_error(w, s, i[:96]),
    "a mean of NaN": lambda c, w, i, _: searched(c, w, i, i * np.float32(np.nan)),
    "a mean alone, judged": lambda c, w, i, s: c.int4.weighted_error(w, s, None, mean=i),
    "a scale of zero, with means": lambda c, w, i, s: c.int4.weighted_error(w, s * np.uint16(0), i, mean=i),
}


@pytest.mark.parametrize("name", JOBS)
def test_what_is_refused_is_refused_in_the_same_words(name: str) -> None:
    """Rule 6: an error of a GPU is the reference's sentence."""
    weights, known = drawn("gaussian"), importance("some")
    assert known is not None
    scale, said = np.full((SHAPE[0], 5), 0x3C00, np.uint16), []
    for codecs in (torch_codecs("cpu"), cuda_codecs(DEVICE)):
        with pytest.raises((ValueAt, UsageError)) as caught:
            JOBS[name](codecs, weights, known, scale)
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_an_importance_that_does_not_fit_is_refused_unread() -> None:
    """Its length and dtype are checked before a kernel runs; a width that there is not is refused too."""
    weights = torch.zeros(2, 64, dtype=torch.bfloat16, device=DEVICE)
    with pytest.raises(UsageError, match=r"importance: expected float32 \[64\], .* found float64 \[64\]"):
        search.search_int4_scales(weights, torch.ones(64, dtype=torch.float64, device=DEVICE))
    with pytest.raises(UsageError, match=r"found float32 \[32\]"):
        search.search_int4_scales(weights, torch.ones(32, device=DEVICE))
    with pytest.raises(UsageError, match=r"mean: expected float32 \[64\], .* found float32 \[32\]"):
        search.search_int4_scales(weights, torch.ones(64, device=DEVICE), torch.ones(32, device=DEVICE))
    with pytest.raises(UsageError, match="mean: expected only beside an importance"):
        search.search_int4_scales(weights, None, torch.ones(64, device=DEVICE))
    with pytest.raises(UsageError, match="bits: expected 4 or 3 or 2, found 8"):
        search.search_int4_scales(weights, None, bits=8)
    assert search.search_int4_scales(weights, None).tolist() == [[2.0**-7] * 2] * 2  # of zeros
