"""What each codec means, in plain torch: the truth that the fast codecs are held to, bit for bit.

Weights are `torch.bfloat16`, FP8 codes `torch.float8_e4m3fn`, packed INT4 words `torch.int32`, FP4's codes and scales
bytes; scales of the others are float32 going in, and what the format stores coming out. Every function takes tensors on
one device and returns tensors there. A bad value raises `ValueAt`. No speed tricks: a block, a group and a candidate
scale are just more dimensions.
"""

from k2quant.kernels.codecs.grids import GROUP
from k2quant.kernels.codecs.reference.bf16 import compare, double_to_bf16, float_to_bf16, largest, require_finite
from k2quant.kernels.codecs.reference.e2m1 import e2m1_numbers, unpack_e2m1
from k2quant.kernels.codecs.reference.fp4_search import (
    searched_mxfp4_scales,
    searched_nvfp4_scales,
    weighted_mxfp4_error,
    weighted_nvfp4_error,
)
from k2quant.kernels.codecs.reference.fp8 import bf16_to_fp8, bf16_to_fp8_at, fp8_scales, fp8_to_bf16
from k2quant.kernels.codecs.reference.fused import fp8_to_int4, int4_to_fp8
from k2quant.kernels.codecs.reference.int4 import (
    bf16_to_int4,
    bf16_to_int4_at,
    fake_quantize_int4,
    int4_at_scale,
    int4_inside,
    int4_scales,
    int4_to_bf16,
    moonshot_codes,
    moonshot_values,
    pack_int4,
    plain_int4_scale,
    unpack_int4,
)
from k2quant.kernels.codecs.reference.mxfp4 import (
    bf16_to_mxfp4,
    bf16_to_mxfp4_at,
    e8m0_powers,
    fake_quantize_mxfp4,
    mxfp4_exponents,
    mxfp4_inside,
    mxfp4_scales,
    mxfp4_to_bf16,
    restated_nvfp4,
)
from k2quant.kernels.codecs.reference.nvfp4 import (
    bf16_to_nvfp4,
    bf16_to_nvfp4_at,
    fake_quantize_nvfp4,
    nvfp4_inside,
    nvfp4_scales,
    nvfp4_tensor_scale,
    nvfp4_to_bf16,
)
from k2quant.kernels.codecs.reference.search import searched_int4_scales, weighted_int4_error

__all__ = [
    "GROUP",
    "bf16_to_fp8",
    "bf16_to_fp8_at",
    "bf16_to_int4",
    "bf16_to_int4_at",
    "bf16_to_mxfp4",
    "bf16_to_mxfp4_at",
    "bf16_to_nvfp4",
    "bf16_to_nvfp4_at",
    "compare",
    "double_to_bf16",
    "e2m1_numbers",
    "e8m0_powers",
    "fake_quantize_int4",
    "fake_quantize_mxfp4",
    "fake_quantize_nvfp4",
    "float_to_bf16",
    "fp8_scales",
    "fp8_to_bf16",
    "fp8_to_int4",
    "int4_at_scale",
    "int4_inside",
    "int4_scales",
    "int4_to_bf16",
    "int4_to_fp8",
    "largest",
    "moonshot_codes",
    "moonshot_values",
    "mxfp4_exponents",
    "mxfp4_inside",
    "mxfp4_scales",
    "mxfp4_to_bf16",
    "nvfp4_inside",
    "nvfp4_scales",
    "nvfp4_tensor_scale",
    "nvfp4_to_bf16",
    "pack_int4",
    "plain_int4_scale",
    "require_finite",
    "restated_nvfp4",
    "searched_int4_scales",
    "searched_mxfp4_scales",
    "searched_nvfp4_scales",
    "unpack_e2m1",
    "unpack_int4",
    "weighted_int4_error",
    "weighted_mxfp4_error",
    "weighted_nvfp4_error",
]
