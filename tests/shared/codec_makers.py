"""The codecs of every device, for tests that hold all of them to one rule, and FP4 for them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from k2quant.kernels.codecs import cpu
from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.fp4 import MXFP4_BLOCK, NVFP4_BLOCK, TensorScale
from k2quant.kernels.codecs.reference.seam import torch_codecs
from k2quant.kernels.codecs.seam import Codecs
from k2quant.kernels.codecs.values import F32, U8, U16, float_to_bf16

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_gpu() -> Codecs:
    """Return the Triton codecs, interpreted where there is no GPU."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs Triton")
    from k2quant.kernels.codecs.gpu.seam import cuda_codecs

    return cuda_codecs(DEVICE)


MAKERS: dict[str, Callable[[], Codecs]] = {
    "cpu": lambda: cpu.CODECS,
    "torch": lambda: torch_codecs(DEVICE),
    "triton": on_gpu,
}
EACH = pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
_SWIFT = {name: maker for name, maker in MAKERS.items() if name != "triton" or DEVICE == "cuda"}
SWIFT = pytest.mark.parametrize("maker", _SWIFT.values(), ids=_SWIFT)
"""For all of something: Triton takes part where there is a GPU, for its interpreter takes seconds."""


FINITE = np.concatenate([np.arange(0x7F80, dtype=np.uint16), np.arange(0x8000, 0xFF80, dtype=np.uint16)])
"""All BF16 numbers that are finite, as bits."""


def gaussian(rows: int = 6, columns: int = 96, seed: int = 0, sigma: float = 0.02) -> U16:
    """Return BF16 bits of Gaussian weights."""
    return float_to_bf16(np.random.default_rng(seed).standard_normal((rows, columns), np.float32) * np.float32(sigma))


def uneven(rows: int = 6, columns: int = 96, seed: int = 0, bottom: int = -30) -> U16:
    """Return BF16 bits of weights of blocks far apart: one by the other 2^bottom to 1, some of zeros of both signs."""
    generator = np.random.default_rng(seed)
    steps = np.exp2(generator.integers(bottom, 1, (rows, columns // 16))).repeat(16, 1)
    values = generator.standard_normal((rows, columns)) * steps
    values[generator.random((rows, columns)) < 0.1] = -0.0
    values[0, :32] = 0
    return float_to_bf16(values.astype(np.float32))


def bf16(bits: U16) -> Tensor:
    """Return BF16 bits as a tensor."""
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16)).view(torch.bfloat16)


def bits(tensor: Tensor) -> NDArray[Any]:
    """Return the bits of a tensor of BF16, or of one byte or four an element."""
    found = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    array = tensor.detach().contiguous().view(found).numpy()
    return array.view(np.uint16) if array.dtype == np.int16 else array


def to_nvfp4(codecs: Codecs, weights: U16, tensor: TensorScale) -> tuple[U8, U8, Figures]:
    """Return codes, block scales and figures of the plain rule."""
    codes, scale = room(weights, NVFP4_BLOCK)
    return codes, scale, codecs.nvfp4.encode(weights, tensor, codes, scale)


def nvfp4_at(codecs: Codecs, weights: U16, scale: U8, tensor: TensorScale) -> U8:
    """Return codes at block scales that are given."""
    codes, _ = room(weights, NVFP4_BLOCK)
    codecs.nvfp4.store(weights, scale, tensor, codes)
    return codes


def from_nvfp4(codecs: Codecs, codes: U8, scale: U8, tensor: TensorScale) -> U16:
    """Return the BF16 bits of codes."""
    out = np.empty((codes.shape[0], codes.shape[1] * 2), np.uint16)
    codecs.nvfp4.decode(codes, scale, tensor, out)
    return out


def to_mxfp4(codecs: Codecs, weights: U16) -> tuple[U8, U8, Figures]:
    """Return codes, scales and figures of the plain rule."""
    codes, scale = room(weights, MXFP4_BLOCK)
    return codes, scale, codecs.mxfp4.encode(weights, codes, scale)


def mxfp4_at(codecs: Codecs, weights: U16, scale: U8) -> U8:
    """Return codes at scales that are given."""
    codes, _ = room(weights, MXFP4_BLOCK)
    codecs.mxfp4.store(weights, scale, codes)
    return codes


def from_mxfp4(codecs: Codecs, codes: U8, scale: U8) -> U16:
    """Return the BF16 bits of codes."""
    out = np.empty((codes.shape[0], codes.shape[1] * 2), np.uint16)
    codecs.mxfp4.decode(codes, scale, out)
    return out


def searched_nvfp4(
    codecs: Codecs, weights: U16, tensor: TensorScale, importance: F32 | None = None, mean: F32 | None = None
) -> U8:
    """Return the block scales that a search takes."""
    _, scale = room(weights, NVFP4_BLOCK)
    codecs.nvfp4.search(weights, importance, tensor, scale, mean=mean)
    return scale


def searched_mxfp4(codecs: Codecs, weights: U16, importance: F32 | None = None, mean: F32 | None = None) -> U8:
    """Return the scales that a search takes."""
    _, scale = room(weights, MXFP4_BLOCK)
    codecs.mxfp4.search(weights, importance, scale, mean=mean)
    return scale


def room(weights: U16, block: int) -> tuple[U8, U8]:
    """Return arrays for codes and scales."""
    rows, columns = weights.shape
    return np.full((rows, columns // 2), 0xEE, np.uint8), np.full((rows, columns // block), 0xEE, np.uint8)
