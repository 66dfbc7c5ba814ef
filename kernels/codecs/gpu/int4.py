"""INT4 codecs on a GPU: one launch each, one read and one write of memory, the bits of `reference`.

A group of 32 weights is four words of eight, and everything is flat: group g has the words 4g.. and the weights 32g..
of a contiguous tensor, whatever its shape. A thread holds eight weights, 16 bytes of BF16, and makes one word of them.

Nothing here waits for the device. What the seam refuses (see `values`) is reported in a flag, which the caller reads
when it likes; the output is void then.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from k2quant.kernels.codecs.gpu.bf16 import INFINITY, any_of, bad_scale, large_scale, magnitude_of, tally, widen
from k2quant.kernels.codecs.gpu.figures import bits_of, flag_for, sums_for, total
from k2quant.kernels.codecs.gpu.int4_rules import encode_int4, int4_product
from k2quant.kernels.codecs.gpu.loads import load_bf16, load_fp8
from k2quant.kernels.codecs.grids import GROUP, PACKED_BITS, Grid, largest_code
from k2quant.kernels.devices.launch import launch

_WORDS = 512
"""Words that a program decodes: 4 a thread, so that loads and stores have 16 bytes a thread."""

_GROUPS = 128
"""Groups that a program encodes: 32 weights a thread, enough to hide the vote that `encode_int4` takes."""

_FUSED_ROWS, _FUSED_GROUPS = 8, 16
"""Rows and groups of a tile of `fp8_to_int4`: 512 columns divide every width of Kimi K2."""


# --- decoding -------------------------------------------------------------------------------------------------------


@triton.jit
def _int4_to_bf16(
    packed_ptr, scale_ptr, out_ptr, bad_ptr, words, GROUP_SIZE: tl.constexpr, CHECK: tl.constexpr, WORDS: tl.constexpr
):
    """Write the eight weights of each of WORDS words."""
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    inside = (word < words)[:, None]
    lane = tl.arange(0, 8)[None, :]
    packed = tl.load(packed_ptr + word, mask=word < words, other=0)
    if GROUP_SIZE % 8 == 0:  # a word has one scale
        scale = tl.load(scale_ptr + word // (GROUP_SIZE // 8), mask=word < words, other=0)[:, None]
    else:
        scale = tl.load(scale_ptr + (word[:, None] * 8 + lane) // GROUP_SIZE, mask=inside, other=0)
    if scale_ptr.dtype.element_ty == tl.int16:
        scale = widen(scale)
    out = int4_product((packed[:, None] >> (4 * lane)) & 15, scale)
    tl.store(out_ptr + word[:, None] * 8 + lane, out, mask=inside)
    if CHECK:
        if any_of(large_scale(scale)) > 0:
            if (any_of(bad_scale(scale)) > 0) | (tl.max(magnitude_of(out)) >= INFINITY):
                tl.store(bad_ptr, 1)


def int4_to_bf16(packed: Tensor, scale: Tensor, group: int = GROUP, *, bad: Tensor | None = None) -> Tensor:
    """Return BF16 `[.., K]`, each weight code * scale rounded once.

    Args:
        packed: int32 words `[.., K/8]`, lowest column in the lowest nibble, nibble = code + 8.
        scale: BF16 or float32 `[.., K/group]`.
        group: columns that share a scale; divides K.
        bad: int32 `[1]`, set to 1 if a scale is negative, NaN or infinite, or a weight exceeds BF16.
    """
    packed, scale = packed.contiguous(), bits_of(scale)
    out = torch.empty((*packed.shape[:-1], packed.shape[-1] * 8), dtype=torch.bfloat16, device=packed.device)
    launch(
        _int4_to_bf16,
        (triton.cdiv(packed.numel(), _WORDS),),
        packed,
        scale,
        bits_of(out),
        flag_for(bad, packed),
        packed.numel(),
        GROUP_SIZE=group,
        CHECK=bad is not None,
        WORDS=_WORDS,
        exact=True,
    )
    return out


# --- encoding -------------------------------------------------------------------------------------------------------


@triton.jit
def _packed(nibble):
    """Return the words `[G, 4]` of nibbles `[G, 4, 8]`."""
    return tl.sum((nibble & 15) << (4 * tl.arange(0, 8)[None, None, :]), 2)  # no two share a bit


@triton.jit
def _bf16_to_int4(
    weights_ptr,
    packed_ptr,
    scale_ptr,
    sums_ptr,
    bad_ptr,
    groups,
    GRID: tl.constexpr,
    RECOVER: tl.constexpr,
    LARGEST: tl.constexpr,
    FAKE: tl.constexpr,
    FIGURES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Encode GROUPS groups; if FAKE, write the decoded weights to `packed_ptr`, and no scale."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    inside = group < groups
    word = (group * 4)[:, None] + tl.arange(0, 4)[None, :]
    place = (word * 8)[:, :, None] + tl.arange(0, 8)[None, None, :]
    bits = load_bf16(weights_ptr + place, inside[:, None, None])
    nibble, scale = encode_int4(bits, bad_ptr, GRID, RECOVER, LARGEST)
    if FAKE:
        after = int4_product(nibble, widen(scale)[:, None, None])
        # NaN spreads over its group; unlike a flag that nobody reads, it is noticed.
        spoilt = tl.max(tl.max(magnitude_of(bits), 2), 1) >= INFINITY
        tl.store(packed_ptr + place, tl.where(spoilt[:, None, None], 0x7FC0, after), mask=inside[:, None, None])
    else:
        tl.store(packed_ptr + word, _packed(nibble), mask=inside[:, None])
        tl.store(scale_ptr + group, scale, mask=inside)
    if FIGURES:
        tally(bits, int4_product(nibble, widen(scale)[:, None, None]), sums_ptr, tl.program_id(0))


def bf16_to_int4(
    weights: Tensor,
    grid: Grid = "moonshot",
    *,
    recover: bool = True,
    bits: int = 4,
    figures: bool = False,
    bad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Encode groups of 32 columns.

    Args:
        weights: BF16 `[.., K]`, or float32, which is rounded to BF16 first; K is a multiple of 32.
        grid: see `seam.Int4Codec.encode`.
        recover: whether a moonshot group that lies on the grid already gets the scale that gives all its weights; of
            4 bits alone.
        bits: width of the codes, 4, 3 or 2; other than 4 on the moonshot grid alone.
        figures: whether to compute them.
        bad: int32 `[1]`, set to 1 if a weight is not finite, or decodes to more than BF16 holds.

    Returns:
        int32 words `[.., K/8]`, BF16 scales `[.., K/32]`, and the figures as `figures.figures_of` reads them.
    """
    largest = largest_code(grid, bits, PACKED_BITS)
    device, lead = weights.device, weights.shape[:-1]
    groups = weights.numel() // GROUP
    packed = torch.empty((*lead, weights.shape[-1] // 8), dtype=torch.int32, device=device)
    scale = torch.empty((*lead, weights.shape[-1] // GROUP), dtype=torch.bfloat16, device=device)
    programs = triton.cdiv(groups, _GROUPS)
    sums = sums_for(programs, device, wanted=figures)
    launch(
        _bf16_to_int4,
        (programs,),
        bits_of(weights),
        packed,
        bits_of(scale),
        sums,
        flag_for(bad, weights),
        groups,
        GRID=grid,
        RECOVER=recover and bits == 4,
        LARGEST=float(largest),
        FAKE=False,
        FIGURES=figures,
        GROUPS=_GROUPS,
        exact=True,
    )
    return packed, scale, total(sums) if figures else None


def fake_quantize_int4(
    weights: Tensor, grid: Grid = "moonshot", *, recover: bool = False, bits: int = 4, bad: Tensor | None = None
) -> Tensor:
    """Return BF16 `[.., K]`: the weights as they are after encoding and decoding, in one launch.

    The arguments are those of `bf16_to_int4`; `bits` may also be 8. A group that holds NaN or infinity becomes NaN.
    """
    largest = largest_code(grid, bits)
    groups = weights.numel() // GROUP
    out = torch.empty(weights.shape, dtype=torch.bfloat16, device=weights.device)
    flag = flag_for(bad, weights)
    launch(
        _bf16_to_int4,
        (triton.cdiv(groups, _GROUPS),),
        bits_of(weights),
        bits_of(out),
        bits_of(out),
        sums_for(0, weights.device, wanted=False),
        flag,
        groups,
        GRID=grid,
        RECOVER=recover and bits == 4,
        LARGEST=float(largest),
        FAKE=True,
        FIGURES=False,
        GROUPS=_GROUPS,
        exact=True,
    )
    return out


# --- FP8 to INT4 ----------------------------------------------------------------------------------------------------


@triton.jit
def _fp8_to_int4(
    codes_ptr,
    scale_ptr,
    packed_ptr,
    out_scale_ptr,
    sums_ptr,
    bad_ptr,
    R,
    K,
    ACROSS,
    GRID: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    FIGURES: tl.constexpr,
    CHECK: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Encode a tile of ROWS rows and GROUPS groups of each; ACROSS tiles lie side by side."""
    pid = tl.program_id(0)
    row = pid // ACROSS * ROWS + tl.arange(0, ROWS)
    group = pid % ACROSS * GROUPS + tl.arange(0, GROUPS)
    bits = load_fp8(codes_ptr, scale_ptr, bad_ptr, row, group, R, K, HEIGHT, WIDTH, CHECK)
    nibble, scale = encode_int4(bits.reshape(ROWS * GROUPS, 4, 8), bad_ptr, GRID, True, 7.0)
    if FIGURES:
        tally(
            bits.reshape(ROWS * GROUPS, 4, 8),
            int4_product(nibble, widen(scale)[:, None, None]),
            sums_ptr,
            tl.program_id(0),
        )
    inside = (row < R)[:, None] & (group < K // 32)[None, :]
    place = row.to(tl.int64)[:, None] * (K // 32) + group[None, :]
    tl.store(out_scale_ptr + place, scale.reshape(ROWS, GROUPS), mask=inside)
    word = (place * 4)[:, :, None] + tl.arange(0, 4)[None, None, :]
    tl.store(packed_ptr + word, _packed(nibble).reshape(ROWS, GROUPS, 4), mask=inside[:, :, None])


def fp8_to_int4(
    codes: Tensor,
    scale: Tensor,
    block: tuple[int, int] = (128, 128),
    grid: Grid = "moonshot",
    *,
    figures: bool = False,
    bad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Give what `fp8_to_bf16` and `bf16_to_int4` give, with nothing written as BF16.

    Args:
        codes: float8_e4m3fn `[R, K]`, K a multiple of 32.
        scale: float32 `[ceil(R/block[0]), ceil(K/block[1])]`.
        block: rows and columns that share a scale; any.
        grid: see `seam.Int4Codec.encode`.
        figures: whether to compute them.
        bad: int32 `[1]`, set to 1 if either of the two would set it.

    Returns:
        As `bf16_to_int4`.
    """
    rows, columns = codes.shape
    packed = torch.empty((rows, columns // 8), dtype=torch.int32, device=codes.device)
    out_scale = torch.empty((rows, columns // GROUP), dtype=torch.bfloat16, device=codes.device)
    across = triton.cdiv(columns // GROUP, _FUSED_GROUPS)
    programs = triton.cdiv(rows, _FUSED_ROWS) * across
    sums = sums_for(programs, codes.device, wanted=figures)
    launch(
        _fp8_to_int4,
        (programs,),
        bits_of(codes),
        scale.contiguous(),
        packed,
        bits_of(out_scale),
        sums,
        flag_for(bad, codes),
        rows,
        columns,
        across,
        GRID=grid,
        HEIGHT=block[0],
        WIDTH=block[1],
        FIGURES=figures,
        CHECK=bad is not None,
        ROWS=_FUSED_ROWS,
        GROUPS=_FUSED_GROUPS,
        exact=True,
    )
    return packed, out_scale, total(sums) if figures else None
