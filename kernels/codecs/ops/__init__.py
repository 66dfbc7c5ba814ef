"""The codecs as torch operators on tensors, and fake quantisation.

The bits are those of a conversion, on every device: on a CPU the codecs of a conversion run on views of the tensors, on
a GPU the Triton kernels, one launch each. On a GPU nothing waits for the device, so a value that no codec can carry
(NaN, infinity, a negative scale) gives undefined codes there; on a CPU it raises `values.ValueAt`.
"""

from k2quant.kernels.codecs.ops.fp8 import bf16_to_fp8, fake_quantize_fp8, fp8_to_bf16
from k2quant.kernels.codecs.ops.fused import fp8_to_int4, int4_to_fp8
from k2quant.kernels.codecs.ops.int4 import bf16_to_int4, fake_quantize_int4, int4_to_bf16, search_int4_scales
from k2quant.kernels.codecs.ops.mxfp4 import bf16_to_mxfp4, fake_quantize_mxfp4, mxfp4_to_bf16
from k2quant.kernels.codecs.ops.nvfp4 import bf16_to_nvfp4, fake_quantize_nvfp4, nvfp4_tensor_scale, nvfp4_to_bf16

__all__ = [
    "bf16_to_fp8",
    "bf16_to_int4",
    "bf16_to_mxfp4",
    "bf16_to_nvfp4",
    "fake_quantize_fp8",
    "fake_quantize_int4",
    "fake_quantize_mxfp4",
    "fake_quantize_nvfp4",
    "fp8_to_bf16",
    "fp8_to_int4",
    "int4_to_bf16",
    "int4_to_fp8",
    "mxfp4_to_bf16",
    "nvfp4_tensor_scale",
    "nvfp4_to_bf16",
    "search_int4_scales",
]
