"""From FP8 to INT4 and from INT4 to FP8 on the CPU, in one pass each: the `fused` pairs of `seam.Codecs`."""

from __future__ import annotations

import numpy as np

from k2quant.kernels.codecs import values as explain
from k2quant.kernels.codecs.cpu import fp8, loops
from k2quant.kernels.codecs.cpu.checks import figures, frozen, same, same_fp8, same_int4, valid
from k2quant.kernels.codecs.cpu.int4 import rule_of
from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.grids import Grid
from k2quant.kernels.codecs.scales.recovery import int4_table
from k2quant.kernels.codecs.values import F32, I32, U8, U16


def fp8_to_int4(codes: U8, scale_in: F32, block: tuple[int, int], grid: Grid, packed: I32, scale_out: U16) -> Figures:
    """Do `fp8.decode`, then `int4.encode`, row by row; no more than a row is BF16."""
    same_fp8(codes.shape, scale_in, block)
    same_int4(codes.shape, scale_out, packed)
    found = None
    if valid(scale_in):
        rule = rule_of(grid, recover=True)
        inputs = frozen(codes), frozen(scale_in)
        outcome = loops.fp8_to_int4(*inputs, *block, rule, int4_table(), packed.view(np.uint8), scale_out)
        found = figures(codes.size, outcome)
    if found is None:
        pivot = np.empty(codes.shape, np.uint16)
        fp8.decode(codes, scale_in, block, pivot)
        raise explain.bad_group(pivot)
    return found


def int4_to_fp8(packed: I32, scale_in: F32, group: int, block: tuple[int, int], codes: U8, scale_out: F32) -> Figures:
    """Do `int4.decode`, then `fp8.encode`, block by block; no more than a block is BF16."""
    rows, columns = codes.shape
    same(packed.shape, (rows, columns // 8))
    same(scale_in.shape, (rows, columns // group))
    same_fp8(codes.shape, scale_out, block)
    found = None
    if valid(scale_in):
        inputs = frozen(packed.view(np.uint8)), frozen(scale_in)
        found = figures(codes.size, loops.int4_to_fp8(*inputs, group, *block, codes, scale_out))
    if found is None:
        raise explain.bad_int4(packed, scale_in, group)
    return found
