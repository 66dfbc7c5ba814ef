"""Blocks of GGUF on the CPU: codes and scales of other layouts as llama.cpp has them, and rounding to Q8_0.

The layouts are those of ggml/src/ggml-common.h (llama.cpp, 2026): `block_q4_0`, `block_q8_0`, `block_mxfp4` and
`block_nvfp4`. What goes over from INT4 and FP4 are codes and scales, bit for bit; only their places change.
"""

from __future__ import annotations

import numpy as np

from k2quant.kernels.codecs import values as explain
from k2quant.kernels.codecs.cpu import bf16, gguf_loops
from k2quant.kernels.codecs.cpu.checks import frozen, same, valid
from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.values import F32, I32, U8, U16, bf16_to_float

WIDTH = 32
"""Weights of a block, but of NVFP4, which has 64."""


def no_half(scale: F32) -> tuple[int, int] | None:
    """Return row and column of the first scale, of `[R, K/group]` without signs, that FP16 does not have exactly."""
    place = gguf_loops.no_half(frozen(scale.reshape(-1)))
    return None if place < 0 else divmod(place, scale.shape[1])


def are_plainly_halves(scale: U16) -> bool:
    """Tell at a glance that FP16 has all of these BF16 bits: all lie from 2^-17 to 65280. False decides nothing.

    That is what scales of a trained model are, and takes a sixth of the time of looking at each.
    """
    return not scale.size or bool(scale.min() >= 0x3700 and scale.max() <= 0x477F)


def q4_0(packed: I32, scale: F32, group: int, out: U8) -> None:
    """Write INT4 as Q4_0: the same codes and scales.

    Args:
        packed: words `[R, K/8]`, as `seam.Int4Codec` has them.
        scale: float32 `[R, K/group]`.
        group: columns that share a scale, a multiple of 32.
        out: `[R, K/32 * 18]`.

    Raises:
        ValueAt: a scale is NaN, infinite or has a sign, or is no value of FP16.
    """
    rows, columns = packed.shape[0], packed.shape[1] * 8
    same(scale.shape, (rows, columns // group))
    same(out.shape, (rows, columns // WIDTH * 18))
    if not valid(scale):
        raise explain.bad_int4(packed, scale, group)
    of_blocks = scale if group == WIDTH else np.repeat(scale, group // WIDTH, axis=1)
    if not gguf_loops.q4_0(frozen(packed.view(np.uint32)), frozen(of_blocks), out):
        row, column = no_half(scale) or (0, 0)
        what = f"a scale that FP16 does not have, {scale[row, column]:g},"
        raise explain.ValueAt(row=row, column=column, what=what, of="scale")


def mxfp4(codes: U8, scale: U8, out: U8) -> None:
    """Write MXFP4 in GGUF's blocks.

    Args:
        codes: `[R, K/2]`, as `seam.Mxfp4Codec` has them.
        scale: `[R, K/32]`.
        out: `[R, K/32 * 17]`.
    """
    same(scale.shape, (codes.shape[0], codes.shape[1] // 16))
    same(out.shape, (codes.shape[0], scale.shape[1] * 17))
    gguf_loops.mxfp4(frozen(codes.view(np.uint32)), frozen(scale), out)


def nvfp4(codes: U8, scale: U8, out: U8) -> None:
    """Write NVFP4 in GGUF's blocks; the scale of the tensor stands elsewhere.

    Args:
        codes: `[R, K/2]`, as `seam.Nvfp4Codec` has them; K is a multiple of 64.
        scale: E4M3 bits without a sign, `[R, K/16]`.
        out: `[R, K/64 * 36]`.
    """
    same(scale.shape, (codes.shape[0], codes.shape[1] // 8))
    same(out.shape, (codes.shape[0], scale.shape[1] // 4 * 36))
    gguf_loops.nvfp4(frozen(codes.view(np.uint32)), frozen(scale.view(np.uint32)), out.view(np.uint32))


def q8_0(weights: U16, out: U8) -> Figures:
    """Round BF16 to Q8_0 as ggml does (`quantize_row_q8_0_ref`), and return what that did.

    The scale is amax/127; codes are w * (1 / scale) in float32, rounded half away from zero; then it becomes FP16.

    Args:
        weights: BF16 bits `[R, K]`; K is a multiple of 32.
        out: `[R, K/32 * 34]`.

    Raises:
        ValueAt: a weight is not finite, or so large that FP16 has no scale for it.
    """
    rows, columns = weights.shape
    same(out.shape, (rows, columns // WIDTH * 34))
    amax = np.empty((rows, columns // WIDTH), np.uint16)
    gguf_loops.largest(frozen(weights), amax)
    if amax.size and amax.max() >= explain.INFINITY:
        raise explain.bad_weight(weights)
    step = bf16_to_float(amax) / np.float32(127)
    with np.errstate(over="ignore"):
        halves = step.astype(np.float16)
    if np.isinf(halves).any():
        row, block = explain.first(np.isinf(halves))
        column = block * WIDTH + int(np.argmax(weights[row, block * WIDTH : block * WIDTH + WIDTH] & 0x7FFF))
        raise explain.ValueAt(row=row, column=column, what="a weight for which Q8_0 has no scale")
    out.reshape(rows, -1, 34)[..., :2] = halves.view(np.uint8).reshape(rows, -1, 2)
    after = np.empty_like(weights)
    gguf_loops.q8_0(frozen(weights), frozen(step), frozen(halves.astype(np.float32)), out, after)
    return bf16.compare(weights, after)
