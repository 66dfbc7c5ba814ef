"""Blocks of GGUF in plain torch: the truth for `codecs/cpu/gguf.py`, which says what goes in and comes out."""

from __future__ import annotations

import torch
from torch import Tensor

WIDTH = 32


def q4_0(packed: Tensor, scale: Tensor, group: int) -> Tensor:
    """Return blocks, uint8 `[R, K/32 * 18]`, of INT4 words int32 `[R, K/8]` and scales float32 `[R, K/group]`."""
    halves = scale.half().repeat_interleave(group // WIDTH, 1).view(torch.uint8)
    return _blocks(halves, _woven(_nibbles(packed.view(torch.uint8)), WIDTH), packed.shape[1] // 4)


def mxfp4(codes: Tensor, scale: Tensor) -> Tensor:
    """Return blocks, uint8 `[R, K/32 * 17]`, of codes uint8 `[R, K/2]` and scales uint8 `[R, K/32]`."""
    return _blocks(scale, _woven(_nibbles(codes), WIDTH), codes.shape[1] // 16)


def nvfp4(codes: Tensor, scale: Tensor) -> Tensor:
    """Return blocks, uint8 `[R, K/64 * 36]`, of codes uint8 `[R, K/2]` and scales uint8 `[R, K/16]`."""
    return _blocks(scale, _woven(_nibbles(codes), 16), codes.shape[1] // 32)


def q8_0(weights: Tensor) -> Tensor:
    """Return blocks, uint8 `[R, K/32 * 34]`, of BF16 weights `[R, K]`."""
    rows = len(weights)
    wide = weights.float().reshape(rows, -1, WIDTH)
    step = wide.abs().amax(-1, keepdim=True) / torch.tensor(127.0)
    inverse = torch.where(step == 0, 0, 1 / step)
    quotient = wide * torch.where(inverse.isinf(), 0, inverse)
    whole = quotient.trunc() + (quotient.frac().abs() >= 0.5) * quotient.sign()
    codes = whole.to(torch.int8).view(torch.uint8)
    return _blocks(step.half().view(torch.uint8).reshape(rows, -1), codes, wide.shape[1])


def _nibbles(pairs: Tensor) -> Tensor:
    """Return codes `[R, K]` of bytes `[R, K/2]`, the lower nibble first."""
    return torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2)


def _woven(codes: Tensor, width: int) -> Tensor:
    """Return bytes: of `width` codes the one at j in the low nibble of byte j, above it the one half a width on."""
    halves = codes.reshape(len(codes), -1, 2, width // 2)
    return halves[:, :, 0] | halves[:, :, 1] << 4


def _blocks(scales: Tensor, content: Tensor, count: int) -> Tensor:
    """Return what each of so many blocks of a row begins with, and then its codes."""
    rows = len(content)
    return torch.cat([scales.reshape(rows, count, -1), content.reshape(rows, count, -1)], -1).flatten(1)
