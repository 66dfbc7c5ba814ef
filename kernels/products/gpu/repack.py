"""The two layouts of INT4 weights on a GPU, `rows` and `groups` of `packed/int4`, turned into each other.

One read and one write of memory. Rows are read and groups are written in whole cache lines: a tile is turned around in
shared memory between.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from k2quant.kernels.codecs.gpu.figures import bits_of
from k2quant.kernels.devices.launch import launch

_ROWS, _GROUPS = 64, 16
"""Rows and groups of a tile: a row has 256 bytes of words and 32 of scales, a group 1024 and 128."""


@triton.jit
def _interleaved(words, SHAPE0: tl.constexpr, SHAPE1: tl.constexpr):
    """Put the nibbles of each four words, in column order, where the layout `groups` has them."""
    first, second = tl.split(words.reshape(SHAPE0, SHAPE1 // 2, 2))
    low = _even_bytes(first) | (_even_bytes(second) << 16)
    high = _even_bytes(first >> 8) | (_even_bytes(second >> 8) << 16)
    low = _low_nibbles(low) | (_low_nibbles(low >> 4) << 16)
    high = _low_nibbles(high) | (_low_nibbles(high >> 4) << 16)
    words = tl.join(low, high).reshape(SHAPE0, SHAPE1 // 4, 2, 2)
    return words.permute(0, 1, 3, 2).reshape(SHAPE0, SHAPE1)


@triton.jit
def _in_column_order(words, SHAPE0: tl.constexpr, SHAPE1: tl.constexpr):
    """Undo `_interleaved`."""
    words = words.reshape(SHAPE0, SHAPE1 // 4, 2, 2).permute(0, 1, 3, 2)
    low, high = tl.split(words.reshape(SHAPE0, SHAPE1 // 2, 2))
    low = _apart(low) | (_apart(low >> 16) << 4)
    high = _apart(high) | (_apart(high >> 16) << 4)
    first = _bytes_apart(low) | (_bytes_apart(high) << 8)
    second = _bytes_apart(low >> 16) | (_bytes_apart(high >> 16) << 8)
    return tl.join(first, second).reshape(SHAPE0, SHAPE1)


@triton.jit
def _even_bytes(words):
    return (words & 0xFF) | ((words >> 8) & 0xFF00)


@triton.jit
def _bytes_apart(words):
    return (words & 0xFF) | ((words & 0xFF00) << 8)


@triton.jit
def _low_nibbles(words):
    """Return the low nibbles of the four bytes, side by side in the low half."""
    pairs = words & 0x0F0F0F0F
    pairs = (pairs | (pairs >> 4)) & 0x00FF00FF
    return (pairs | (pairs >> 8)) & 0xFFFF


@triton.jit
def _apart(words):
    """Return the four nibbles of the low half as the low nibbles of four bytes."""
    pairs = words & 0xFFFF
    pairs = (pairs | (pairs << 8)) & 0x00FF00FF
    return (pairs | (pairs << 4)) & 0x0F0F0F0F


@triton.jit
def _repack(
    source_ptr,
    source_scale_ptr,
    out_ptr,
    out_scale_ptr,
    N,
    G,
    TO_GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Turn a tile of one matrix of N rows and G groups around: program (tile, matrix), tiles row by row."""
    tiles = tl.cdiv(G, GROUPS)
    row = tl.program_id(0) // tiles * ROWS
    group = tl.program_id(0) % tiles * GROUPS
    matrix = tl.program_id(1).to(tl.int64) * N * G
    rows, groups = row + tl.arange(0, ROWS), group + tl.arange(0, GROUPS)
    words_of_row, words_of_group = tl.arange(0, 4 * GROUPS), tl.arange(0, 4 * ROWS)

    # Places of the words `[ROWS, 4 * GROUPS]` by rows, and `[GROUPS, 4 * ROWS]` by groups; of the scales likewise.
    by_rows = ((matrix + rows.to(tl.int64) * G + group) * 4)[:, None] + words_of_row[None, :]
    in_rows = (rows < N)[:, None] & (words_of_row < (G - group) * 4)[None, :]
    by_groups = ((matrix + groups.to(tl.int64) * N + row) * 4)[:, None] + words_of_group[None, :]
    in_groups = (groups < G)[:, None] & (words_of_group < (N - row) * 4)[None, :]
    scale_by_rows = (matrix + rows.to(tl.int64) * G)[:, None] + groups[None, :]
    scale_in_rows = (rows < N)[:, None] & (groups < G)[None, :]
    scale_by_groups = (matrix + groups.to(tl.int64) * N)[:, None] + rows[None, :]
    scale_in_groups = (groups < G)[:, None] & (rows < N)[None, :]

    if TO_GROUPS:
        words = tl.load(source_ptr + by_rows, mask=in_rows, other=0)
        words = _interleaved(words, ROWS, 4 * GROUPS).reshape(ROWS, GROUPS, 4)
        words = words.permute(1, 0, 2).reshape(GROUPS, 4 * ROWS)
        tl.store(out_ptr + by_groups, words, mask=in_groups)
        scale = tl.load(source_scale_ptr + scale_by_rows, mask=scale_in_rows, other=0)
        tl.store(out_scale_ptr + scale_by_groups, tl.trans(scale), mask=scale_in_groups)
    else:
        words = tl.load(source_ptr + by_groups, mask=in_groups, other=0)
        words = _in_column_order(words, GROUPS, 4 * ROWS).reshape(GROUPS, ROWS, 4)
        words = words.permute(1, 0, 2).reshape(ROWS, 4 * GROUPS)
        tl.store(out_ptr + by_rows, words, mask=in_rows)
        scale = tl.load(source_scale_ptr + scale_by_groups, mask=scale_in_groups, other=0)
        tl.store(out_scale_ptr + scale_by_rows, tl.trans(scale), mask=scale_in_rows)


def repack_int4(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the layout `groups`, int32 `[.., K/32, N, 4]` and BF16 `[.., K/32, N]`, of the layout `rows`.

    Args:
        packed: int32 words `[N, K/8]`, or `[E, N, K/8]` for experts.
        scale: BF16 `[.., N, K/32]`.
    """
    *lead, rows, groups = scale.shape
    codes = torch.empty((*lead, groups, rows, 4), dtype=torch.int32, device=packed.device)
    turned = torch.empty((*lead, groups, rows), dtype=scale.dtype, device=packed.device)
    _launch(packed, scale, codes, turned, rows, groups, to_groups=True)
    return codes, turned


def unpack_int4(codes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the layout `rows` of the layout `groups`: undo `repack_int4`."""
    *lead, groups, rows = scale.shape
    packed = torch.empty((*lead, rows, groups * 4), dtype=torch.int32, device=codes.device)
    turned = torch.empty((*lead, rows, groups), dtype=scale.dtype, device=codes.device)
    _launch(codes, scale, packed, turned, rows, groups, to_groups=False)
    return packed, turned


def _launch(
    source: Tensor, source_scale: Tensor, out: Tensor, out_scale: Tensor, rows: int, groups: int, *, to_groups: bool
) -> None:
    matrices = out_scale.numel() // max(rows * groups, 1)
    launch(
        _repack,
        (triton.cdiv(rows, _ROWS) * triton.cdiv(groups, _GROUPS), matrices),
        source.contiguous(),
        bits_of(source_scale),
        out,
        bits_of(out_scale),
        rows,
        groups,
        TO_GROUPS=to_groups,
        ROWS=_ROWS,
        GROUPS=_GROUPS,
        exact=True,
    )
