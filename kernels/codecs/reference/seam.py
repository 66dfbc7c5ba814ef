"""The codecs of the seam, run by the reference on a torch device: what `--device cuda` uses where there is no Triton.

Arrays come and go as numpy arrays of bits. A call holds a handful of float32 and int64 copies of its arrays on the
device, so its memory is bounded by the panels that the caller cuts.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from k2quant.kernels.codecs import reference
from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.grids import Grid
from k2quant.kernels.codecs.values import F32, I32, U8, U16


class TorchCodecs:
    """`seam.Codecs` on one torch device."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def float_to_bf16(self, values: F32 | NDArray[np.float16], out: U16) -> None:
        """Round to BF16, half to even."""
        store(reference.float_to_bf16(self._tensor(values)), out)

    def fp8_to_bf16(self, codes: U8, scale: F32, block: tuple[int, int], out: U16) -> None:
        """Multiply each block of codes by its scale."""
        store(reference.fp8_to_bf16(self._fp8(codes), self._tensor(scale), block), out)

    def int4_to_bf16(self, packed: I32, scale: F32, group: int, out: U16) -> None:
        """Multiply each group of codes by its scale."""
        store(reference.int4_to_bf16(self._tensor(packed), self._tensor(scale), group), out)

    def bf16_to_fp8(self, weights: U16, block: tuple[int, int], codes: U8, scale: F32) -> Figures:
        """Recover or compute each block's scale, then round to e4m3."""
        return _store_all(reference.bf16_to_fp8(self._bf16(weights), block), codes, scale)

    def bf16_to_int4(
        self, weights: U16, grid: Grid, packed: I32, scale: U16, *, recover: bool = True, bits: int = 4
    ) -> Figures:
        """Recover or compute each group's scale, then round to INT4."""
        return _store_all(reference.bf16_to_int4(self._bf16(weights), grid, recover=recover, bits=bits), packed, scale)

    def fp8_to_int4(
        self, codes: U8, scale_in: F32, block: tuple[int, int], grid: Grid, packed: I32, scale_out: U16
    ) -> Figures:
        """Do `fp8_to_bf16`, then `bf16_to_int4`."""
        outcome = reference.fp8_to_int4(self._fp8(codes), self._tensor(scale_in), block, grid)
        return _store_all(outcome, packed, scale_out)

    def int4_to_fp8(
        self, packed: I32, scale_in: F32, group: int, block: tuple[int, int], codes: U8, scale_out: F32
    ) -> Figures:
        """Do `int4_to_bf16`, then `bf16_to_fp8`."""
        outcome = reference.int4_to_fp8(self._tensor(packed), self._tensor(scale_in), group, block)
        return _store_all(outcome, codes, scale_out)

    def compare(self, before: U16, after: U16) -> Figures:
        """Return the figures of `after` against the truth `before`."""
        return reference.compare(self._bf16(before), self._bf16(after))

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        # torch warns about read-only memory, so the copy is made first.
        return torch.from_numpy(array.copy()).to(self.device)

    def _bf16(self, bits: U16) -> Tensor:
        return self._tensor(bits.view(np.int16)).view(torch.bfloat16)

    def _fp8(self, codes: U8) -> Tensor:
        return self._tensor(codes).view(torch.float8_e4m3fn)


def store(tensor: Tensor, out: NDArray[Any]) -> None:
    """Copy a tensor's bits to an array of the same item size."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    out.view(f"i{out.itemsize}" if out.itemsize > 1 else "u1")[...] = tensor.contiguous().view(bits).cpu().numpy()


def _store_all(outcome: tuple[Tensor, Tensor, Figures], codes: NDArray[Any], scale: NDArray[Any]) -> Figures:
    store(outcome[0], codes)
    store(outcome[1], scale)
    return outcome[2]
