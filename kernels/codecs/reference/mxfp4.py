"""MXFP4 in plain torch: codes of E2M1, and a power of two for each 32 columns.

Codes are uint8 `[R, K/2]`, scales bytes `[R, K/32]` of E8M0: b is 2^(b - 127), and 255 is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from k2quant.kernels.codecs import fp4
from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.fp4 import MXFP4_BLOCK
from k2quant.kernels.codecs.reference.bf16 import compare, require_finite
from k2quant.kernels.codecs.reference.e2m1 import e2m1_codes, e2m1_numbers, pack_e2m1, unpack_e2m1


def mxfp4_to_bf16(codes: Tensor, scale: Tensor) -> Tensor:
    """Return code * 2^(byte - 127), which BF16 holds exactly; code 8 gives -0."""
    values = _products(unpack_e2m1(codes), scale)
    if bool((scale == fp4.NAN_E8M0).any()) or not values.isfinite().all():
        raise fp4.bad_mxfp4(codes.cpu().numpy(), scale.cpu().numpy())
    return values


def mxfp4_scales(weights: Tensor) -> Tensor:
    """Return the scales that `bf16_to_mxfp4` takes for BF16 `[R, K]`, bytes `[R, K/32]`."""
    require_finite(weights)
    return plain_mxfp4_scales(weights)


def plain_mxfp4_scales(weights: Tensor) -> Tensor:
    """Return the bytes of compressed-tensors' rule: a quarter of the largest power of two up to a block's amax.

    Where amax is 1.75 times that power, or more, the next power counts. So the largest weight becomes 4 or 6. No byte
    is below 0: blocks whose largest weight is below 2^-125, and blocks of zeros, get 2^-127.
    """
    amax = mxfp4_blocks(weights).abs().amax(2).view(torch.int16).int()
    return (((amax + 0x20) >> 7) - 2).clamp(min=0).to(torch.uint8)


def bf16_to_mxfp4_at(weights: Tensor, scale: Tensor) -> tuple[Tensor, Figures]:
    """Round BF16 `[R, K]` to codes at scales that are given, w / 2^(byte - 127); a tie goes to the even code.

    A weight's sign stays, also that of zero.
    """
    require_finite(weights)
    if bool((scale == fp4.NAN_E8M0).any()):
        raise fp4.bad_mxfp4(scale.new_zeros(len(scale), weights.shape[1] // 2).cpu().numpy(), scale.cpu().numpy())
    codes = mxfp4_codes(weights, scale)
    return pack_e2m1(codes), compare(weights, _stored(weights, codes, scale))


def bf16_to_mxfp4(weights: Tensor) -> tuple[Tensor, Tensor, Figures]:
    """Encode BF16 `[R, K]` as codes `[R, K/2]` and scales `[R, K/32]`: `plain_mxfp4_scales`, then codes at them."""
    scale = mxfp4_scales(weights)
    codes, figures = bf16_to_mxfp4_at(weights, scale)
    return codes, scale, figures


def fake_quantize_mxfp4(weights: Tensor) -> Tensor:
    """Return BF16 `[R, K]`, rounded as `bf16_to_mxfp4` rounds and decoded."""
    scale = mxfp4_scales(weights)
    return _stored(weights, mxfp4_codes(weights, scale), scale)


def mxfp4_inside(weights: Tensor) -> Tensor:
    """Tell of BF16 `[R, K]` which weights are at most 6 times the scale of the plain rule: bool `[R, K]`.

    Of blocks whose amax is above 1.5 times a power of two, and below 1.75 times, the largest weights are beyond.
    """
    scale = e8m0_powers(plain_mxfp4_scales(weights))
    return (mxfp4_blocks(weights).float().abs() / scale[..., None] <= fp4.LARGEST_E2M1).reshape(weights.shape)


def mxfp4_codes(weights: Tensor, scale: Tensor) -> Tensor:
    """Return the codes 0 to 15 `[R, K]` of BF16 `[R, K]` at scales, without checks."""
    quotient = (mxfp4_blocks(weights).float() / e8m0_powers(scale)[..., None]).reshape(weights.shape)
    return e2m1_codes(quotient, weights.signbit())


def mxfp4_exponents(codes: Tensor, scale: Tensor) -> tuple[int, int] | None:
    """Return the least and the largest byte - 127 of blocks with a code other than 0 and 8; None if none has."""
    used = (mxfp4_blocks(unpack_e2m1(codes)) & 7 > 0).any(2)
    if bool((used & (scale == fp4.NAN_E8M0)).any()):
        raise fp4.bad_mxfp4(codes.cpu().numpy(), scale.cpu().numpy())
    if not used.any():
        return None
    exponents = scale[used].int() - fp4.MXFP4_BIAS
    return int(exponents.min()), int(exponents.max())


def restated_nvfp4(codes: Tensor, scale: Tensor, exponent: int, *, empty: int) -> tuple[Tensor, Tensor, int]:
    """Return MXFP4 as NVFP4 with a tensor scale that means 2^exponent: codes, block scales `[R, K/16]`, and a count.

    Each block becomes two, of the scale 2^(byte - 127 - exponent), with the same codes. A half without a code other
    than 0 and 8 gets the scale `empty`. Where that power is below 2^-9, E4M3's least, it is 2^-9, and codes are rounded
    there, ties to even, signs kept: the count is of halves that are rounded so. `fp4.closed_form` leaves none.

    Raises:
        ValueAt: MXFP4 cannot be decoded; or a block in use needs a scale above 2^8, of which E4M3 has no powers.
    """
    mxfp4_to_bf16(codes, scale)  # for its checks
    given = unpack_e2m1(codes)
    power = scale.repeat_interleave(2, 1).int() - fp4.MXFP4_BIAS - exponent
    used = (given.unflatten(1, (-1, fp4.NVFP4_BLOCK)) & 7 > 0).any(2)
    if bool((used & (power > fp4.MOST_POWER)).any()):
        raise fp4.beyond_closed_form(scale.cpu().numpy(), (used & (power > fp4.MOST_POWER)).cpu().numpy(), exponent)
    stored = power.clamp(min=fp4.LEAST_POWER)
    shift = torch.where(used, power - stored, 0).float().exp2().repeat_interleave(fp4.NVFP4_BLOCK, 1)
    moved = pack_e2m1(e2m1_codes(e2m1_numbers(given) * shift, given > 7))
    bits = torch.where(used, stored, 0).float().exp2().to(torch.float8_e4m3fn).view(torch.uint8)
    return moved, torch.where(used, bits, empty), int((used & (power < stored)).sum())


def mxfp4_blocks(weights: Tensor) -> Tensor:
    """Return `[R, K/32, 32]`."""
    blocks: Tensor = weights.unflatten(1, (-1, MXFP4_BLOCK))
    return blocks


def e8m0_powers(scale: Tensor) -> Tensor:
    """Return float32 2^(byte - 127), subnormal for byte 0; NaN for 255."""
    bits = torch.where(scale == 0, 0x00400000, scale.int() << 23)
    return torch.where(scale == fp4.NAN_E8M0, 0x7FC00000, bits).to(torch.int32).view(torch.float32)


def _products(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the BF16 values `[R, K]` of codes 0 to 15 `[R, K]`, whatever they are."""
    return (mxfp4_blocks(e2m1_numbers(codes)) * e8m0_powers(scale)[..., None]).to(torch.bfloat16).reshape(codes.shape)


def _stored(weights: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Return the BF16 values of codes that stand for these weights; refuse what exceeds BF16."""
    values = _products(codes, scale)
    if not values.isfinite().all():
        raise fp4.bad_block(weights.view(torch.uint16).cpu().numpy(), "an MXFP4")
    return values
