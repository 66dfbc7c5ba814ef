"""BF16 in plain torch: rounding to it, figures of it, and what the other formats ask of weights and scales."""

from __future__ import annotations

import torch
from torch import Tensor

from k2quant.kernels.codecs import values as explain
from k2quant.kernels.codecs.figures import Figures

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


def compare(before: Tensor, after: Tensor) -> Figures:
    """Return the figures of BF16 `after` against the truth `before`; the sums are float64, in torch's order."""
    require_finite(before)
    require_finite(after)
    error = (before.float() - after.float()).abs()
    return Figures(
        count=before.numel(),
        changed=int((error > 0).sum()),
        energy=float(before.double().square().sum()),
        error=float(error.double().square().sum()),
        worst=float(error.max()) if error.numel() else 0.0,
    )


def largest(weights: Tensor) -> float:
    """Return the largest magnitude of BF16 `[R, K]`, 0.0 of nothing; refuse what is NaN or infinite."""
    require_finite(weights)
    return float(weights.abs().amax()) if weights.numel() else 0.0


def divided(amax: Tensor, divisor: float) -> Tensor:
    """Divide truly: on CUDA, torch multiplies by the reciprocal when the divisor is a plain number."""
    return amax / torch.full_like(amax, divisor)


def valid(scale: Tensor) -> bool:
    """Return whether every scale is finite and has no sign."""
    bits = scale.contiguous().view(torch.int32)
    return bool(((bits >= 0) & (bits <= LARGEST_FLOAT)).all())


def require_finite(weights: Tensor) -> None:
    """Refuse BF16 that is NaN or infinite."""
    if not weights.isfinite().all():
        raise explain.bad_weight(weights.view(torch.uint16).cpu().numpy())


def require_divisor(scale: Tensor) -> None:
    """Refuse float32 scales that are bad or zero: there are no codes at them."""
    if (error := explain.bad_divisor(scale.cpu().numpy())) is not None:
        raise error
