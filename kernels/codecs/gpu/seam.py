"""The codecs of the seam on a GPU: what `--device cuda` uses.

A panel is copied to the device, one kernel makes of it what is asked for, and the outcome is copied back. The kernels
report in a flag that they met a bad value; which one it was is then searched on the CPU, see `values`. Rounding from
float32 and float16 is left to torch, and so are choosing scales of FP8 and INT4 without codes, storing at scales that
are given, and FP4's search, its error and the closed form: the reference does them on the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from k2quant.kernels.codecs import values as explain
from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.fp4 import TensorScale
from k2quant.kernels.codecs.gpu import fp4, fp8, int4, search
from k2quant.kernels.codecs.gpu.figures import compare, figures_of
from k2quant.kernels.codecs.grids import Grid
from k2quant.kernels.codecs.reference.seam import (
    OnDevice,
    TorchFloats,
    TorchFp8,
    TorchInt4,
    TorchMxfp4,
    TorchNvfp4,
    copy_bits,
)
from k2quant.kernels.codecs.scales.search import check_importance, check_mean
from k2quant.kernels.codecs.seam import Codecs
from k2quant.kernels.codecs.values import F32, I32, U8, U16, ValueAt


def cuda_codecs(device: str) -> Codecs:
    """Return the codecs of a GPU; on the CPU, and slowly, if Triton interprets its kernels."""
    pairs = CudaFused(device)
    return Codecs(
        floats=CudaFloats(device),
        fp8=CudaFp8(device),
        int4=CudaInt4(device),
        nvfp4=CudaNvfp4(device),
        mxfp4=CudaMxfp4(device),
        fused={("fp8", "int4"): pairs.fp8_to_int4, ("int4", "fp8"): pairs.int4_to_fp8},
    )


class CudaFloats(TorchFloats):
    """`seam.FloatCodec`."""

    def compare(self, before: U16, after: U16) -> Figures:
        """Return the figures of `after` against the truth `before`."""
        bad = _flag(self)
        totals = compare(self.bf16(before), self.bf16(after), bad=bad)
        _refuse(bad, lambda: explain.bad_weight(before if explain.has_infinity(before) else after))
        return figures_of(before.size, totals)


class CudaFp8(TorchFp8):
    """`seam.Fp8Codec`; `choose` and `store` are those of the reference."""

    def decode(self, codes: U8, scale: F32, block: tuple[int, int], out: U16) -> None:
        """Multiply each block of codes by its scale."""
        bad = _flag(self)
        weights = fp8.fp8_to_bf16(self.e4m3(codes), self.tensor(scale), block, bad=bad)
        _refuse(bad, lambda: explain.bad_fp8(codes, scale, block))
        copy_bits(weights, out)

    def encode(self, weights: U16, block: tuple[int, int], codes: U8, scale: F32) -> Figures:
        """Recover or compute each block's scale, then round to e4m3."""
        bad = _flag(self)
        found = fp8.bf16_to_fp8(self.bf16(weights), block, figures=True, bad=bad)
        _refuse(bad, lambda: explain.bad_weight(weights))
        return _filled(found, codes, scale)


class CudaInt4(TorchInt4):
    """`seam.Int4Codec`; `choose` and `store` are those of the reference."""

    def decode(self, packed: I32, scale: F32, group: int, out: U16) -> None:
        """Multiply each group of codes by its scale."""
        bad = _flag(self)
        weights = int4.int4_to_bf16(self.tensor(packed), self.tensor(scale), group, bad=bad)
        _refuse(bad, lambda: explain.bad_int4(packed, scale, group))
        copy_bits(weights, out)

    def encode(
        self, weights: U16, grid: Grid, packed: I32, scale: U16, *, recover: bool = True, bits: int = 4
    ) -> Figures:
        """Recover or compute each group's scale, then round to INT4."""
        bad = _flag(self)
        found = int4.bf16_to_int4(self.bf16(weights), grid, recover=recover, bits=bits, figures=True, bad=bad)
        _refuse(bad, lambda: explain.bad_group(weights, bits))
        return _filled(found, packed, scale)

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
        bad, known = _flag(self), self._moments(importance, mean, weights.shape[1])
        found = search.search_int4_scales(self.bf16(weights), *known, recover=recover, bits=bits, bad=bad)
        _refuse(bad, lambda: explain.bad_weight(weights))
        copy_bits(found, scale)

    def weighted_error(
        self, weights: U16, scale: U16, importance: F32 | None, *, mean: F32 | None = None, bits: int = 4
    ) -> float:
        """Return what rounding at these scales loses, each column weighed; the device sums rows, the CPU adds them."""
        bad, known = _flag(self), self._moments(importance, mean, weights.shape[1])
        sums = search.weighted_errors(self.bf16(weights), self.bf16(scale), *known, bits=bits, bad=bad)
        if bad.item():  # the reference says what it is
            return super().weighted_error(weights, scale, importance, mean=mean, bits=bits)
        return math.fsum(sums.tolist())

    def _moments(self, importance: F32 | None, mean: F32 | None, columns: int) -> tuple[Tensor | None, Tensor | None]:
        """Copy what is known of the columns, once it has been looked at."""
        if mean is not None:
            check_mean(mean, importance, columns)
        if importance is not None:
            check_importance(importance, columns)
        heavy, moved = (None if part is None else self.tensor(part) for part in (importance, mean))
        return heavy, moved


class CudaNvfp4(TorchNvfp4):
    """`seam.Nvfp4Codec`; what a kernel finds bad, the reference says in words."""

    def decode(self, codes: U8, scale: U8, tensor: TensorScale, out: U16) -> None:
        """Multiply each block of codes by its scale in use."""
        bad, form = _flag(self), self._form(tensor)
        weights = fp4.nvfp4_to_bf16(self.tensor(codes), self.tensor(scale), **form, bad=bad)
        if bad.item():
            super().decode(codes, scale, tensor, out)
        else:
            copy_bits(weights, out)

    def choose(self, weights: U16, tensor: TensorScale, scale: U8) -> None:
        """Compute each block's scale."""
        bad = _flag(self)
        found = fp4.nvfp4_scales(self.bf16(weights), **self._form(tensor), bad=bad)
        if bad.item():
            super().choose(weights, tensor, scale)
        else:
            copy_bits(found, scale)

    def store(self, weights: U16, scale: U8, tensor: TensorScale, codes: U8) -> Figures:
        """Round to codes at the block scales that are given."""
        bad, form = _flag(self), self._form(tensor)
        found = fp4.bf16_to_nvfp4_at(self.bf16(weights), self.tensor(scale), **form, figures=True, bad=bad)
        return super().store(weights, scale, tensor, codes) if bad.item() else _stored(found, codes)

    def encode(self, weights: U16, tensor: TensorScale, codes: U8, scale: U8) -> Figures:
        """Compute each block's scale, then round to codes."""
        bad = _flag(self)
        found = fp4.bf16_to_nvfp4(self.bf16(weights), **self._form(tensor), figures=True, bad=bad)
        return super().encode(weights, tensor, codes, scale) if bad.item() else _filled(found, codes, scale)


class CudaMxfp4(TorchMxfp4):
    """`seam.Mxfp4Codec`; what a kernel finds bad, the reference says in words."""

    def decode(self, codes: U8, scale: U8, out: U16) -> None:
        """Multiply each block of codes by its power of two."""
        bad = _flag(self)
        weights = fp4.mxfp4_to_bf16(self.tensor(codes), self.tensor(scale), bad=bad)
        if bad.item():
            super().decode(codes, scale, out)
        else:
            copy_bits(weights, out)

    def choose(self, weights: U16, scale: U8) -> None:
        """Compute each block's scale."""
        bad = _flag(self)
        found = fp4.mxfp4_scales(self.bf16(weights), bad=bad)
        if bad.item():
            super().choose(weights, scale)
        else:
            copy_bits(found, scale)

    def store(self, weights: U16, scale: U8, codes: U8) -> Figures:
        """Round to codes at the scales that are given."""
        bad = _flag(self)
        found = fp4.bf16_to_mxfp4_at(self.bf16(weights), self.tensor(scale), figures=True, bad=bad)
        return super().store(weights, scale, codes) if bad.item() else _stored(found, codes)

    def encode(self, weights: U16, codes: U8, scale: U8) -> Figures:
        """Compute each block's scale, then round to codes."""
        bad = _flag(self)
        found = fp4.bf16_to_mxfp4(self.bf16(weights), figures=True, bad=bad)
        return super().encode(weights, codes, scale) if bad.item() else _filled(found, codes, scale)


class CudaFused(OnDevice):
    """The `fused` pairs of `seam.Codecs`, each in one kernel."""

    def fp8_to_int4(
        self, codes: U8, scale_in: F32, block: tuple[int, int], grid: Grid, packed: I32, scale_out: U16
    ) -> Figures:
        """Decode FP8, then encode INT4."""
        bad = _flag(self)
        found = int4.fp8_to_int4(self.e4m3(codes), self.tensor(scale_in), block, grid, figures=True, bad=bad)
        _refuse(bad, lambda: self._bad_fp8_or_group(codes, scale_in, block))
        return _filled(found, packed, scale_out)

    def int4_to_fp8(
        self, packed: I32, scale_in: F32, group: int, block: tuple[int, int], codes: U8, scale_out: F32
    ) -> Figures:
        """Decode INT4, then encode FP8."""
        bad = _flag(self)
        found = fp8.int4_to_fp8(self.tensor(packed), self.tensor(scale_in), group, block, figures=True, bad=bad)
        _refuse(bad, lambda: explain.bad_int4(packed, scale_in, group))
        return _filled(found, codes, scale_out)

    def _bad_fp8_or_group(self, codes: U8, scale: F32, block: tuple[int, int]) -> ValueAt:
        """Explain what the first of the two steps refused, else the second."""
        pivot = np.empty(codes.shape, np.uint16)
        CudaFp8(str(self.device)).decode(codes, scale, block, pivot)
        return explain.bad_group(pivot)


def _flag(codec: OnDevice) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=codec.device)


def _refuse(bad: Tensor, search: Callable[[], ValueAt]) -> None:
    """Raise what the search finds if the flag is set."""
    if bad.item():
        raise search()


def _stored(found: tuple[Tensor, Tensor | None], codes: U8) -> Figures:
    copy_bits(found[0], codes)
    assert found[1] is not None  # noqa: S101 - the callers ask for figures
    return figures_of(2 * codes.size, found[1])


def _filled(found: tuple[Tensor, Tensor, Tensor | None], codes: I32 | U8, scale: U8 | U16 | F32) -> Figures:
    values, scales, totals = found
    copy_bits(values, codes)
    copy_bits(scales, scale)
    assert totals is not None  # noqa: S101 - the callers ask for figures
    return figures_of(_WEIGHTS[values.dtype, scales.dtype] * values.numel(), totals)


_WEIGHTS = {(torch.int32, torch.bfloat16): 8, (torch.float8_e4m3fn, torch.float32): 1, (torch.uint8, torch.uint8): 2}
"""How many weights a code stands for, by the dtypes of codes and scales."""
