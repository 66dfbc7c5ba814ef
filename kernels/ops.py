"""Everything of the kernels that other code calls.

weight = prepare_int4(weight_packed, weight_scale)
y = int4_linear(x, weight)
"""

from __future__ import annotations

from k2quant.kernels.codecs.ops import (
    bf16_to_fp8,
    bf16_to_int4,
    bf16_to_mxfp4,
    bf16_to_nvfp4,
    fake_quantize_fp8,
    fake_quantize_int4,
    fake_quantize_mxfp4,
    fake_quantize_nvfp4,
    fp8_to_bf16,
    fp8_to_int4,
    int4_to_bf16,
    int4_to_fp8,
    mxfp4_to_bf16,
    nvfp4_tensor_scale,
    nvfp4_to_bf16,
    search_int4_scales,
)
from k2quant.kernels.products.linear import fp8_linear, fp8_linear_w8a8, int4_linear, linear
from k2quant.kernels.products.moe import moe, moe_fp8, moe_int4
from k2quant.kernels.products.packed.fp8 import Fp8Weight
from k2quant.kernels.products.packed.int4 import Int4Weight
from k2quant.kernels.products.packed.mxfp4 import Mxfp4Weight
from k2quant.kernels.products.packed.nvfp4 import Nvfp4Weight
from k2quant.kernels.products.packed.weight import PackedWeight
from k2quant.kernels.products.prepare import prepare_fp8, prepare_int4, prepare_mxfp4, prepare_nvfp4
from k2quant.kernels.products.warmup import warmup

__all__ = [
    "Fp8Weight",
    "Int4Weight",
    "Mxfp4Weight",
    "Nvfp4Weight",
    "PackedWeight",
    "bf16_to_fp8",
    "bf16_to_int4",
    "bf16_to_mxfp4",
    "bf16_to_nvfp4",
    "fake_quantize_fp8",
    "fake_quantize_int4",
    "fake_quantize_mxfp4",
    "fake_quantize_nvfp4",
    "fp8_linear",
    "fp8_linear_w8a8",
    "fp8_to_bf16",
    "fp8_to_int4",
    "int4_linear",
    "int4_to_bf16",
    "int4_to_fp8",
    "linear",
    "moe",
    "moe_fp8",
    "moe_int4",
    "mxfp4_to_bf16",
    "nvfp4_tensor_scale",
    "nvfp4_to_bf16",
    "prepare_fp8",
    "prepare_int4",
    "prepare_mxfp4",
    "prepare_nvfp4",
    "search_int4_scales",
    "warmup",
]
