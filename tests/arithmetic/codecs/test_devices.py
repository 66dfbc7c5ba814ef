"""The codecs of the seam: the same bits from the fast CPU ones, from the torch reference, and on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from k2quant.errors import UsageError
from k2quant.kernels.codecs.choice import codecs
from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.grids import Grid
from k2quant.kernels.codecs.reference.seam import TorchFp8, torch_codecs
from k2quant.kernels.codecs.seam import Codecs
from k2quant.kernels.codecs.values import U16, ValueAt, bf16_to_float, float_to_bf16
from k2quant.kernels.devices import gpus

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
BLOCKS = pytest.mark.parametrize("block", [(128, 128), (1, 128), (24, 40)], ids=str)
KINDS = ["gaussian", "subnormal", "any", "few", "fp8", "int4", "neighbours"]


@pytest.fixture
def other(device: str) -> Codecs:
    """Return the reference's codecs on the CPU, or what a conversion uses on a GPU."""
    if device == "cpu":
        return torch_codecs(device)
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return codecs(device)


def weights(kind: str, shape: tuple[int, int] = (192, 352)) -> U16:
    """Return BF16 bits of one kind, drawn afresh from the same seed."""
    generator = np.random.default_rng(7)
    sign = generator.integers(0, 2, shape, np.uint16) << np.uint16(15)
    if kind == "gaussian":
        return float_to_bf16(generator.standard_normal(shape, np.float32) * np.float32(0.02))
    if kind == "fp8":
        codes = generator.integers(0, 0x7F, shape, np.uint8)
        scale = generator.random((shape[0], -(-shape[1] // 128)), np.float32)
        out = np.empty(shape, np.uint16)
        codecs("cpu").fp8.decode(codes, scale, (1, 128), out)
        return out | sign
    if kind == "int4":
        packed = generator.integers(-(2**31), 2**31, (shape[0], shape[1] // 8)).astype(np.int32)
        out = np.empty(shape, np.uint16)
        codecs("cpu").int4.decode(packed, generator.random((shape[0], shape[1] // 32), np.float32), 32, out)
        return out
    if kind == "neighbours":  # a largest weight, and two next to each other that may have one code
        out = np.zeros(shape, np.uint16)
        out[:, ::128] = generator.integers(0x3F80, 0x4000, out[:, ::128].shape)
        out[:, 1::128] = generator.integers(0x3C00, 0x3F80, out[:, 1::128].shape)
        out[:, 2::128] = out[:, 1::128] + generator.integers(0, 3, out[:, 2::128].shape, np.uint16)
        return out | sign
    sign |= generator.integers(0, {"subnormal": 0x300, "any": 0x7E00, "few": 4}[kind], shape, np.uint16)
    return sign


def agree(one: Codecs, two: Codecs, job: Callable[..., Figures | None], *outs: NDArray[Any]) -> list[NDArray[Any]]:
    """Run a job on both, compare every output bit and the figures, and return the outputs."""
    results = []
    for each in (one, two):
        arrays = [np.empty_like(out) for out in outs]
        results.append((arrays, job(each, *arrays)))
    (arrays, figures), (others, expected) = results
    for array, reference in zip(arrays, others, strict=True):
        assert array.tobytes() == reference.tobytes()
    if figures and expected:
        for name in ("count", "changed", "worst"):
            assert getattr(figures, name) == getattr(expected, name)
        assert figures.energy == pytest.approx(expected.energy, rel=1e-12)
        assert figures.error == pytest.approx(expected.error, rel=1e-12)
    return arrays


@DEVICES
@BLOCKS
@pytest.mark.parametrize("kind", KINDS)
def test_fp8_codecs_agree_with_the_reference(other: Codecs, block: tuple[int, int], kind: str) -> None:
    """Rule 5: encoding to FP8, decoding and encoding again give the reference's bits."""
    bits, cpu = weights(kind), codecs("cpu")
    scale = np.empty((-(-bits.shape[0] // block[0]), -(-bits.shape[1] // block[1])), np.float32)
    codes = np.empty(bits.shape, np.uint8)
    codes, scale = agree(cpu, other, lambda c, q, s: c.fp8.encode(bits, block, q, s), codes, scale)
    (pivot,) = agree(cpu, other, lambda c, out: c.fp8.decode(codes, scale, block, out), bits)
    agree(cpu, other, lambda c, q, s: c.fp8.encode(pivot, block, q, s), codes, scale)
    agree(cpu, other, lambda c: c.floats.compare(bits, pivot))
    packed, scales = np.empty((bits.shape[0], bits.shape[1] // 8), np.int32), bits[:, ::32].copy()
    agree(cpu, other, lambda c, q, s: c.fused["fp8", "int4"](codes, scale, block, "moonshot", q, s), packed, scales)


@DEVICES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("grid", "recover"), [("moonshot", True), ("moonshot", False), ("compressed-tensors", True)], ids=str
)
def test_int4_codecs_agree_with_the_reference(other: Codecs, kind: str, grid: Grid, *, recover: bool) -> None:
    """Rule 5: encoding to INT4, decoding, and going on to FP8 give the reference's bits."""
    bits, cpu = weights(kind), codecs("cpu")
    packed, scale = np.empty((bits.shape[0], bits.shape[1] // 8), np.int32), bits[:, ::32].copy()
    packed, scale = agree(cpu, other, lambda c, q, s: c.int4.encode(bits, grid, q, s, recover=recover), packed, scale)
    wide = bf16_to_float(scale)
    agree(cpu, other, lambda c, out: c.int4.decode(packed, wide, 32, out), bits)
    scale8, codes = np.empty((2, 3), np.float32), np.empty(bits.shape, np.uint8)
    agree(cpu, other, lambda c, q, s: c.fused["int4", "fp8"](packed, wide, 32, (128, 128), q, s), codes, scale8)


@DEVICES
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_rounding_to_bfloat16_agrees_with_the_reference(other: Codecs, dtype: type[np.float32 | np.float16]) -> None:
    """Rule 1: float32 and float16 values give the reference's bits."""
    values = np.random.default_rng(0).standard_normal((64, 100)).astype(dtype)
    agree(codecs("cpu"), other, lambda c, out: c.floats.to_bf16(values, out), np.empty(values.shape, np.uint16))


@DEVICES
def test_bad_values_read_the_same_everywhere(other: Codecs) -> None:
    """Rule 6: both raise the same sentence for a NaN code, a bad scale, an infinite weight and an overflow."""
    codes, out = np.zeros((2, 32), np.uint8), np.empty((2, 32), np.uint16)
    codes[1, 3] = 0x7F
    bits = np.zeros((2, 32), np.uint16)
    bits[1, 5] = 0xFF80
    packed, scale = np.empty((2, 4), np.int32), np.empty((2, 1), np.uint16)
    largest = np.full((2, 32), 0x7F7F, np.uint16)
    largest[:, 0] = 1
    words = np.zeros((2, 4), np.int32)
    jobs: list[Callable[[Codecs], object]] = [
        lambda c: c.fp8.decode(codes, np.ones((1, 1), np.float32), (128, 128), out),
        lambda c: c.fp8.decode(codes, np.full((1, 1), -1, np.float32), (128, 128), out),
        lambda c: c.int4.decode(words, np.full((2, 1), 1e38, np.float32), 32, out),
        lambda c: c.int4.decode(words, np.full((2, 1), np.nan, np.float32), 32, out),
        lambda c: c.int4.encode(bits, "moonshot", packed, scale),
        lambda c: c.int4.encode(largest, "moonshot", packed, scale),
        lambda c: c.fp8.encode(bits, (128, 128), codes, np.empty((1, 1), np.float32)),
        lambda c: c.floats.to_bf16(np.full((1, 32), np.inf, np.float32), out[:1]),
        lambda c: c.floats.compare(bits, bits),
    ]
    for job in jobs:
        sentences = []
        for each in (codecs("cpu"), other):
            with pytest.raises(ValueAt) as caught:
                job(each)
            sentences.append(str(caught.value))
        assert sentences[0] == sentences[1]


def test_without_triton_a_gpu_runs_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule 5: where Triton is not installed, `--device cuda` still works, with the codecs that need torch alone."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(gpus, "has_triton", gpus.has_triton.__wrapped__)  # not what it remembers
    assert type(codecs("cuda").fp8) is TorchFp8


def test_an_unknown_or_missing_device_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rule 5: a device that is not here is named, with what to do."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"`cuda:1` is not available: .* use `device=cpu`"):
        codecs("cuda:1")
    for unknown in ("tpu", "cuda:", "cuda:x", "cpu:0"):
        with pytest.raises(UsageError, match="expected cpu, cuda or cuda:N"):
            codecs(unknown)
