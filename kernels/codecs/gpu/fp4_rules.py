"""FP4's arithmetic on a GPU, each rule once: every kernel that rounds to NVFP4 or MXFP4 calls these functions.

Blocks come as BF16 bits `[B, W, 8]`: W words of eight codes, two of NVFP4's 16 columns and four of MXFP4's 32. A code
is three bits of magnitude below a sign, as float32 has them: two of exponent, one of mantissa.
"""

from __future__ import annotations

import triton
import triton.language as tl

from k2quant.kernels.codecs import fp4
from k2quant.kernels.codecs.gpu.bf16 import LARGEST_FLOAT, round_to_bf16, widen
from k2quant.kernels.codecs.gpu.fp8_rules import fp8_value
from k2quant.kernels.devices.rounding import round_to_e4m3

LARGEST_E2M1, LEAST_E4M3 = tl.constexpr(fp4.LARGEST_E2M1), tl.constexpr(fp4.LEAST_E4M3)
EMPTY_MULTIPLIES, EMPTY_DIVIDES = tl.constexpr(fp4.EMPTY_MULTIPLIES), tl.constexpr(fp4.EMPTY_DIVIDES)
NAN_E4M3, NAN_E8M0 = tl.constexpr(fp4.NAN_E4M3), tl.constexpr(fp4.NAN_E8M0)


@triton.jit
def fp4_value(code):
    """Return the float32 of E2M1 codes, int32, sign in bit 3.

    Under float32's wider exponent the same bits mean the number times 2^-126, the subnormal 0.5 included.
    """
    moved = ((code & 8) << 28) | ((code & 7) << 22)
    return moved.to(tl.float32, bitcast=True) * 8.507059173023462e37


@triton.jit
def fp4_code(quotient, negative):
    """Return the E2M1 codes, int32, of float32 quotients: to nearest, ties to the even code, saturated at 6.

    NaN, of zero divided by zero, becomes 0. `negative` says which codes get a sign.
    """
    size = tl.abs(quotient)
    code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
    code += (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
    code += (size > 5.0).to(tl.int32)
    return code | (negative.to(tl.int32) << 3)


@triton.jit
def fp4_codes_of(bits, step, FORMAT: tl.constexpr):
    """Return the codes, int32, of BF16 bits divided by `step`, float32 of as many dimensions.

    NVFP4 gives a sign to quotients below zero, MXFP4 to each weight that has one, also to -0.
    """
    quotient = tl.div_rn(widen(bits), step)
    if FORMAT == "nvfp4":
        code = fp4_code(quotient, quotient < 0)
    else:
        code = fp4_code(quotient, bits < 0)
    return code


@triton.jit
def nvfp4_scale(amax, tensor, DIVIDES: tl.constexpr):
    """Return the block scales of the plain rule, e4m3 bits as int32, by each block's amax, BF16 bits as int32."""
    if DIVIDES:
        quotient = tensor * widen(round_to_bf16(tl.div_rn(widen(amax), LARGEST_E2M1)))
        scale = round_to_e4m3(quotient).to(tl.int32)
        scale = tl.where(scale == 0, EMPTY_DIVIDES, scale)
    else:
        quotient = tl.div_rn(widen(amax), LARGEST_E2M1 * tensor)
        scale = round_to_e4m3(tl.maximum(quotient, LEAST_E4M3)).to(tl.int32)
        scale = tl.where(quotient == 0, EMPTY_MULTIPLIES, scale)
    return scale


@triton.jit
def mxfp4_scale(amax):
    """Return the scales of compressed-tensors' rule, bytes as int32, by each block's amax, BF16 bits as int32."""
    return tl.maximum(((amax + 0x20) >> 7) - 2, 0)


@triton.jit
def fp4_scale(amax, tensor, FORMAT: tl.constexpr, DIVIDES: tl.constexpr):
    """Return the scale of each block by the format's own rule."""
    if FORMAT == "nvfp4":
        scale = nvfp4_scale(amax, tensor, DIVIDES)
    else:
        scale = mxfp4_scale(amax)
    return scale


@triton.jit
def nvfp4_step(scale, tensor, DIVIDES: tl.constexpr):
    """Return what a code of 1 means, float32: the e4m3 scale, int32 bits, times the tensor scale, or divided by it."""
    if DIVIDES:
        step = tl.div_rn(fp8_value(scale), tensor)
    else:
        step = fp8_value(scale) * tensor
    return step


@triton.jit
def mxfp4_step(scale):
    """Return what a code of 1 means, float32: 2^(scale - 127), for bytes as int32; 255 reads as infinity."""
    return tl.where(scale == 0, 0x00400000, scale << 23).to(tl.float32, bitcast=True)  # 2^-127 is subnormal


@triton.jit
def fp4_step(scale, tensor, FORMAT: tl.constexpr, DIVIDES: tl.constexpr):
    """Return what a code of 1 means, float32, by the block scale's byte, int32, and the tensor scale of NVFP4."""
    if FORMAT == "nvfp4":
        step = nvfp4_step(scale, tensor, DIVIDES)
    else:
        step = mxfp4_step(scale)
    return step


@triton.jit
def bad_fp4_scale(scale, FORMAT: tl.constexpr):
    """Return where a block scale's byte, int32, is none: NaN or negative e4m3, e8m0's 255."""
    if FORMAT == "nvfp4":
        bad = scale >= NAN_E4M3
    else:
        bad = scale == NAN_E8M0
    return bad


@triton.jit
def bad_tensor_scale(tensor, DIVISOR: tl.constexpr):
    """Return 1 if a tensor scale is negative, -0 included, NaN or infinite, or, of a DIVISOR, zero; else 0."""
    bits = tensor.to(tl.int32, bitcast=True)
    bad = (bits < 0) | (bits > LARGEST_FLOAT)
    if DIVISOR:
        bad = bad | (bits == 0)
    return bad.to(tl.int32)
