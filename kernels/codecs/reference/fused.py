"""From FP8 to INT4 and from INT4 to FP8 in plain torch: what fused codecs are held to, two steps through BF16."""

from __future__ import annotations

from torch import Tensor

from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.grids import Grid
from k2quant.kernels.codecs.reference.fp8 import bf16_to_fp8, fp8_to_bf16
from k2quant.kernels.codecs.reference.int4 import bf16_to_int4, int4_to_bf16


def fp8_to_int4(codes: Tensor, scale: Tensor, block: tuple[int, int], grid: Grid) -> tuple[Tensor, Tensor, Figures]:
    """Encode FP8 as INT4 through BF16."""
    return bf16_to_int4(fp8_to_bf16(codes, scale, block), grid)


def int4_to_fp8(packed: Tensor, scale: Tensor, group: int, block: tuple[int, int]) -> tuple[Tensor, Tensor, Figures]:
    """Encode INT4 as FP8 through BF16."""
    return bf16_to_fp8(int4_to_bf16(packed, scale, group), block)
