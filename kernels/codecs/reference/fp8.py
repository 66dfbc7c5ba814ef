"""Block FP8 in plain torch: codes `torch.float8_e4m3fn` with a float32 scale for each block."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from k2quant.kernels.codecs import values as explain
from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.reference.bf16 import (
    LARGEST_FLOAT,
    compare,
    divided,
    require_divisor,
    require_finite,
    valid,
)


def fp8_to_bf16(codes: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Multiply each block of e4m3 codes `[R, K]` by its float32 scale `[ceil(R/block), ceil(K/block)]`."""
    spread = scale.repeat_interleave(block[0], 0)[: codes.shape[0]].repeat_interleave(block[1], 1)[:, : codes.shape[1]]
    weights = (codes.float() * spread).to(torch.bfloat16)
    if not (valid(scale) and weights.isfinite().all()):
        raise explain.bad_fp8(codes.view(torch.uint8).cpu().numpy(), scale.cpu().numpy(), block)
    return weights


def bf16_to_fp8(weights: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, Figures]:
    """Encode BF16 `[R, K]` as e4m3 codes `[R, K]` with a float32 scale for each block.

    A block whose weights are bf16(code * scale) for some scale, the largest with code 448, gets such a scale, the one
    nearest to amax/448, and its codes. One whose weights are codes times a power of two gets amax/448 rounded up to a
    normal power of two. Any other gets scale = amax/448, codes = w/scale rounded half to even and saturated. A block of
    zeros gets the scale 1.
    """
    codes, scale = _chosen(weights, block)
    return _stored(weights, codes, scale, block)


def fp8_scales(weights: Tensor, block: tuple[int, int]) -> Tensor:
    """Return the scales that `bf16_to_fp8` takes for BF16 `[R, K]`."""
    return _chosen(weights, block)[1]


def bf16_to_fp8_at(weights: Tensor, scale: Tensor, block: tuple[int, int]) -> tuple[Tensor, Figures]:
    """Round BF16 `[R, K]` to codes with float32 scales that are given, one for each block: w/scale, saturated."""
    require_finite(weights)
    require_divisor(scale)
    codes = _codes(_to_blocks(weights, block), scale.flatten())
    codes, _, figures = _stored(weights, codes, scale, block)
    return codes, figures


def _chosen(weights: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the codes `[B, N]`, and the scales, recovered where they can be, for each block."""
    require_finite(weights)
    blocks = _to_blocks(weights, block)
    amax = blocks.abs().amax(1).float()
    plain = torch.where(amax > 0, divided(amax, 448), 1.0)
    codes = _codes(blocks, plain)
    scale, fits = _recovered_fp8_scale(blocks, codes, plain)
    codes, scale = _on_powers_of_two(blocks, codes, scale, ~fits)
    rows, columns = -(-weights.shape[0] // block[0]), -(-weights.shape[1] // block[1])
    return codes, scale.view(rows, columns)


def _codes(blocks: Tensor, scale: Tensor) -> Tensor:
    """Return the codes `[B, N]` of blocks, each divided by its scale `[B]`."""
    return (blocks.float() / scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)


def _stored(weights: Tensor, codes: Tensor, scale: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, Figures]:
    """Return the codes of all blocks as a matrix, with scale and figures."""
    out = _from_blocks(codes.view(torch.uint8), weights.shape, block).view(torch.float8_e4m3fn)
    return out, scale, compare(weights, fp8_to_bf16(out, scale, block))


def _recovered_fp8_scale(blocks: Tensor, codes: Tensor, plain: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each block `[B, N]` the scale nearest to its plain one that gives its weights, and if there is one.

    `codes` are the e4m3 codes of `plain`. Each must stand for a single magnitude, and zero for zero alone. A product
    grows with its scale, so each code allows an interval of scales, whose ends a bisection of the bits finds.
    """
    magnitude = blocks.abs().view(torch.int16).long()
    code = codes.view(torch.uint8).long() & 0x7F
    empty = torch.zeros(blocks.shape[0], 127, dtype=torch.long, device=blocks.device)
    largest = empty.scatter_reduce(1, code, magnitude, "amax")
    smallest = (empty + 0x7FFF).scatter_reduce(1, code, magnitude, "amin")
    used = smallest <= largest
    single = (~used | (smallest == largest)).all(1) & (largest[:, 0] == 0)
    low = torch.where(used, least_scale(largest), 1)[:, 1:].amax(1)
    high = torch.where(used, least_scale(largest + 1) - 1, LARGEST_FLOAT)[:, 1:].amin(1)
    fits = single & (low <= high)
    start = plain.view(torch.int32).long()
    nearest = torch.where(fits, start.clamp(min=low).clamp(max=high), start)
    return nearest.int().view(torch.float32), fits


def _on_powers_of_two(blocks: Tensor, codes: Tensor, scale: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes `[B, N]` and scales `[B]`, those of a power of two where it is `asked` and gives all weights back.

    `scale` is amax/448 there. A weight is a code times 2^e if it has at most four significant bits, none below
    2^(e-9), and is at most 448 * 2^e: the least 2^e that reaches amax fits whenever any does. It need not be subnormal:
    no BF16 has a bit below 2^-133.
    """
    power = ((scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)
    found = _codes(blocks, power)
    exact = asked & ((found.float() * power[:, None]).to(torch.bfloat16) == blocks).all(1)
    bits = torch.where(exact[:, None], found.view(torch.uint8), codes.view(torch.uint8))
    return bits.view(torch.float8_e4m3fn), torch.where(exact, power, scale)


def least_scale(target: Tensor) -> Tensor:
    """Return the least float32 scale, as bits, whose product with the magnitude of column's code reaches BF16 bits."""
    code = torch.arange(127, dtype=torch.uint8, device=target.device).view(torch.float8_e4m3fn).float()
    low, high = torch.full_like(target, -1), torch.full_like(target, LARGEST_FLOAT)
    while (high - low > 1).any():
        middle = (low + high) // 2
        product = (code * middle.clamp(min=0).int().view(torch.float32)).to(torch.bfloat16).view(torch.int16)
        reaches = product >= target
        low, high = torch.where(reaches, low, middle), torch.where(reaches, middle, high)
    return high


def _to_blocks(weights: Tensor, block: tuple[int, int]) -> Tensor:
    """Return `[B, height * width]`; ragged edges are filled with zeros, which change no scale."""
    rows, columns = weights.shape
    full = pad(weights, (0, -columns % block[1], 0, -rows % block[0]))
    tiles = full.reshape(full.shape[0] // block[0], block[0], full.shape[1] // block[1], block[1])
    return tiles.transpose(1, 2).flatten(2).flatten(0, 1)


def _from_blocks(blocks: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """Undo `_to_blocks`."""
    tiles = blocks.view(-1, -(-shape[1] // block[1]), *block).transpose(1, 2)
    return tiles.flatten(2).flatten(0, 1)[: shape[0], : shape[1]].contiguous()
