"""What each codec means, in plain torch: the truth that the fast codecs are held to, bit for bit.

Weights are `torch.bfloat16`, FP8 codes `torch.float8_e4m3fn`, packed INT4 words `torch.int32`; scales are float32 going
in, and what the format stores coming out. Every function takes tensors on one device and returns tensors there.
A bad value raises `ValueAt`. No speed tricks: a block, a group and a candidate scale are just more dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from k2quant.kernels.codecs import values as explain
from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.grids import PACKED_BITS, Grid, largest_code
from k2quant.kernels.codecs.recovery import CANDIDATES

GROUP = 32
LARGEST_FLOAT = 0x7F7FFFFF
"""Bits of the largest finite float32; as int32 bits, negative numbers lie below 0."""


def float_to_bf16(values: Tensor) -> Tensor:
    """Round float32 or float16 `[R, K]` to BF16, half to even; refuse what is, or would become, NaN or infinite."""
    weights = values.to(torch.bfloat16)
    if not weights.isfinite().all():
        raise explain.bad_float(values.cpu().numpy())
    return weights


def double_to_bf16(values: Tensor) -> Tensor:
    """Round float64 to BF16, half to even, once; what exceeds BF16 becomes infinity.

    torch's own cast leads over float32 and rounds twice: `values.double_to_bf16` says what that does to ties.
    """
    narrow = values.float()
    bits, side = narrow.view(torch.int32), (values.abs() - narrow.abs().double()).sign().to(torch.int32)
    ties = (bits & 0xFFFF) == 0x8000
    return torch.where(ties, bits + side, bits).view(torch.float32).to(torch.bfloat16)


def fp8_to_bf16(codes: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """Multiply each block of e4m3 codes `[R, K]` by its float32 scale `[ceil(R/block), ceil(K/block)]`."""
    spread = scale.repeat_interleave(block[0], 0)[: codes.shape[0]].repeat_interleave(block[1], 1)[:, : codes.shape[1]]
    weights = (codes.float() * spread).to(torch.bfloat16)
    if not (_valid(scale) and weights.isfinite().all()):
        raise explain.bad_fp8(codes.view(torch.uint8).cpu().numpy(), scale.cpu().numpy(), block)
    return weights


def int4_to_bf16(packed: Tensor, scale: Tensor, group: int) -> Tensor:
    """Multiply each group of codes, in words `[R, K/8]`, by its float32 scale `[R, K/group]`."""
    weights = (unpack_int4(packed).float() * scale.repeat_interleave(group, 1)).to(torch.bfloat16)
    if not (_valid(scale) and weights.isfinite().all()):
        raise explain.bad_int4(packed.cpu().numpy(), scale.cpu().numpy(), group)
    return weights


def bf16_to_fp8(weights: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, Figures]:
    """Encode BF16 `[R, K]` as e4m3 codes `[R, K]` with a float32 scale for each block.

    A block whose weights are bf16(code * scale) for some scale gets such a scale, the one nearest to amax/448, and its
    codes. Any other gets scale = amax/448, codes = w/scale rounded half to even and saturated. A block of zeros gets
    the scale 1.
    """
    _require_finite(weights)
    blocks = _to_blocks(weights, block)
    amax = blocks.abs().amax(1).float()
    plain = torch.where(amax > 0, _divided(amax, 448), 1.0)
    codes = (blocks.float() / plain[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = _recovered_fp8_scale(blocks, codes, plain)
    rows, columns = -(-weights.shape[0] // block[0]), -(-weights.shape[1] // block[1])
    out, scale = _from_blocks(codes.view(torch.uint8), weights.shape, block), scale.view(rows, columns)
    out = out.view(torch.float8_e4m3fn)
    return out, scale, compare(weights, fp8_to_bf16(out, scale, block))


def bf16_to_int4(weights: Tensor, grid: Grid, *, recover: bool = True, bits: int = 4) -> tuple[Tensor, Tensor, Figures]:
    """Encode BF16 `[R, K]` as INT4 words `[R, K/8]` with a BF16 scale `[R, K/32]` for each group of 32 columns.

    moonshot: the first candidate scale that gives all weights of the group (`recovery.CANDIDATES`), if `recover` and
    with 4 bits; else scale = bf16(amax/L), codes = w/scale rounded half to even, -L..L, where L = 2^(bits-1) - 1.
    compressed-tensors: scale = bf16(amax/7.5), codes = bf16(w/scale) clamped to -8..7, then rounded half to even.
    A scale that would be zero is 2^-7. `bits` is 4, 3 or 2.
    """
    codes, scale = _int4_codes(weights, grid, largest_code(grid, bits, PACKED_BITS), recover=recover and bits == 4)
    packed = pack_int4(codes.reshape(weights.shape))
    scale = scale.reshape(weights.shape[0], -1)
    return packed, scale, compare(weights, _int4_values(weights, codes, scale.flatten(), bits))


def fake_quantize_int4(weights: Tensor, grid: Grid, bits: int = 4) -> Tensor:
    """Return BF16 `[R, K]`, rounded as `bf16_to_int4` rounds without recovery and decoded; `bits` may also be 8."""
    codes, scale = _int4_codes(weights, grid, largest_code(grid, bits), recover=False)
    return _int4_values(weights, codes, scale, bits)


def int4_at_scale(weights: Tensor, scale: Tensor, bits: int = 4) -> tuple[Tensor, Tensor]:
    """Round BF16 `[R, K]` to codes of moonshot's grid with BF16 scales `[R, K/32]` that are given, not taken from amax.

    Returns:
        int32 codes `[R, K]`, -L..L, and the BF16 values `[R, K]` that they stand for.
    """
    _require_finite(weights)
    codes = _moonshot_codes(_quotient(weights, scale), largest_code("moonshot", bits)).to(torch.int32)
    return codes.reshape(weights.shape), _int4_values(weights, codes, scale.flatten(), bits)


def int4_inside(weights: Tensor, grid: Grid, bits: int = 4) -> Tensor:
    """Tell of BF16 `[R, K]` which codes, rounded plainly, were not clamped: bool `[R, K]`."""
    largest = largest_code(grid, bits)
    _, scale = _int4_codes(weights, grid, largest, recover=False)
    quotient = _quotient(weights, scale)
    lowest, highest = -largest, largest
    if grid == "compressed-tensors":
        quotient, lowest = quotient.to(torch.bfloat16).float(), -8
    rounded = quotient.round()
    return ((rounded >= lowest) & (rounded <= highest)).reshape(weights.shape)


def plain_int4_scale(weights: Tensor, grid: Grid, bits: int = 4) -> Tensor:
    """Return the BF16 scales `[R, K/32]` that plain rounding of BF16 `[R, K]` takes from each group's amax."""
    _, scale = _int4_codes(weights, grid, largest_code(grid, bits), recover=False)
    return scale.reshape(len(weights), -1)


def _int4_codes(weights: Tensor, grid: Grid, largest: int, *, recover: bool) -> tuple[Tensor, Tensor]:
    """Return the int32 codes `[G, 32]` and BF16 scales `[G]` of all groups."""
    _require_finite(weights)
    groups = weights.reshape(-1, GROUP)
    amax = groups.abs().amax(1).float()
    scale = _divided(amax, 7.5 if grid == "compressed-tensors" else largest).to(torch.bfloat16)
    scale = torch.where(scale == 0, 2.0**-7, scale)
    if grid == "moonshot" and recover:
        scale = _recovered_int4_scale(groups, scale)
    quotient = _quotient(weights, scale)
    if grid == "compressed-tensors":
        codes = quotient.to(torch.bfloat16).float().clamp(-8, 7).round()
    else:
        codes = _moonshot_codes(quotient, largest)
    return codes.to(torch.int32), scale


def _quotient(weights: Tensor, scale: Tensor) -> Tensor:
    """Return float32 `[G, 32]`, each group divided by its scale."""
    return weights.reshape(-1, GROUP).float() / scale.reshape(-1, 1).float()


def _moonshot_codes(quotient: Tensor, largest: int) -> Tensor:
    return quotient.round().clamp(-largest, largest)


def _int4_values(weights: Tensor, codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the BF16 values, in the shape of the weights that were encoded; refuse what exceeds BF16."""
    values = (codes.float() * scale.float()[:, None]).to(torch.bfloat16).reshape(weights.shape)
    if not values.isfinite().all():
        raise explain.bad_group(weights.view(torch.uint16).cpu().numpy(), bits)
    return values


def fp8_to_int4(codes: Tensor, scale: Tensor, block: tuple[int, int], grid: Grid) -> tuple[Tensor, Tensor, Figures]:
    """Encode FP8 as INT4 through BF16."""
    return bf16_to_int4(fp8_to_bf16(codes, scale, block), grid)


def int4_to_fp8(packed: Tensor, scale: Tensor, group: int, block: tuple[int, int]) -> tuple[Tensor, Tensor, Figures]:
    """Encode INT4 as FP8 through BF16."""
    return bf16_to_fp8(int4_to_bf16(packed, scale, group), block)


def compare(before: Tensor, after: Tensor) -> Figures:
    """Return the figures of BF16 `after` against the truth `before`; the sums are float64, in torch's order."""
    _require_finite(before)
    _require_finite(after)
    error = (before.float() - after.float()).abs()
    return Figures(
        count=before.numel(),
        changed=int((error > 0).sum()),
        energy=float(before.double().square().sum()),
        error=float(error.double().square().sum()),
        worst=float(error.max()) if error.numel() else 0.0,
    )


def pack_int4(codes: Tensor) -> Tensor:
    """Return int32 words `[R, K/8]` of codes -8..7 `[R, K]`; the lowest column is the lowest nibble, as code + 8."""
    shifts = torch.arange(0, 32, 4, device=codes.device)
    words = ((codes.long() + 8).reshape(*codes.shape[:-1], -1, 8) << shifts).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack_int4(packed: Tensor) -> Tensor:
    """Return int8 codes `[R, K]`, -8..7, of int32 words `[R, K/8]`."""
    shifts = torch.arange(0, 32, 4, device=packed.device)
    return (((packed[..., None] >> shifts) & 15) - 8).flatten(-2).to(torch.int8)


def _divided(amax: Tensor, divisor: float) -> Tensor:
    """Divide truly: on CUDA, torch multiplies by the reciprocal when the divisor is a plain number."""
    return amax / torch.full_like(amax, divisor)


def _recovered_int4_scale(groups: Tensor, plain: Tensor) -> Tensor:
    """Return for each group `[G, 32]` the first candidate scale that gives all its weights; else its plain scale."""
    scale, found = plain.clone(), torch.zeros_like(plain, dtype=torch.bool)
    amax = groups.abs().amax(1).float()
    codes = torch.arange(8, device=groups.device)
    for k, ulp in CANDIDATES:
        bits = _divided(amax, k).to(torch.bfloat16).view(torch.int16) + ulp
        candidate = bits.view(torch.bfloat16)
        products = (candidate.float()[:, None] * codes).to(torch.bfloat16)  # [G, 8]
        fits = (groups.abs()[:, :, None] == products[:, None, :]).any(2).all(1)
        fits &= (bits > 0) & candidate.isfinite() & (amax > 0) & ~found
        scale, found = torch.where(fits, candidate, scale), found | fits
    return scale


def _recovered_fp8_scale(blocks: Tensor, codes: Tensor, plain: Tensor) -> Tensor:
    """Return for each block `[B, N]` the scale nearest to its plain one that gives its weights; else the plain one.

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
    low = torch.where(used, _least_scale(largest), 1)[:, 1:].amax(1)
    high = torch.where(used, _least_scale(largest + 1) - 1, LARGEST_FLOAT)[:, 1:].amin(1)
    fits = single & (low <= high)
    start = plain.view(torch.int32).long()
    nearest = torch.where(fits, start.clamp(min=low).clamp(max=high), start)
    return torch.where(largest[:, 1:].amax(1) > 0, nearest.int().view(torch.float32), plain)


def _least_scale(target: Tensor) -> Tensor:
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


def _valid(scale: Tensor) -> bool:
    """Return whether every scale is finite and has no sign."""
    bits = scale.contiguous().view(torch.int32)
    return bool(((bits >= 0) & (bits <= LARGEST_FLOAT)).all())


def _require_finite(weights: Tensor) -> None:
    if not weights.isfinite().all():
        raise explain.bad_weight(weights.view(torch.uint16).cpu().numpy())
