"""NVFP4 and MXFP4 of its layout are, byte for byte, what compressed-tensors writes and reads."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from compressed_tensors.compressors.mx_utils import compress_mx_scale
from compressed_tensors.compressors.mxfp4 import MXFP4PackedCompressor
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import Tensor

from codec_makers import (
    FINITE,
    SWIFT,
    bf16,
    bits,
    from_mxfp4,
    from_nvfp4,
    gaussian,
    mxfp4_at,
    nvfp4_at,
    to_mxfp4,
    to_nvfp4,
    uneven,
)
from k2quant.kernels.codecs import fp4
from k2quant.kernels.codecs.cpu import CODECS
from k2quant.kernels.codecs.fp4 import TensorScale, tensor_scale
from k2quant.kernels.codecs.ops import nvfp4_tensor_scale
from k2quant.kernels.codecs.seam import Codecs
from k2quant.kernels.codecs.values import U8, U16, bf16_to_float

MAGNITUDES = np.arange(0x7F80, dtype=np.uint16)
NVFP4 = QuantizationArgs(
    num_bits=4,
    type="float",
    strategy="tensor_group",
    group_size=16,
    symmetric=True,
    dynamic=False,
    scale_dtype=torch.float8_e4m3fn,
)
MXFP4 = QuantizationArgs(
    num_bits=4,
    type="float",
    strategy="group",
    group_size=32,
    symmetric=True,
    dynamic=False,
    scale_dtype=torch.uint8,
)


def own_scales(weights: Tensor, args: QuantizationArgs, global_scale: Tensor | None = None) -> Tensor:
    """Return the scales that an observer of minimum and maximum computes for BF16 weights."""
    blocks = weights.unflatten(1, (-1, args.group_size))
    scale: Tensor = calculate_qparams(blocks.amin(2), blocks.amax(2), args, global_scale)[0]
    return scale


def written(weights: Tensor, args: QuantizationArgs, global_scale: Tensor | None = None) -> tuple[U8, U8]:
    """Return codes and scales as compressed-tensors writes them, at its own scales."""
    return stored(weights, own_scales(weights, args, global_scale), args, global_scale)


def stored(weights: Tensor, scale: Tensor, args: QuantizationArgs, global_scale: Tensor | None) -> tuple[U8, U8]:
    """Return codes and scales as compressed-tensors writes them, at scales that are numbers."""
    compressor = MXFP4PackedCompressor if global_scale is None else NVFP4PackedCompressor
    state = {"weight": weights, "weight_scale": scale}
    if global_scale is not None:
        state["weight_global_scale"] = global_scale
    found = compressor.compress(state, QuantizationScheme(targets=["Linear"], weights=args))
    return found["weight_packed"].numpy(), bits(found["weight_scale"])


def read(codes: U8, scale: Tensor, args: QuantizationArgs, global_scale: Tensor | None = None) -> U16:
    """Return the BF16 bits that compressed-tensors decodes."""
    compressor = MXFP4PackedCompressor if global_scale is None else NVFP4PackedCompressor
    state = {"weight_packed": torch.from_numpy(codes), "weight_scale": scale}
    if global_scale is not None:
        state["weight_global_scale"] = global_scale
    return bits(compressor.decompress(state, QuantizationScheme(targets=["Linear"], weights=args))["weight"])


def one(tensor: TensorScale) -> Tensor:
    """Return a tensor scale as the file has it."""
    return torch.tensor([tensor.value], dtype=torch.float32)


def test_tensor_scales() -> None:
    """For BF16 amaxes, every mantissa among them, a tensor scale that divides is what `generate_gparam` returns."""
    some = MAGNITUDES[np.r_[0:700:7, 0x3F80:0x4080, 0x7F00:0x7F80]]
    amax = bf16(some)
    theirs = [float(generate_gparam(-one, one)) for one in amax.split(1)]
    assert [tensor_scale(float(one), divides=True).value for one in amax] == theirs
    assert [float(nvfp4_tensor_scale(one.float(), divides=True)) for one in amax] == theirs


@SWIFT
def test_the_block_scale_of_every_largest_weight(maker: Callable[[], Codecs]) -> None:
    """For every BF16 amax, and tensor scales far apart, a block's scale is the observer's, 0.125 for zero included."""
    for value in (1.0, 732.0, 3.1e-5, 2.0**40, 1.7e38):
        weights = np.zeros((len(MAGNITUDES), 16), np.uint16)
        weights[:, 3] = MAGNITUDES
        scale = np.empty((len(weights), 1), np.uint8)
        tensor = TensorScale(float(np.float32(value)), divides=True)
        maker().nvfp4.choose(weights, tensor, scale)
        expected = own_scales(bf16(weights), NVFP4, one(tensor)).to(torch.float8_e4m3fn)
        assert np.array_equal(scale, bits(expected))


def test_weights_as_nvfp4() -> None:
    """Matrices at their own tensor scale and at one of larger weights: codes and scales are those of the other."""
    for weights in (gaussian(), uneven(), uneven(bottom=-5, seed=1), gaussian(sigma=1e37)):
        for factor in (1.0, 2.5):
            tensor = tensor_scale(CODECS.nvfp4.amax(weights) * factor, divides=True)
            codes, scale, _ = to_nvfp4(CODECS, weights, tensor)
            theirs = written(bf16(weights), NVFP4, one(tensor))
            assert np.array_equal(codes, theirs[0])
            assert np.array_equal(scale, theirs[1])


@SWIFT
def test_every_weight_at_some_block_scales(maker: Callable[[], Codecs]) -> None:
    """All finite BF16 numbers are rounded to the codes of compressed-tensors, ties and zeros of both signs included."""
    weights = FINITE.reshape(-1, 16)
    for bits_of_scale, value in ((0x38, 1.0), (0x7E, 732.0), (0x01, 2.0**-20), (0x35, 1.7e-10)):
        tensor = TensorScale(float(np.float32(value)), divides=True)
        scale = np.full((len(weights), 1), bits_of_scale, np.uint8)
        factor = fp4.block_scales(scale, tensor)[0, 0]
        fits = (np.abs(bf16_to_float(weights)) < 3.3e38).all(1) & bool(6 * factor < 3.3e38)
        number = torch.from_numpy(fp4.e4m3_to_float(scale[fits]))
        theirs, _ = stored(bf16(weights[fits]), number, NVFP4, one(tensor))
        assert np.array_equal(nvfp4_at(maker(), weights[fits], scale[fits], tensor), theirs)


@SWIFT
def test_every_code_at_every_block_scale(maker: Callable[[], Codecs]) -> None:
    """The 16 codes at the 127 block scales that are numbers mean what compressed-tensors decodes, -0 included."""
    codes = np.tile(np.arange(0x10, 0x100, 0x22, dtype=np.uint8), (0x7F, 1))
    assert sorted(fp4.nibbles(codes)[0].tolist()) == list(range(16))
    scale = np.arange(0x7F, dtype=np.uint8).reshape(-1, 1)
    for value in (1.0, 732.0, 0.0031, 2.0**-20, 1.7e-10, 2.0**120):
        tensor = TensorScale(float(np.float32(value)), divides=True)
        theirs = read(codes, torch.from_numpy(scale).view(torch.float8_e4m3fn), NVFP4, one(tensor))
        assert np.array_equal(from_nvfp4(maker(), codes, scale, tensor), theirs)


@SWIFT
def test_the_mxfp4_scale_of_every_largest_weight(maker: Callable[[], Codecs]) -> None:
    """For every BF16 amax a block's byte is the observer's; but from 1.75 * 2^127 on that is infinite, and ours not."""
    weights = np.zeros((len(MAGNITUDES), 32), np.uint16)
    weights[:, 20] = MAGNITUDES
    scale = np.empty((len(weights), 1), np.uint8)
    maker().mxfp4.choose(weights, scale)
    theirs = own_scales(bf16(weights), MXFP4)
    beyond = MAGNITUDES >= 0x7F60
    assert theirs[torch.from_numpy(beyond)].isinf().all()
    assert (scale[beyond] == 253).all()
    assert np.array_equal(scale[~beyond], compress_mx_scale(theirs, torch.uint8)[~torch.from_numpy(beyond)])


def test_weights_as_mxfp4() -> None:
    """Matrices without -0: codes and scales are those of compressed-tensors."""
    for given in (gaussian(), uneven(), uneven(bottom=-120, seed=1), gaussian(sigma=1e37)):
        weights = np.where(given == 0x8000, 0, given).astype(np.uint16)
        codes, scale, _ = to_mxfp4(CODECS, weights)
        theirs = written(bf16(weights), MXFP4)
        assert np.array_equal(codes, theirs[0])
        assert np.array_equal(scale, theirs[1])


@SWIFT
def test_every_weight_at_some_mxfp4_scales(maker: Callable[[], Codecs]) -> None:
    """All finite BF16 numbers at scales: the codes of compressed-tensors, but for -0 and what its quotient makes -0."""
    weights = FINITE.reshape(-1, 32)
    for byte in (0, 1, 120, 127, 140, 250):
        fits = np.full(len(weights), 6.0 * 2.0 ** (byte - 127) < 3.3e38)
        scale = np.full((len(weights), 1), byte, np.uint8)
        number = torch.full((len(weights), 1), 2.0 ** (byte - 127), dtype=torch.bfloat16)
        theirs, _ = stored(bf16(weights[fits]), number, MXFP4, None)
        ours, expected = fp4.nibbles(mxfp4_at(maker(), weights, scale)), fp4.nibbles(theirs)
        differ = ours != expected
        assert (ours[differ] == 8).all()
        assert (expected[differ] == 0).all()
        quotient = np.ldexp(bf16_to_float(weights)[differ].astype(np.float64), 127 - byte)
        assert differ[weights == 0x8000].all()
        assert (np.abs(quotient) <= 2.0**-134).all()


@SWIFT
def test_every_code_at_every_mxfp4_scale(maker: Callable[[], Codecs]) -> None:
    """The 16 codes at the 255 scales that are numbers mean what compressed-tensors decodes, where BF16 holds it."""
    codes = np.tile(np.arange(0x10, 0x100, 0x22, dtype=np.uint8), (255, 2))
    scale = np.arange(255, dtype=np.uint8).reshape(-1, 1)
    good = scale[:, 0] <= 252
    theirs = read(codes[good], torch.from_numpy(scale[good]), MXFP4)
    ours = from_mxfp4(maker(), codes[good], scale[good])
    assert np.array_equal(ours, theirs)
    exact = bf16_to_float(ours)[:, 1:16:2]
    assert all(math.ldexp(6.0, int(byte) - 127) in row for byte, row in zip(scale[good, 0], np.abs(exact), strict=True))
