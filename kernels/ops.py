"""Everything of the kernels that other code calls.

weight = prepare_int4(weight_packed, weight_scale)
y = int4_linear(x, weight)
"""

from __future__ import annotations

from k2quant.kernels.codecs.ops import (
    bf16_to_fp8,
    bf16_to_int4,
    fake_quantize_fp8,
    fake_quantize_int4,
    fp8_to_bf16,
    fp8_to_int4,
    int4_to_bf16,
    int4_to_fp8,
)
from k2quant.kernels.products.linear import fp8_linear, fp8_linear_w8a8, int4_linear
from k2quant.kernels.products.moe import moe_fp8, moe_int4
from k2quant.kernels.products.warmup import warmup
from k2quant.kernels.products.weights import Fp8Weight, Int4Weight, prepare_fp8, prepare_int4

__all__ = [
    "Fp8Weight",
    "Int4Weight",
    "bf16_to_fp8",
    "bf16_to_int4",
    "fake_quantize_fp8",
    "fake_quantize_int4",
    "fp8_linear",
    "fp8_linear_w8a8",
    "fp8_to_bf16",
    "fp8_to_int4",
    "int4_linear",
    "int4_to_bf16",
    "int4_to_fp8",
    "moe_fp8",
    "moe_int4",
    "prepare_fp8",
    "prepare_int4",
    "warmup",
]
