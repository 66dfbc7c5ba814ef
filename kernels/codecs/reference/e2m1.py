"""E2M1 codes in plain torch: what NVFP4 and MXFP4 share."""

from __future__ import annotations

import torch
from torch import Tensor

from k2quant.kernels.codecs.fp4 import E2M1, THRESHOLDS, TIES_UP


def e2m1_codes(quotient: Tensor, negative: Tensor) -> Tensor:
    """Round float32 quotients to codes 0 to 15, uint8 of the same shape; ties go to the even code, 6 is the most.

    `negative` says which codes get the sign bit: the two formats differ in that, for zeros.
    """
    magnitude = quotient.abs()
    code = torch.zeros_like(quotient, dtype=torch.uint8)
    for threshold, up in zip(THRESHOLDS, TIES_UP, strict=True):
        code += (magnitude >= threshold if up else magnitude > threshold).to(torch.uint8)
    return code | (negative.to(torch.uint8) << 3)


def e2m1_numbers(codes: Tensor) -> Tensor:
    """Return the float32 numbers of codes 0 to 15, of the same shape; code 8 is -0."""
    table = torch.tensor([*E2M1, *(-number for number in E2M1)], dtype=torch.float32, device=codes.device)
    return table[codes.int()]


def pack_e2m1(codes: Tensor) -> Tensor:
    """Return uint8 bytes `[R, K/2]` of codes 0 to 15 `[R, K]`; the even column is the low nibble."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Return codes 0 to 15 `[.., K]` of uint8 bytes `[.., K/2]`."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)
