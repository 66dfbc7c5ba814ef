"""The codecs of the seam, run by the reference on a torch device: what `--device cuda` uses where there is no Triton.

Arrays come and go as numpy arrays of bits. A call holds a handful of float32 and int64 copies of its arrays on the
device, so its memory is bounded by the panels that the caller cuts.
"""

from __future__ import annotations

from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from k2quant.kernels.codecs import reference
from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.fp4 import TensorScale
from k2quant.kernels.codecs.grids import Grid
from k2quant.kernels.codecs.seam import Codecs
from k2quant.kernels.codecs.values import F32, I32, U8, U16


def torch_codecs(device: str) -> Codecs:
    """Return the codecs of a torch device."""
    pairs = TorchFused(device)
    return Codecs(
        floats=TorchFloats(device),
        fp8=TorchFp8(device),
        int4=TorchInt4(device),
        nvfp4=TorchNvfp4(device),
        mxfp4=TorchMxfp4(device),
        fused={("fp8", "int4"): pairs.fp8_to_int4, ("int4", "fp8"): pairs.int4_to_fp8},
    )


class OnDevice:
    """What the codecs of a device share: arrays of bits as tensors there."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def tensor(self, array: NDArray[Any]) -> Tensor:
        """Copy an array of numbers."""
        # torch warns about read-only memory, so the copy is made first.
        return torch.from_numpy(array.copy()).to(self.device)

    def bf16(self, bits: U16) -> Tensor:
        """Copy BF16 bits."""
        return self.tensor(bits.view(np.int16)).view(torch.bfloat16)

    def e4m3(self, codes: U8) -> Tensor:
        """Copy FP8 codes."""
        return self.tensor(codes).view(torch.float8_e4m3fn)


class TorchFloats(OnDevice):
    """`seam.FloatCodec`."""

    def to_bf16(self, values: F32 | NDArray[np.float16], out: U16) -> None:
        """Round to BF16, half to even."""
        copy_bits(reference.float_to_bf16(self.tensor(values)), out)

    def compare(self, before: U16, after: U16) -> Figures:
        """Return the figures of `after` against the truth `before`."""
        return reference.compare(self.bf16(before), self.bf16(after))


class TorchFp8(OnDevice):
    """`seam.Fp8Codec`."""

    def decode(self, codes: U8, scale: F32, block: tuple[int, int], out: U16) -> None:
        """Multiply each block of codes by its scale."""
        copy_bits(reference.fp8_to_bf16(self.e4m3(codes), self.tensor(scale), block), out)

    def encode(self, weights: U16, block: tuple[int, int], codes: U8, scale: F32) -> Figures:
        """Recover or compute each block's scale, then round to e4m3."""
        return _filled(reference.bf16_to_fp8(self.bf16(weights), block), codes, scale)

    def choose(self, weights: U16, block: tuple[int, int], scale: F32) -> None:
        """Recover or compute each block's scale."""
        copy_bits(reference.fp8_scales(self.bf16(weights), block), scale)

    def store(self, weights: U16, scale: F32, block: tuple[int, int], codes: U8) -> Figures:
        """Round to e4m3 at the scales that are given."""
        found, figures = reference.bf16_to_fp8_at(self.bf16(weights), self.tensor(scale), block)
        copy_bits(found, codes)
        return figures


class TorchInt4(OnDevice):
    """`seam.Int4Codec`."""

    def decode(self, packed: I32, scale: F32, group: int, out: U16) -> None:
        """Multiply each group of codes by its scale."""
        copy_bits(reference.int4_to_bf16(self.tensor(packed), self.tensor(scale), group), out)

    def encode(
        self, weights: U16, grid: Grid, packed: I32, scale: U16, *, recover: bool = True, bits: int = 4
    ) -> Figures:
        """Recover or compute each group's scale, then round to INT4."""
        return _filled(reference.bf16_to_int4(self.bf16(weights), grid, recover=recover, bits=bits), packed, scale)

    def choose(self, weights: U16, grid: Grid, scale: U16, *, recover: bool = True, bits: int = 4) -> None:
        """Recover or compute each group's scale."""
        copy_bits(reference.int4_scales(self.bf16(weights), grid, recover=recover, bits=bits), scale)

    def store(self, weights: U16, scale: U16, grid: Grid, packed: I32, *, bits: int = 4) -> Figures:
        """Round to INT4 at the scales that are given."""
        found, figures = reference.bf16_to_int4_at(self.bf16(weights), self.bf16(scale), grid, bits)
        copy_bits(found, packed)
        return figures

    def search(
        self,
        weights: U16,
        importance: F32 | None,
        scale: U16,
        *,
        mean: F32 | None = None,
        bits: int = 4,
        recover: bool = True,
    ) -> None:
        """Choose the scale of least error for each group."""
        heavy, shift = (None if part is None else self.tensor(part) for part in (importance, mean))
        found = reference.searched_int4_scales(self.bf16(weights), heavy, shift, recover=recover, bits=bits)
        copy_bits(found, scale)

    def weighted_error(
        self, weights: U16, scale: U16, importance: F32 | None, *, mean: F32 | None = None, bits: int = 4
    ) -> float:
        """Return what rounding at these scales loses, each column weighed."""
        heavy, shift = (None if part is None else self.tensor(part) for part in (importance, mean))
        return reference.weighted_int4_error(self.bf16(weights), self.bf16(scale), heavy, bits, shift)


class TorchNvfp4(OnDevice):
    """`seam.Nvfp4Codec`."""

    def decode(self, codes: U8, scale: U8, tensor: TensorScale, out: U16) -> None:
        """Multiply each block of codes by its scale in use."""
        copy_bits(reference.nvfp4_to_bf16(self.tensor(codes), self.tensor(scale), **self._form(tensor)), out)

    def amax(self, weights: U16) -> float:
        """Return the largest magnitude."""
        return reference.largest(self.bf16(weights))

    def choose(self, weights: U16, tensor: TensorScale, scale: U8) -> None:
        """Compute each block's scale."""
        copy_bits(reference.nvfp4_scales(self.bf16(weights), **self._form(tensor)), scale)

    def store(self, weights: U16, scale: U8, tensor: TensorScale, codes: U8) -> Figures:
        """Round to codes at the block scales that are given."""
        found, figures = reference.bf16_to_nvfp4_at(self.bf16(weights), self.tensor(scale), **self._form(tensor))
        copy_bits(found, codes)
        return figures

    def encode(self, weights: U16, tensor: TensorScale, codes: U8, scale: U8) -> Figures:
        """Compute each block's scale, then round to codes."""
        return _filled(reference.bf16_to_nvfp4(self.bf16(weights), **self._form(tensor)), codes, scale)

    def search(
        self, weights: U16, importance: F32 | None, tensor: TensorScale, scale: U8, *, mean: F32 | None = None
    ) -> None:
        """Choose the scale of least error for each block."""
        heavy, shift = (None if part is None else self.tensor(part) for part in (importance, mean))
        found = reference.searched_nvfp4_scales(self.bf16(weights), heavy, mean=shift, **self._form(tensor))
        copy_bits(found, scale)

    def weighted_error(
        self, weights: U16, scale: U8, tensor: TensorScale, importance: F32 | None, *, mean: F32 | None = None
    ) -> float:
        """Return what rounding at these scales loses, each column weighed."""
        heavy, shift = (None if part is None else self.tensor(part) for part in (importance, mean))
        form = self._form(tensor)
        return reference.weighted_nvfp4_error(
            self.bf16(weights), self.tensor(scale), importance=heavy, mean=shift, **form
        )

    def restate(self, codes_in: U8, scale_in: U8, exponent: int, tensor: TensorScale, codes: U8, scale: U8) -> int:
        """Write MXFP4 as NVFP4 at a tensor scale that means 2^exponent."""
        given = self.tensor(codes_in), self.tensor(scale_in)
        *found, rounded = reference.restated_nvfp4(*given, exponent, empty=tensor.empty)
        for part, out in zip(found, (codes, scale), strict=True):
            copy_bits(part, out)
        return rounded

    def _form(self, tensor: TensorScale) -> _Form:
        return {
            "tensor": torch.tensor(tensor.value, dtype=torch.float32, device=self.device),
            "divides": tensor.divides,
        }


class _Form(TypedDict):
    """A tensor scale, as the reference takes it."""

    tensor: Tensor
    divides: bool


class TorchMxfp4(OnDevice):
    """`seam.Mxfp4Codec`."""

    def decode(self, codes: U8, scale: U8, out: U16) -> None:
        """Multiply each block of codes by its power of two."""
        copy_bits(reference.mxfp4_to_bf16(self.tensor(codes), self.tensor(scale)), out)

    def choose(self, weights: U16, scale: U8) -> None:
        """Compute each block's scale."""
        copy_bits(reference.mxfp4_scales(self.bf16(weights)), scale)

    def store(self, weights: U16, scale: U8, codes: U8) -> Figures:
        """Round to codes at the scales that are given."""
        found, figures = reference.bf16_to_mxfp4_at(self.bf16(weights), self.tensor(scale))
        copy_bits(found, codes)
        return figures

    def encode(self, weights: U16, codes: U8, scale: U8) -> Figures:
        """Compute each block's scale, then round to codes."""
        return _filled(reference.bf16_to_mxfp4(self.bf16(weights)), codes, scale)

    def search(self, weights: U16, importance: F32 | None, scale: U8, *, mean: F32 | None = None) -> None:
        """Choose the scale of least error for each block."""
        heavy, shift = (None if part is None else self.tensor(part) for part in (importance, mean))
        copy_bits(reference.searched_mxfp4_scales(self.bf16(weights), heavy, shift), scale)

    def weighted_error(self, weights: U16, scale: U8, importance: F32 | None, *, mean: F32 | None = None) -> float:
        """Return what rounding at these scales loses, each column weighed."""
        heavy, shift = (None if part is None else self.tensor(part) for part in (importance, mean))
        return reference.weighted_mxfp4_error(self.bf16(weights), self.tensor(scale), heavy, shift)

    def exponents(self, codes: U8, scale: U8) -> tuple[int, int] | None:
        """Return the least and the largest exponent in use."""
        return reference.mxfp4_exponents(self.tensor(codes), self.tensor(scale))


class TorchFused(OnDevice):
    """The `fused` pairs of `seam.Codecs`."""

    def fp8_to_int4(
        self, codes: U8, scale_in: F32, block: tuple[int, int], grid: Grid, packed: I32, scale_out: U16
    ) -> Figures:
        """Decode FP8, then encode INT4."""
        outcome = reference.fp8_to_int4(self.e4m3(codes), self.tensor(scale_in), block, grid)
        return _filled(outcome, packed, scale_out)

    def int4_to_fp8(
        self, packed: I32, scale_in: F32, group: int, block: tuple[int, int], codes: U8, scale_out: F32
    ) -> Figures:
        """Decode INT4, then encode FP8."""
        outcome = reference.int4_to_fp8(self.tensor(packed), self.tensor(scale_in), group, block)
        return _filled(outcome, codes, scale_out)


def copy_bits(tensor: Tensor, out: NDArray[Any]) -> None:
    """Copy a tensor's bits to an array of the same item size."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    out.view(f"i{out.itemsize}" if out.itemsize > 1 else "u1")[...] = tensor.contiguous().view(bits).cpu().numpy()


def _filled(outcome: tuple[Tensor, Tensor, Figures], codes: NDArray[Any], scale: NDArray[Any]) -> Figures:
    copy_bits(outcome[0], codes)
    copy_bits(outcome[1], scale)
    return outcome[2]
