"""The codecs on the CPU, compiled by numba: a module for each format, whose functions are its codec."""

from k2quant.kernels.codecs.cpu import bf16, fp8, fused, gguf, int4, mxfp4, nvfp4
from k2quant.kernels.codecs.seam import Codecs

__all__ = ["CODECS", "bf16", "fp8", "fused", "gguf", "int4", "mxfp4", "nvfp4"]

CODECS = Codecs(
    floats=bf16,
    fp8=fp8,
    int4=int4,
    nvfp4=nvfp4,
    mxfp4=mxfp4,
    fused={("fp8", "int4"): fused.fp8_to_int4, ("int4", "fp8"): fused.int4_to_fp8},
)
