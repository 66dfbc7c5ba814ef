"""Weights for a device: which layout is best there, and how a weight gets it.

A CPU's best layout is found by a probe (`cpu/linear`), so this stands above weights and products on a CPU.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from k2quant.kernels.codecs.grids import BLOCK
from k2quant.kernels.products.cpu import linear as linear_cpu
from k2quant.kernels.products.packed.fp8 import Fp8Weight
from k2quant.kernels.products.packed.int4 import ROW_MULTIPLE, Int4Weight
from k2quant.kernels.products.packed.mxfp4 import Mxfp4Weight
from k2quant.kernels.products.packed.nvfp4 import Nvfp4Weight
from k2quant.kernels.products.packed.weight import Layout, PackedWeight

PACKED: dict[str, type[PackedWeight]] = {
    kind.format: kind for kind in (Int4Weight, Fp8Weight, Nvfp4Weight, Mxfp4Weight)
}
"""Every packed format by its name."""

Kind = TypeVar("Kind", bound=PackedWeight)


def prepare_int4(weight_packed: Tensor, weight_scale: Tensor, *, layout: Layout | None = None) -> Int4Weight:
    """Lay an INT4 weight out for the device on which its tensors lie.

    Args:
        weight_packed: int32 words `[N, K/8]`, or `[E, N, K/8]` for experts, as a checkpoint holds them. Either grid.
        weight_scale: BF16 `[.., N, K/32]`, on the same device.
        layout: take this one instead of the one that is best for the device.

    Raises:
        UsageError: dtype, shape or device do not fit each other, or a scale is negative, NaN or infinite.
    """
    return Int4Weight.laid_out(weight_packed, weight_scale, layout or _best(Int4Weight, weight_packed))


def prepare_fp8(weight: Tensor, weight_scale_inv: Tensor, *, block: tuple[int, int] = BLOCK) -> Fp8Weight:
    """Check a block-FP8 weight and keep it as it is: its own layout is the one that the products read.

    Args:
        weight: e4m3 codes `[N, K]`, or `[E, N, K]` for experts.
        weight_scale_inv: float32 `[.., ceil(N/block[0]), ceil(K/block[1])]`; it multiplies, whatever its name says.
        block: rows and columns that share a scale; columns are a multiple of 32.

    Raises:
        UsageError: dtype, shape or device do not fit each other, a code is NaN, or a scale is negative or not finite.
    """
    return Fp8Weight.laid_out(weight, weight_scale_inv, numbers=block)


def prepare_nvfp4(codes: Tensor, weight_scale: Tensor, tensor_scale: Tensor, *, divides: bool) -> Nvfp4Weight:
    """Check an NVFP4 weight and keep it as it is: its own layout is the one that the products read.

    Args:
        codes: uint8 `[N, K/2]`, or `[E, N, K/2]` for experts: E2M1, the even column in the low nibble. K is a multiple
            of 32.
        weight_scale: `[.., N, K/16]`, float8_e4m3fn or its bits as uint8.
        tensor_scale: float32, one number or `[E]`: ModelOpt's `weight_scale_2`, or compressed-tensors'
            `weight_global_scale`.
        divides: False for the former, which multiplies the scales; True for the latter, which divides them.

    Raises:
        UsageError: dtype, shape or device do not fit each other, a scale is negative or NaN, or the tensor scale is
            negative, not finite, or divides by zero.
    """
    return Nvfp4Weight.laid_out(codes, weight_scale, numbers=(int(divides),), whole=tensor_scale)


def prepare_mxfp4(codes: Tensor, weight_scale: Tensor) -> Mxfp4Weight:
    """Check an MXFP4 weight and keep it as it is: its own layout is the one that the products read.

    Args:
        codes: uint8 `[N, K/2]`, or `[E, N, K/2]` for experts: E2M1, the even column in the low nibble.
        weight_scale: uint8 `[.., N, K/32]`: b stands for 2^(b - 127).

    Raises:
        UsageError: dtype, shape or device do not fit each other, or a scale is NaN (255).
    """
    return Mxfp4Weight.laid_out(codes, weight_scale)


def empty(
    weight_format: str,
    shape: tuple[int, ...],
    *,
    numbers: tuple[int, ...] = (),
    device: torch.device | str,
    for_device: torch.device | None = None,
) -> PackedWeight:
    """Return a weight `[N, K]` or `[E, N, K]` with whatever content.

    Args:
        weight_format: one of `PACKED`.
        shape: its shape.
        numbers: of the format, such as the block of FP8; Kimi K2's if left out, for NVFP4 a scale that multiplies.
        device: where its tensors lie.
        for_device: the device whose layout it has; `device` if left out.
    """
    kind = PACKED[weight_format]
    return kind.empty(shape, best_layout(for_device or torch.device(device), shape[-2], kind), numbers, device=device)


def moved(weight: Kind, device: torch.device) -> Kind:
    """Return a weight on another device, in the layout that is best there; one without content keeps its layout."""
    codes, scale, whole = weight.codes, weight.scale, weight.whole
    layout = weight.layout
    if "meta" not in {device.type, codes.device.type}:
        layout = best_layout(device, 0 if 0 in weight.shape else weight.shape[-2], type(weight))
    if layout == weight.layout:
        return weight.holding(codes.to(device), scale.to(device), None if whole is None else whole.to(device))
    codes, scale, *more = (tensor.to(device) for tensor in weight.checkpoint())
    return weight.laid_out(codes, scale, layout, weight.numbers, *more)


def best_layout(device: torch.device, rows: int, kind: type[PackedWeight] = Int4Weight) -> Layout:
    """Return the layout in which a device reads weights of so many rows fastest."""
    if device.type == "cuda":
        return kind.gpu_layout
    if device.type != "cpu" or kind.layouts == ("rows",):
        return "rows"
    layout = linear_cpu.best_layout()
    return layout if layout != "torch" or (rows and rows % ROW_MULTIPLE == 0) else "rows"


def _best(kind: type[PackedWeight], codes: Tensor) -> Layout:
    """Return the best layout for a checkpoint's codes; those that are no matrix are refused later."""
    return best_layout(codes.device, 0 if 0 in codes.shape or codes.ndim < 2 else codes.shape[-2], kind)
