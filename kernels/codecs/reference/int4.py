"""INT4 in plain torch: words `torch.int32` with a BF16 scale for each group of 32 columns, and their rounding rules."""

from __future__ import annotations

import torch
from torch import Tensor

from k2quant.kernels.codecs import values as explain
from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.grids import GROUP, PACKED_BITS, Grid, largest_code
from k2quant.kernels.codecs.reference.bf16 import compare, divided, require_divisor, require_finite, valid
from k2quant.kernels.codecs.scales.recovery import CANDIDATES


def int4_to_bf16(packed: Tensor, scale: Tensor, group: int) -> Tensor:
    """Multiply each group of codes, in words `[R, K/8]`, by its float32 scale `[R, K/group]`."""
    weights = moonshot_values(unpack_int4(packed), scale.repeat_interleave(group, 1))
    if not (valid(scale) and weights.isfinite().all()):
        raise explain.bad_int4(packed.cpu().numpy(), scale.cpu().numpy(), group)
    return weights


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


def int4_scales(weights: Tensor, grid: Grid, *, recover: bool = True, bits: int = 4) -> Tensor:
    """Return the scales that `bf16_to_int4` takes for BF16 `[R, K]`."""
    largest = largest_code(grid, bits, PACKED_BITS)
    return _int4_scale(weights, grid, largest, recover=recover and bits == 4).reshape(len(weights), -1)


def bf16_to_int4_at(weights: Tensor, scale: Tensor, grid: Grid, bits: int = 4) -> tuple[Tensor, Figures]:
    """Encode BF16 `[R, K]` as `bf16_to_int4` does, but with BF16 scales `[R, K/32]` that are given."""
    largest = largest_code(grid, bits, PACKED_BITS)
    require_finite(weights)
    require_divisor(scale.float())
    packed = pack_int4(_codes_at(weights, scale, grid, largest).reshape(weights.shape))
    return packed, compare(weights, int4_to_bf16(packed, scale.float(), GROUP))


def int4_at_scale(weights: Tensor, scale: Tensor, bits: int = 4) -> tuple[Tensor, Tensor]:
    """Round BF16 `[R, K]` to codes of moonshot's grid with BF16 scales `[R, K/32]` that are given, not taken from amax.

    Returns:
        int32 codes `[R, K]`, -L..L, and the BF16 values `[R, K]` that they stand for.
    """
    require_finite(weights)
    codes = _codes_at(weights, scale, "moonshot", largest_code("moonshot", bits))
    return codes.reshape(weights.shape), _int4_values(weights, codes, scale.flatten(), bits)


def int4_inside(weights: Tensor, grid: Grid, bits: int = 4) -> Tensor:
    """Tell of BF16 `[R, K]` which codes, rounded plainly, were not clamped: bool `[R, K]`."""
    largest = largest_code(grid, bits)
    quotient = _quotient(weights, _int4_scale(weights, grid, largest, recover=False))
    lowest, highest = -largest, largest
    if grid == "compressed-tensors":
        quotient, lowest = quotient.to(torch.bfloat16).float(), -8
    rounded = quotient.round()
    return ((rounded >= lowest) & (rounded <= highest)).reshape(weights.shape)


def plain_int4_scale(weights: Tensor, grid: Grid, bits: int = 4) -> Tensor:
    """Return the BF16 scales `[R, K/32]` that plain rounding of BF16 `[R, K]` takes from each group's amax."""
    return _int4_scale(weights, grid, largest_code(grid, bits), recover=False).reshape(len(weights), -1)


def _int4_codes(weights: Tensor, grid: Grid, largest: int, *, recover: bool) -> tuple[Tensor, Tensor]:
    """Return the int32 codes `[G, 32]` and BF16 scales `[G]` of all groups."""
    scale = _int4_scale(weights, grid, largest, recover=recover)
    return _codes_at(weights, scale, grid, largest), scale


def _int4_scale(weights: Tensor, grid: Grid, largest: int, *, recover: bool) -> Tensor:
    """Return the BF16 scales `[G]` of all groups."""
    require_finite(weights)
    groups = weights.reshape(-1, GROUP)
    amax = groups.abs().amax(1).float()
    scale = divided(amax, 7.5 if grid == "compressed-tensors" else largest).to(torch.bfloat16)
    scale = torch.where(scale == 0, 2.0**-7, scale)
    if grid == "moonshot" and recover:
        scale = _recovered_int4_scale(groups, scale)
    return scale


def _codes_at(weights: Tensor, scale: Tensor, grid: Grid, largest: int) -> Tensor:
    """Return the int32 codes `[G, 32]` of all groups at their BF16 scales: the rounding rule of each grid."""
    quotient = _quotient(weights, scale)
    if grid == "compressed-tensors":
        codes = quotient.to(torch.bfloat16).float().clamp(-8, 7).round()
    else:
        codes = moonshot_codes(quotient, largest)
    return codes.to(torch.int32)


def moonshot_codes(quotient: Tensor, largest: int) -> Tensor:
    """Return float32 weights divided by their scales as codes, still float32: half to even, -L..L."""
    return quotient.round().clamp(-largest, largest)


def moonshot_values(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the BF16 values of codes at scales of the same shape, or one that is spread to it."""
    return (codes.float() * scale.float()).to(torch.bfloat16)


def _quotient(weights: Tensor, scale: Tensor) -> Tensor:
    """Return float32 `[G, 32]`, each group divided by its scale."""
    return weights.reshape(-1, GROUP).float() / scale.reshape(-1, 1).float()


def _int4_values(weights: Tensor, codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the BF16 values, in the shape of the weights that were encoded; refuse what exceeds BF16."""
    values = moonshot_values(codes, scale[:, None]).reshape(weights.shape)
    if not values.isfinite().all():
        raise explain.bad_group(weights.view(torch.uint16).cpu().numpy(), bits)
    return values


def pack_int4(codes: Tensor) -> Tensor:
    """Return int32 words `[R, K/8]` of codes -8..7 `[R, K]`; the lowest column is the lowest nibble, as code + 8."""
    shifts = torch.arange(0, 32, 4, device=codes.device)
    words = ((codes.long() + 8).reshape(*codes.shape[:-1], -1, 8) << shifts).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack_int4(packed: Tensor) -> Tensor:
    """Return int8 codes `[R, K]`, -8..7, of int32 words `[R, K/8]`."""
    shifts = torch.arange(0, 32, 4, device=packed.device)
    return (((packed[..., None] >> shifts) & 15) - 8).flatten(-2).to(torch.int8)


def _recovered_int4_scale(groups: Tensor, plain: Tensor) -> Tensor:
    """Return for each group `[G, 32]` the first candidate scale that gives all its weights; else its plain scale."""
    scale, found = plain.clone(), torch.zeros_like(plain, dtype=torch.bool)
    amax = groups.abs().amax(1).float()
    codes = torch.arange(8, device=groups.device)
    for k, ulp in CANDIDATES:
        bits = divided(amax, k).to(torch.bfloat16).view(torch.int16) + ulp
        candidate = bits.view(torch.bfloat16)
        products = (candidate.float()[:, None] * codes).to(torch.bfloat16)  # [G, 8]
        fits = (groups.abs()[:, :, None] == products[:, None, :]).any(2).all(1)
        fits &= (bits > 0) & candidate.isfinite() & (amax > 0) & ~found
        scale, found = torch.where(fits, candidate, scale), found | fits
    return scale
