"""The seam between the arithmetic and everything above it: one set of codecs for each device, all with the same bits.

Arrays are C-contiguous numpy arrays; inputs may be read-only views of mapped files; outputs are written into arrays
that the caller owns. R are rows, K columns. BF16 is uint16 bits `[R, K]`. FP8 is uint8 e4m3fn codes `[R, K]` with
float32 scales `[ceil(R/block[0]), ceil(K/block[1])]`. INT4 is int32 words `[R, K/8]`, lowest column in the lowest
nibble, nibble = code + 8. A scale of INT4 goes in as float32 `[R, K/group]`, and comes out as BF16 bits `[R, K/32]`.

Work is cut into panels: ranges of rows, multiples of a block's height. Codecs release the GIL and start no threads.
A bad value raises `values.ValueAt`, rows and columns counted within the arrays given; what was written by then is void.
A scale is bad when it is NaN, infinite or has a sign bit, -0 included.
"""

from __future__ import annotations

from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.grids import Grid
from k2quant.kernels.codecs.values import F32, I32, U8, U16


class Codecs(Protocol):
    """The codecs of one device."""

    def float_to_bf16(self, values: F32 | NDArray[np.float16], out: U16) -> None:
        """Round to BF16, half to even; what is or would become NaN or infinite is an error."""

    def fp8_to_bf16(self, codes: U8, scale: F32, block: tuple[int, int], out: U16) -> None:
        """Write bf16(fp32(code) * scale), the product rounded to float32 first; a scale of zero is valid."""

    def int4_to_bf16(self, packed: I32, scale: F32, group: int, out: U16) -> None:
        """Write bf16(code * scale) for codes -8..7; any `group` that divides K. Code 0 gives +0."""

    def bf16_to_fp8(self, weights: U16, block: tuple[int, int], codes: U8, scale: F32) -> Figures:
        """Encode each block; -0 keeps its sign.

        A block whose weights are all bf16(code * scale) for one scale gets the one of such scales that is nearest to
        amax/448, and so loses nothing. Any other block gets scale = amax/448 and codes = w/scale, in float32, rounded
        half to even and saturated at +-448. A block of zeros gets the scale 1.
        """

    def bf16_to_int4(
        self, weights: U16, grid: Grid, packed: I32, scale: U16, *, recover: bool = True, bits: int = 4
    ) -> Figures:
        """Encode each group of 32 columns; K is a multiple of 32.

        moonshot: the first scale of `recovery.CANDIDATES` that gives all weights of the group, if `recover`; else
        bf16(amax/7), codes -7..7. compressed-tensors: bf16(amax/7.5), codes -8..7, the quotient rounded to BF16; it
        knows no recovery.

        With 3 or 2 bits, on the moonshot grid alone, the scale is bf16(amax/3) or bf16(amax) and codes in the nibbles
        are -3..3 or -1..1. `recover` has no effect; what the plain rule made comes back by the plain rule.
        """

    def fp8_to_int4(
        self, codes: U8, scale_in: F32, block: tuple[int, int], grid: Grid, packed: I32, scale_out: U16
    ) -> Figures:
        """Give the bits and figures of `fp8_to_bf16` and `bf16_to_int4`, with no more than a row as BF16."""

    def int4_to_fp8(
        self, packed: I32, scale_in: F32, group: int, block: tuple[int, int], codes: U8, scale_out: F32
    ) -> Figures:
        """Give the bits and figures of `int4_to_bf16` and `bf16_to_fp8`, with no more than a block as BF16."""

    def compare(self, before: U16, after: U16) -> Figures:
        """Return the figures of `after` against the truth `before`."""


def codecs(device: str) -> Codecs:
    """Return the codecs of "cpu", or of "cuda" or "cuda:N".

    Raises:
        UsageError: there is no such device here.
    """
    if device == "cpu":
        from k2quant.kernels.codecs import cpu as codecs_cpu

        return cast("Codecs", codecs_cpu)
    return _cuda(device)


def _cuda(device: str) -> Codecs:
    from k2quant.kernels.devices.gpus import check_cuda, has_triton

    check_cuda(device, known="cpu, cuda or cuda:N", remedy="; use --device cpu")
    if has_triton():
        from k2quant.kernels.codecs.gpu.seam import CudaCodecs

        return CudaCodecs(device)
    from k2quant.kernels.codecs.reference.seam import TorchCodecs

    return TorchCodecs(device)  # the reference: torch alone, the same bits, more slowly
