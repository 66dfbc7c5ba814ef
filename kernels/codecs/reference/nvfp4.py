"""NVFP4 in plain torch: codes of E2M1, an E4M3 scale for each 16 columns, one float32 for the tensor.

Codes are uint8 `[R, K/2]`, block scales the bits of E4M3, uint8 `[R, K/16]`. The tensor scale is a float32 tensor of
one number, on the device of the others; `divides` says which of its two forms it has (`fp4.TensorScale`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from k2quant.kernels.codecs import fp4
from k2quant.kernels.codecs.figures import Figures
from k2quant.kernels.codecs.fp4 import LARGEST_E2M1, LARGEST_E4M3, LEAST_E4M3, NVFP4_BLOCK, TensorScale
from k2quant.kernels.codecs.reference.bf16 import compare, divided, require_finite
from k2quant.kernels.codecs.reference.e2m1 import e2m1_codes, e2m1_numbers, pack_e2m1, unpack_e2m1


def nvfp4_to_bf16(codes: Tensor, scale: Tensor, tensor: Tensor, *, divides: bool) -> Tensor:
    """Return bf16(float32(code * S)), where S is the block's scale in use, `nvfp4_block_scales`; code 8 gives -0."""
    values = _products(unpack_e2m1(codes), scale, tensor, divides=divides)
    meant = TensorScale(float(tensor), divides)
    fp4.check_tensor(meant)
    if bool((scale >= fp4.NAN_E4M3).any()) or not values.isfinite().all():
        raise fp4.bad_nvfp4(codes.cpu().numpy(), scale.cpu().numpy(), meant)
    return values


def nvfp4_block_scales(scale: Tensor, tensor: Tensor, *, divides: bool) -> Tensor:
    """Return S `[R, K/16]`: float32(e4m3 scale), times or divided by the tensor scale, rounded to float32."""
    wide = scale.view(torch.float8_e4m3fn).float()
    one = tensor.reshape(1, 1)
    return wide / one if divides else wide * one


def nvfp4_tensor_scale(amax: Tensor, *, divides: bool) -> Tensor:
    """Return `fp4.tensor_scale` of a float32 tensor that holds one amax, without waiting for its device."""
    full = torch.full_like(amax, LARGEST_E2M1 * LARGEST_E4M3)
    if not divides:
        return torch.where(amax == 0, 1.0, amax / full)
    inverse = (torch.ones_like(amax) / amax).to(torch.bfloat16).float()
    found = (full * inverse).to(torch.bfloat16).float()
    return torch.where(found.isinf(), 1.0, found)


def nvfp4_scales(weights: Tensor, tensor: Tensor, *, divides: bool) -> Tensor:
    """Return the block scales of the plain rule, E4M3 bits `[R, K/16]`, for BF16 `[R, K]`.

    The tensor scale multiplies: e4m3(amax / (6 * value)), at least 2^-9; 1.0 where the quotient is zero (ModelOpt).
    It divides: e4m3(value * bf16(amax / 6)); 0.125 where that rounds to zero (compressed-tensors). Rounded half to
    even, saturated at 448.
    """
    require_finite(weights)
    fp4.check_tensor(TensorScale(float(tensor), divides), divisor=True)
    return plain_nvfp4_scales(weights, tensor, divides=divides)


def plain_nvfp4_scales(weights: Tensor, tensor: Tensor, *, divides: bool) -> Tensor:
    """Do `nvfp4_scales` without its checks."""
    quotient = nvfp4_quotients(weights, tensor, divides=divides)
    if divides:
        bits = e4m3_bits(quotient)
        return torch.where(bits == 0, fp4.EMPTY_DIVIDES, bits)
    return torch.where(quotient == 0, fp4.EMPTY_MULTIPLIES, e4m3_bits(quotient.clamp(min=LEAST_E4M3)))


def nvfp4_quotients(weights: Tensor, tensor: Tensor, *, divides: bool) -> Tensor:
    """Return what the block scales `[R, K/16]` are before they are rounded, in float32."""
    amax = nvfp4_blocks(weights).abs().amax(2).float()
    value = tensor.reshape(1, 1)
    if divides:
        return value * divided(amax, LARGEST_E2M1).to(torch.bfloat16).float()
    return amax / (LARGEST_E2M1 * value)


def e4m3_bits(values: Tensor) -> Tensor:
    """Round float32 from 0 up to E4M3 bits, half to even, saturated at 448."""
    return values.clamp(max=LARGEST_E4M3).to(torch.float8_e4m3fn).view(torch.uint8)


def bf16_to_nvfp4_at(weights: Tensor, scale: Tensor, tensor: Tensor, *, divides: bool) -> tuple[Tensor, Figures]:
    """Round BF16 `[R, K]` to codes at block scales that are given: float32(w / S), a tie to the even code.

    A quotient below zero has the sign bit, also where it rounds to zero; -0 has none.
    """
    require_finite(weights)
    error = fp4.bad_nvfp4_divisor(scale.cpu().numpy(), TensorScale(float(tensor), divides))
    if error is not None:
        raise error
    codes = nvfp4_codes(weights, scale, tensor, divides=divides)
    return pack_e2m1(codes), compare(weights, _stored(weights, codes, scale, tensor, divides=divides))


def bf16_to_nvfp4(weights: Tensor, tensor: Tensor, *, divides: bool) -> tuple[Tensor, Tensor, Figures]:
    """Encode BF16 `[R, K]` as codes `[R, K/2]` and block scales `[R, K/16]`: `nvfp4_scales`, then codes at them."""
    scale = nvfp4_scales(weights, tensor, divides=divides)
    codes, figures = bf16_to_nvfp4_at(weights, scale, tensor, divides=divides)
    return codes, scale, figures


def fake_quantize_nvfp4(weights: Tensor, tensor: Tensor, *, divides: bool) -> Tensor:
    """Return BF16 `[R, K]`, rounded as `bf16_to_nvfp4` rounds and decoded."""
    scale = nvfp4_scales(weights, tensor, divides=divides)
    return _stored(weights, nvfp4_codes(weights, scale, tensor, divides=divides), scale, tensor, divides=divides)


def nvfp4_inside(weights: Tensor, tensor: Tensor, *, divides: bool) -> Tensor:
    """Tell of BF16 `[R, K]` which weights are at most 6 S, so that their codes are not clamped: bool `[R, K]`.

    Block scales are those of the plain rule. E4M3 may round one down, and then the block's largest weight is beyond.
    """
    factor = nvfp4_block_scales(plain_nvfp4_scales(weights, tensor, divides=divides), tensor, divides=divides)
    return (nvfp4_blocks(weights).float().abs() / factor[..., None] <= LARGEST_E2M1).reshape(weights.shape)


def nvfp4_codes(weights: Tensor, scale: Tensor, tensor: Tensor, *, divides: bool) -> Tensor:
    """Return the codes 0 to 15 `[R, K]` of BF16 `[R, K]` at block scales, without checks."""
    factor = nvfp4_block_scales(scale, tensor, divides=divides)
    quotient = (nvfp4_blocks(weights).float() / factor[..., None]).reshape(weights.shape)
    return e2m1_codes(quotient, quotient < 0)


def nvfp4_blocks(weights: Tensor) -> Tensor:
    """Return `[R, K/16, 16]`."""
    blocks: Tensor = weights.unflatten(1, (-1, NVFP4_BLOCK))
    return blocks


def _products(codes: Tensor, scale: Tensor, tensor: Tensor, *, divides: bool) -> Tensor:
    """Return the BF16 values `[R, K]` of codes 0 to 15 `[R, K]`, whatever they are."""
    factor = nvfp4_block_scales(scale, tensor, divides=divides)
    return (nvfp4_blocks(e2m1_numbers(codes)) * factor[..., None]).to(torch.bfloat16).reshape(codes.shape)


def _stored(weights: Tensor, codes: Tensor, scale: Tensor, tensor: Tensor, *, divides: bool) -> Tensor:
    """Return the BF16 values of codes that stand for these weights; refuse what exceeds BF16."""
    values = _products(codes, scale, tensor, divides=divides)
    if not values.isfinite().all():
        raise fp4.bad_block(weights.view(torch.uint16).cpu().numpy(), "an NVFP4")
    return values
