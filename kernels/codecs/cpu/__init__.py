"""The codecs on the CPU, compiled by numba: `seam.Codecs` as functions."""

from k2quant.kernels.codecs.cpu.loops import (
    bf16_to_fp8,
    bf16_to_int4,
    compare,
    fake_quantize_int4,
    float_to_bf16,
    fp8_to_bf16,
    fp8_to_int4,
    int4_to_bf16,
    int4_to_fp8,
    outside,
)

__all__ = [
    "bf16_to_fp8",
    "bf16_to_int4",
    "compare",
    "fake_quantize_int4",
    "float_to_bf16",
    "fp8_to_bf16",
    "fp8_to_int4",
    "int4_to_bf16",
    "int4_to_fp8",
    "outside",
]
