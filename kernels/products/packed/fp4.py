"""What NVFP4 and MXFP4 weights have in common: E2M1 codes, two a byte."""

from __future__ import annotations

import torch
from torch import Tensor

from k2quant.errors import UsageError
from k2quant.kernels.codecs import reference
from k2quant.kernels.products.packed.weight import GROUP, check_device


def values(codes: Tensor) -> Tensor:
    """Return the float32 numbers `[.., K]` that codes `[.., K/2]` stand for."""
    return reference.e2m1_numbers(reference.unpack_e2m1(codes))


def check_codes(codes: Tensor, scale: Tensor, block: int, scales: tuple[torch.dtype, ...]) -> None:
    """Raise UsageError unless codes and the scales of blocks of so many columns fit each other.

    Args:
        codes: uint8 `[N, K/2]` or `[E, N, K/2]`.
        scale: `[.., N, K/block]`.
        block: columns that share a scale.
        scales: dtypes that the scales may have.
    """
    if codes.dtype != torch.uint8 or scale.dtype not in scales:
        raise UsageError(f"expected uint8 codes and {scales[0]} weight_scale, found {codes.dtype} and {scale.dtype}")
    if codes.ndim not in (2, 3) or codes.shape[-1] * 2 % GROUP:
        raise UsageError(
            f"codes: expected [N, K/2] or [E, N, K/2] with K a multiple of {GROUP}, found {list(codes.shape)}"
        )
    expected = [*codes.shape[:-1], codes.shape[-1] * 2 // block]
    if list(scale.shape) != expected:
        raise UsageError(f"weight_scale: expected {expected} for codes {list(codes.shape)}, found {list(scale.shape)}")
    check_device(codes, scale)
