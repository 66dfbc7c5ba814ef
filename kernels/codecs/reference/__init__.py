"""What each codec means, in plain torch: the truth that the fast codecs are held to, bit for bit.

Weights are `torch.bfloat16`, FP8 codes `torch.float8_e4m3fn`, packed INT4 words `torch.int32`; scales are float32 going
in, and what the format stores coming out. Every function takes tensors on one device and returns tensors there.
A bad value raises `ValueAt`. No speed tricks: a block, a group and a candidate scale are just more dimensions.
"""

from k2quant.kernels.codecs.grids import GROUP
from k2quant.kernels.codecs.reference.bf16 import compare, double_to_bf16, float_to_bf16, require_finite
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
from k2quant.kernels.codecs.reference.search import searched_int4_scales, weighted_int4_error

__all__ = [
    "GROUP",
    "bf16_to_fp8",
    "bf16_to_fp8_at",
    "bf16_to_int4",
    "bf16_to_int4_at",
    "compare",
    "double_to_bf16",
    "fake_quantize_int4",
    "float_to_bf16",
    "fp8_scales",
    "fp8_to_bf16",
    "fp8_to_int4",
    "int4_at_scale",
    "int4_inside",
    "int4_scales",
    "int4_to_bf16",
    "int4_to_fp8",
    "moonshot_codes",
    "moonshot_values",
    "pack_int4",
    "plain_int4_scale",
    "require_finite",
    "searched_int4_scales",
    "unpack_int4",
    "weighted_int4_error",
]
