"""Block-FP8 weights as the products read them: the checkpoint's own layout, everywhere.

e4m3 codes `[N, K]` with float32 scales `[ceil(N/rows), ceil(K/columns)]` of a block. A tile of codes lies in one block,
so its product is scaled as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from k2quant.errors import UsageError
from k2quant.kernels.codecs.grids import BLOCK
from k2quant.kernels.products.packed.weight import GROUP, Layout, check_device, check_parts, check_rows, check_scale
from k2quant.kernels.products.tables.configs import Product


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Weight:
    """A block-FP8 weight, or a stack of those of all experts. Made by `prepare_fp8`; always in the layout `rows`."""

    codes: Tensor
    scale: Tensor
    block: tuple[int, int]

    format: ClassVar[str] = "fp8"
    layout: ClassVar[Layout] = "rows"
    layouts: ClassVar[tuple[Layout, ...]] = ("rows",)
    gpu_layout: ClassVar[Layout] = "rows"
    products: ClassVar[tuple[Product, ...]] = ("linear", "w8a8", "gate_up", "down")
    tile_in_block: ClassVar[bool] = True
    tile_bytes: ClassVar[float] = 1.0
    views: ClassVar[bool] = True
    whole: ClassVar[None] = None

    @property
    def numbers(self) -> tuple[int, ...]:
        """Rows and columns of a block."""
        return self.block

    @property
    def shape(self) -> tuple[int, ...]:
        """`(N, K)`, or `(E, N, K)` for experts."""
        return tuple(self.codes.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that codes and scales take."""
        return self.codes.nbytes + self.scale.nbytes

    @property
    def bits(self) -> Tensor:
        """The codes as bytes: torch's own checks of operators do arithmetic that FP8 lacks."""
        return self.codes.view(torch.uint8)

    @classmethod
    def of(
        cls,
        bits: Tensor,
        scale: Tensor,
        layout: Layout,  # noqa: ARG003 - rows
        numbers: tuple[int, ...],
        whole: Tensor | None = None,  # noqa: ARG003 - it has none
    ) -> Self:
        """Return the weight of `bits`, `scale`, `layout` and `numbers`, unchecked."""
        rows, columns = numbers
        return cls(bits.view(torch.float8_e4m3fn), scale, (rows, columns))

    @classmethod
    def laid_out(
        cls,
        codes: Tensor,
        scale: Tensor,
        layout: Layout = "rows",
        numbers: tuple[int, ...] = BLOCK,
        whole: Tensor | None = None,  # noqa: ARG003 - it has none
    ) -> Self:
        """Check `weight` and `weight_scale_inv` as a checkpoint holds them, and keep them as they are.

        Raises:
            UsageError: dtype, shape or device do not fit, a code is NaN, or a scale is negative or not finite.
        """
        rows, columns = numbers or BLOCK
        check_rows(layout)
        _check_fp8(codes, scale, (rows, columns))
        return cls(codes.contiguous(), scale.contiguous(), (rows, columns))

    @classmethod
    def empty(
        cls,
        shape: tuple[int, ...],
        layout: Layout = "rows",
        numbers: tuple[int, ...] = BLOCK,
        *,
        device: torch.device | str,
    ) -> Self:
        """Return a weight `[N, K]` or `[E, N, K]` with whatever content."""
        rows, columns = numbers or BLOCK
        check_rows(layout)
        codes = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
        scale = torch.empty(_scales(codes, (rows, columns)), dtype=torch.float32, device=device)
        return cls(codes, scale, (rows, columns))

    def check(self) -> None:
        """Raise UsageError unless codes and scale fit each other and the block, as those of `prepare_fp8` do."""
        expected = _scales(self.codes, self.block)
        check_parts(self.codes, self.scale, (torch.float8_e4m3fn, torch.float32), expected)

    def checkpoint(self) -> tuple[Tensor, Tensor]:
        """Return `weight` and `weight_scale_inv` as they were given to `prepare_fp8`, bit for bit."""
        return self.codes, self.scale

    def dequantize(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Return the weights `[.., N, K]`: the float32 product code * scale, rounded to `dtype`."""
        return (self.codes.float() * spread(self.scale, self.block, self.shape)).to(dtype)

    def expert(self, number: int) -> Self:
        """Return one expert's weight of a stack, as views."""
        return self.holding(self.codes[number], self.scale[number])

    def rows(self, first: int, last: int) -> Self:
        """Return rows first..last; if they begin within a block, each with scales of its own."""
        codes, (height, columns) = self.codes[..., first:last, :], self.block
        if first % height == 0:
            return self.holding(codes, self.scale[..., first // height : -(-last // height), :])
        scale = self.scale.repeat_interleave(height, -2)[..., first:last, :]
        return type(self)(codes, scale, (1, columns))

    def holding(self, codes: Tensor, scale: Tensor, whole: Tensor | None = None) -> Self:  # noqa: ARG002 - it has none
        """Return a weight with other tensors in blocks of the same size, unchecked."""
        return type(self)(codes, scale, self.block)

    def prepared(self, codes: Tensor, scale: Tensor, whole: Tensor | None = None) -> Self:  # noqa: ARG002 - likewise
        """Do `laid_out` with this weight's blocks."""
        return self.laid_out(codes, scale, numbers=self.block)

    def empty_like(self, device: torch.device | str) -> Self:
        """Return a weight of the same shape and blocks on a device, with whatever content."""
        return self.empty(self.shape, numbers=self.block, device=device)


def spread(scale: Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """Return a block's scale for each weight of `shape`."""
    wide = scale.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return wide[..., : shape[-2], : shape[-1]]


def _scales(codes: Tensor, block: tuple[int, int]) -> tuple[int, ...]:
    return (*codes.shape[:-2], -(-codes.shape[-2] // block[0]), -(-codes.shape[-1] // block[1]))


def _check_fp8(codes: Tensor, scale: Tensor, block: tuple[int, int]) -> None:
    if codes.dtype != torch.float8_e4m3fn or scale.dtype != torch.float32:
        raise UsageError(
            f"expected float8_e4m3fn weight and float32 weight_scale_inv, found {codes.dtype} and {scale.dtype}"
        )
    if codes.ndim not in (2, 3) or block[0] < 1 or block[1] < GROUP or block[1] % GROUP:
        raise UsageError(
            f"weight: expected [N, K] or [E, N, K] with blocks of a multiple of {GROUP} columns, found "
            f"{list(codes.shape)} with blocks of {block[0]}x{block[1]}"
        )
    if codes.shape[-1] % GROUP:
        raise UsageError(f"weight: expected a multiple of {GROUP} columns, found {codes.shape[-1]}")
    expected = list(_scales(codes, block))
    if list(scale.shape) != expected:
        raise UsageError(
            f"weight_scale_inv: expected {expected} for weight {list(codes.shape)} in blocks of {block[0]}x{block[1]}, "
            f"found {list(scale.shape)}"
        )
    check_device(codes, scale)
    check_scale(scale, "weight_scale_inv")
    if _has_nan(codes):
        raise UsageError("weight: found NaN among the FP8 codes; such a weight cannot be used")


def _has_nan(codes: Tensor) -> bool:
    """Look for the two NaN of e4m3fn, 0x7F and 0xFF: each is the largest byte, with and without a sign, if it is there.

    Two reductions without a temporary read 20 GB/s on a core where comparing each byte made 1.2.
    """
    if not codes.numel():
        return False
    bits = codes.view(torch.uint8)
    return int(bits.amax()) == 0xFF or int(bits.view(torch.int8).amax()) == 0x7F
